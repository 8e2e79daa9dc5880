#include "runtime/interpreter/block_engine.h"

#include <bit>
#include <utility>

#include "runtime/system/errors.h"
#include "runtime/system/interrupt.h"

namespace flash_attn_jit {
namespace {

// The engine whose block this system thread runs.
thread_local BlockEngine* running = nullptr;

class RunningEngine {
 public:
  explicit RunningEngine(BlockEngine* engine) : outer_(std::exchange(running, engine)) {}
  ~RunningEngine() { running = outer_; }

 private:
  BlockEngine* outer_;  // whose pause a signal handler used to run another kernel
};

// Variants of Meeting::kMma.
constexpr int kMmaAccumulate = 1;
constexpr int kAnyInBlock = 1;

}  // namespace

BlockEngine::BlockEngine(std::string kernel, int threads, int dynamic_smem, GlobalMemory& tensors)
    : kernel_(std::move(kernel)),
      threads_(threads),
      global_(tensors),
      shared_(dynamic_smem, sites_),
      stacks_(threads),
      fibers_(threads),
      warps_(threads / 32) {}

void BlockEngine::run_block(std::int64_t block, ThreadFunction thread, const void* params) {
  block_ = block;
  thread_function_ = thread;
  params_ = params;
  finished_warps_ = 0;
  warps_at_barrier_ = 0;
  block_begin_ = ++block_barriers_;
  shared_.begin_block(block_begin_);
  any_in_block_ = {};
  for (Warp& warp : warps_) {
    warp.waiting = warp.exited = warp.next_lane = 0;
    warp.at_block_barrier = false;
    ++warp.barriers;
  }
  for (int i = 0; i < threads_; ++i)
    fibers_[i].prepare(stacks_.bottom(i), FiberStacks::kBytes, i % 32 * 3 * 64, &BlockEngine::fiber_main);

  const RunningEngine scope(this);
  current_ = 0;
  previous_ = -1;
  main_.switch_to(fibers_[0]);
  while (paused_) {
    throw_if_interrupted();
    paused_ = false;
    main_.switch_to(fibers_[current_]);
  }
  if (!error_.empty()) throw InterpreterError(message());
}

// ---- fibers ----

void BlockEngine::fiber_main() {
  BlockEngine& engine = *running;
  Fiber::entered(engine.previous_ < 0 ? engine.main_ : engine.fibers_[engine.previous_]);
  engine.thread_function_(engine.params_);
  engine.exit_thread();
}

// Goes back to run_block() from time to time: what it asks there runs foreign code, for which a fiber's stack is no
// place.
void BlockEngine::pause_if_due() {
  const auto now = std::chrono::steady_clock::now();
  if (now < next_pause_) return;
  next_pause_ = now + std::chrono::milliseconds(100);
  paused_ = true;
  fibers_[current_].switch_to(main_);
}

void BlockEngine::switch_to_thread(int thread) {
  previous_ = current_;
  current_ = thread;
  fibers_[previous_].switch_to(fibers_[thread]);
}

int BlockEngine::runnable_warp_after(int warp) const {
  const int count = static_cast<int>(warps_.size());
  for (int i = 1; i <= count; ++i) {
    const Warp& other = warps_[(warp + i) % count];
    if (!other.at_block_barrier && other.exited < 32) return (warp + i) % count;
  }
  return -1;
}

void BlockEngine::exit_thread() {
  Warp& own = warps_[warp()];
  ++own.exited;
  if (own.waiting > 0) fail_exit();
  if (own.exited < 32) {
    const int next = current_ / 32 * 32 + (lane() + 1) % 32;
    previous_ = current_;
    current_ = next;
    fibers_[previous_].leave_to(fibers_[next]);
  }
  own.accesses.flush(counts_);
  ++finished_warps_;
  const int other = runnable_warp_after(warp());
  previous_ = current_;
  if (other >= 0) {
    current_ = other * 32 + warps_[other].next_lane;
    fibers_[previous_].leave_to(fibers_[current_]);
  }
  if (warps_at_barrier_ > 0) describe_missing_warps();
  fibers_[previous_].leave_to(main_);
}

bool BlockEngine::meet(Meeting meeting, int variant, SiteId site) {
  Warp& own = warps_[warp()];
  if (own.waiting == 0) {
    own.meeting = meeting;
    own.variant = variant;
    own.site = site;
  } else if (own.meeting != meeting || own.variant != variant || own.site != site) {
    fail_divergence(meeting, variant, site);
  }
  if (own.exited > 0) fail_divergence(meeting, variant, site);
  if (++own.waiting < 32) {
    switch_to_thread(current_ / 32 * 32 + (lane() + 1) % 32);
    return false;
  }
  own.waiting = 0;
  own.accesses.flush(counts_);
  return true;
}

// ---- primitives ----

void BlockEngine::load_global(HostAccess access, void* value, const void* address, SiteId site) {
  const int bytes = access_kind(access).bytes;
  if (!global_.check_read(address, bytes, {block_begin_, block_barriers_}, error_)) fail(site);
  __builtin_memcpy(value, address, bytes);
}

void BlockEngine::store_global(HostAccess access, void* address, const void* value, SiteId site) {
  const int bytes = access_kind(access).bytes;
  if (!global_.check_write(address, bytes, {block_begin_, block_barriers_}, error_)) fail(site);
  __builtin_memcpy(address, value, bytes);
}

SharedAccess BlockEngine::shared_access(HostAccess access, std::uint32_t address, int lane, SiteId site) const {
  return {.address = address,
          .bytes = access_kind(access).bytes,
          .warp = warp(),
          .lane = lane,
          .barriers = {block_barriers_, warps_[warp()].barriers},
          .site = site};
}

void BlockEngine::load_shared(HostAccess access, void* value, std::uint32_t address, SiteId site) {
  warps_[warp()].accesses.add(lane(), access, site, address);
  if (!shared_.read(shared_access(access, address, lane(), site), value, error_)) fail(site);
}

void BlockEngine::store_shared(HostAccess access, std::uint32_t address, const void* value, SiteId site) {
  warps_[warp()].accesses.add(lane(), access, site, address);
  if (!shared_.write(shared_access(access, address, lane(), site), value, error_)) fail(site);
}

void BlockEngine::ldmatrix(HostAccess access, std::uint32_t* r, std::uint32_t address, SiteId site) {
  operands_.matrices[lane()] = r;
  operands_.addresses[lane()] = address;
  if (meet(Meeting::kLdmatrix, static_cast<int>(access), site)) compute_ldmatrix(access);
}

void BlockEngine::compute_ldmatrix(HostAccess access) {
  const SiteId site = warps_[warp()].site;
  const bool of_one = access == HostAccess::kLdmatrixX1 || access == HostAccess::kLdmatrixX1Trans;
  const bool of_two = access == HostAccess::kLdmatrixX2 || access == HostAccess::kLdmatrixX2Trans;
  const bool trans = access == HostAccess::kLdmatrixX4Trans || access == HostAccess::kLdmatrixX2Trans ||
                     access == HostAccess::kLdmatrixX1Trans;
  const int matrices = of_one ? 1 : of_two ? 2 : 4;
  for (int i = 0; i < matrices; ++i) {
    MatrixRows rows;
    for (int r = 0; r < 8; ++r) {
      const int source = 8 * i + r;
      if (!shared_.read(shared_access(access, operands_.addresses[source], source, site), rows[r].data(), error_))
        fail(site, source);
    }
    for (int l = 0; l < 32; ++l)
      operands_.matrices[l][i] = trans ? ldmatrix_fragment_trans(rows, l) : ldmatrix_fragment(rows, l);
  }
  const std::uint32_t lanes = 0xffffffffu >> (32 - 8 * matrices);
  const BankCycles banks = bank_cycles(operands_.addresses, lanes, access_kind(access).bytes);
  AccessCount& count = counts_[static_cast<int>(access)];
  ++count.accesses;
  count.cycles += banks.cycles;
  count.ideal_cycles += banks.ideal;
}

void BlockEngine::mma(bool accumulate, float* c, std::uint32_t a0, std::uint32_t a1, std::uint32_t b, SiteId site) {
  operands_.mma.c[lane()] = c;
  operands_.mma.a0[lane()] = a0;
  operands_.mma.a1[lane()] = a1;
  operands_.mma.b[lane()] = b;
  if (meet(Meeting::kMma, accumulate ? kMmaAccumulate : 0, site)) warp_mma(operands_.mma, accumulate);
}

std::uint32_t BlockEngine::shuffle(std::uint32_t bits, int from_lane, SiteId site) {
  operands_.shuffled[lane()] = &bits;
  operands_.from_lanes[lane()] = from_lane;
  if (meet(Meeting::kShuffle, 0, site)) compute_shuffle();
  return bits;
}

void BlockEngine::compute_shuffle() {
  std::array<std::uint32_t, 32> given;
  for (int l = 0; l < 32; ++l) given[l] = *operands_.shuffled[l];
  for (int l = 0; l < 32; ++l) *operands_.shuffled[l] = given[operands_.from_lanes[l] & 31];
}

bool BlockEngine::any_in_warp(bool predicate, SiteId site) {
  int result = predicate;
  operands_.predicates[lane()] = &result;
  if (meet(Meeting::kVote, 0, site)) compute_vote();
  return result != 0;
}

void BlockEngine::compute_vote() {
  int any = 0;
  for (const int* predicate : operands_.predicates) any |= *predicate;
  for (int* predicate : operands_.predicates) *predicate = any;
}

void BlockEngine::warp_barrier(SiteId site) {
  if (meet(Meeting::kWarpBarrier, 0, site)) ++warps_[warp()].barriers;
}

bool BlockEngine::any_in_block(bool predicate, SiteId site) {
  bool& any = any_in_block_[block_barriers_ % 2];
  any |= predicate;
  block_barrier(site, kAnyInBlock);
  return any;
}

void BlockEngine::block_barrier(SiteId site, int variant) {
  if (!meet(Meeting::kBlockBarrier, variant, site)) return;
  if (finished_warps_ == 0 && ++warps_at_barrier_ == static_cast<int>(warps_.size())) {
    warps_at_barrier_ = 0;
    any_in_block_[++block_barriers_ % 2] = false;
    for (Warp& each : warps_) {
      each.at_block_barrier = false;
      ++each.barriers;
    }
    pause_if_due();
    return;
  }
  Warp& own = warps_[warp()];
  own.at_block_barrier = true;
  own.next_lane = lane();
  const int other = finished_warps_ > 0 ? -1 : runnable_warp_after(warp());
  if (other < 0) {
    describe_missing_warps();
    fail(site);
  }
  switch_to_thread(other * 32 + warps_[other].next_lane);
}

// ---- failures ----

void BlockEngine::fail(SiteId site) { fail(site, lane()); }

void BlockEngine::fail(SiteId site, int lane) {
  error_site_ = sites_.text(site);
  error_thread_ = warp() * 32 + lane;
  previous_ = current_;
  fibers_[current_].leave_to(main_);
}

const char* BlockEngine::meeting_name(Meeting meeting, int variant) {
  switch (meeting) {
    case Meeting::kLdmatrix:
      return access_kind(static_cast<HostAccess>(variant)).name;
    case Meeting::kMma:
      return variant == kMmaAccumulate ? "multiply_add" : "multiply";
    case Meeting::kShuffle:
      return "shuffle";
    case Meeting::kVote:
      return "any_in_warp";
    case Meeting::kWarpBarrier:
      return "warp_barrier";
    case Meeting::kBlockBarrier:
      return variant == kAnyInBlock ? "any_in_block" : "block_barrier";
  }
  return "";
}

void BlockEngine::fail_divergence(Meeting meeting, int variant, SiteId site) {
  const Warp& own = warps_[warp()];
  error_ = std::string("divergence: this lane is at ") + meeting_name(meeting, variant);
  if (own.exited > 0)
    error_ += " while " + std::to_string(own.exited) + " lanes of its warp have left the kernel";
  else
    error_ += std::string(" while lane ") + std::to_string((lane() + 31) % 32) + " waits at " +
              meeting_name(own.meeting, own.variant) + " (" + sites_.text(own.site) + ")";
  error_ += "; all lanes of a warp must reach it together";
  fail(site);
}

void BlockEngine::fail_exit() {
  const Warp& own = warps_[warp()];
  error_ = std::string("divergence: this lane has left the kernel while ") + std::to_string(own.waiting) +
           " lanes of its warp wait at " + meeting_name(own.meeting, own.variant) + " (" + sites_.text(own.site) + ")";
  fail(own.site);
}

// Some warps wait at a block barrier that others, which have left the kernel, never reached.
void BlockEngine::describe_missing_warps() {
  std::string waiting, gone;
  int first_waiting = -1;
  for (int w = 0; w < static_cast<int>(warps_.size()); ++w) {
    if (warps_[w].exited == 32) gone += " " + std::to_string(w);
    if (!warps_[w].at_block_barrier) continue;
    if (first_waiting < 0) first_waiting = w;
    waiting += " " + std::to_string(w);
  }
  error_ = "block barrier that not every warp reaches: waiting are warps" + waiting +
           ", gone from the kernel are warps" + gone;
  error_site_ = sites_.text(warps_[first_waiting].site);
  error_thread_ = first_waiting * 32;
}

std::string BlockEngine::message() const {
  return kernel_ + ": " + error_site_ + ": block " + std::to_string(block_) + ", warp " +
         std::to_string(error_thread_ / 32) + ", lane " + std::to_string(error_thread_ % 32) + ": " + error_;
}

// ---- what the kernel calls ----

HostEngine BlockEngine::primitives() {
  return {
      .thread_in_block = [] { return running->current_; },
      .block_in_grid = [] { return static_cast<int>(running->block_); },
      .load_global = [](HostAccess access, void* value, const void* address, const char* file,
                        int line) { running->load_global(access, value, address, running->sites_.id(file, line)); },
      .store_global = [](HostAccess access, void* address, const void* value, const char* file,
                         int line) { running->store_global(access, address, value, running->sites_.id(file, line)); },
      .load_shared = [](HostAccess access, void* value, unsigned address, const char* file,
                        int line) { running->load_shared(access, value, address, running->sites_.id(file, line)); },
      .store_shared = [](HostAccess access, unsigned address, const void* value, const char* file,
                         int line) { running->store_shared(access, address, value, running->sites_.id(file, line)); },
      .ldmatrix = [](HostAccess access, unsigned* r, unsigned address, const char* file,
                     int line) { running->ldmatrix(access, r, address, running->sites_.id(file, line)); },
      .mma = [](int accumulate, float* c, unsigned a0, unsigned a1, unsigned b, const char* file,
                int line) { running->mma(accumulate != 0, c, a0, a1, b, running->sites_.id(file, line)); },
      .shuffle = [](unsigned bits, int from_lane, const char* file,
                    int line) { return running->shuffle(bits, from_lane, running->sites_.id(file, line)); },
      .any_in_warp = [](int predicate, const char* file, int line) -> int {
        return running->any_in_warp(predicate != 0, running->sites_.id(file, line));
      },
      .any_in_block = [](int predicate, const char* file, int line) -> int {
        return running->any_in_block(predicate != 0, running->sites_.id(file, line));
      },
      .warp_barrier = [](const char* file, int line) { running->warp_barrier(running->sites_.id(file, line)); },
      .block_barrier = [](const char* file, int line) { running->block_barrier(running->sites_.id(file, line)); },
      .undefined_behaviour =
          [](const char* what, const char* file, int line) {
            running->error_ = std::string("undefined behaviour: ") + what;
            running->fail(running->sites_.id(file, line));
          },
  };
}

}  // namespace flash_attn_jit
