// Runs the threads of one block at a time as fibers, and is what their primitives call.
//
// All lanes of a warp meet at each warp-wide primitive: a lane leaves its operands and switches to the next
// lane; the last one computes the whole warp's result and runs on, to the next such primitive, where the
// others follow it. So each lane costs one switch for each primitive. At a block barrier a whole warp waits
// and another one goes on.
#pragma once

#include <array>
#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "runtime/interpreter/bank_conflicts.h"
#include "runtime/interpreter/fiber.h"
#include "runtime/interpreter/global_memory.h"
#include "runtime/interpreter/shared_memory.h"
#include "runtime/interpreter/source_site.h"
#include "runtime/interpreter/warp_math.h"
#include "templates/host_engine.cuh"

namespace flash_attn_jit {

class BlockEngine {
 public:
  using ThreadFunction = void (*)(const void* params);

  // `threads` is a multiple of 32, at most 1024. `tensors` must outlive the engine.
  BlockEngine(std::string kernel, int threads, int dynamic_smem, GlobalMemory& tensors);

  // Runs one block from start to end. Throws InterpreterError at the first failed check, Interrupted where the user has
  // asked to stop; the engine is then spent.
  void run_block(std::int64_t block, ThreadFunction thread, const void* params);

  const std::array<AccessCount, kHostAccesses>& access_counts() const { return counts_; }

  // What the loaded kernel calls; valid on a system thread inside run_block().
  static HostEngine primitives();

 private:
  // What lanes can wait for. A whole warp must wait for the same, at the same line.
  enum class Meeting : std::uint8_t { kLdmatrix, kMma, kShuffle, kVote, kWarpBarrier, kBlockBarrier };

  struct Warp {
    int waiting = 0;  // lanes at the meeting
    int exited = 0;
    int next_lane = 0;  // where the warp goes on
    Meeting meeting{};
    int variant = 0;  // tells apart the primitives of one Meeting
    SiteId site = 0;
    bool at_block_barrier = false;
    std::uint32_t barriers = 0;  // of the warp and of the block, which this warp took part in
    WarpAccesses accesses;
  };

  // What the waiting lanes left; one set is enough, since a warp's meeting ends before another warp runs on.
  struct Operands {
    MmaOperands mma;
    std::array<std::uint32_t*, 32> matrices;
    std::array<std::uint32_t, 32> addresses;
    std::array<std::uint32_t*, 32> shuffled;
    std::array<int, 32> from_lanes;
    std::array<int*, 32> predicates;
  };

  void load_global(HostAccess access, void* value, const void* address, SiteId site);
  void store_global(HostAccess access, void* address, const void* value, SiteId site);
  void load_shared(HostAccess access, void* value, std::uint32_t address, SiteId site);
  void store_shared(HostAccess access, std::uint32_t address, const void* value, SiteId site);
  void ldmatrix(HostAccess access, std::uint32_t* r, std::uint32_t address, SiteId site);
  void mma(bool accumulate, float* c, std::uint32_t a0, std::uint32_t a1, std::uint32_t b, SiteId site);
  std::uint32_t shuffle(std::uint32_t bits, int from_lane, SiteId site);
  bool any_in_warp(bool predicate, SiteId site);
  void warp_barrier(SiteId site);
  bool any_in_block(bool predicate, SiteId site);
  void block_barrier(SiteId site, int variant = 0);

  // True for the last lane to arrive, which has to compute the result before it returns to the kernel. The
  // others return false once that is done.
  bool meet(Meeting meeting, int variant, SiteId site);
  void compute_ldmatrix(HostAccess access);
  void compute_shuffle();
  void compute_vote();

  void pause_if_due();
  static void fiber_main();
  [[noreturn]] void exit_thread();
  void switch_to_thread(int thread);
  void switch_to_another_warp(int warp);
  int runnable_warp_after(int warp) const;

  int warp() const { return current_ / 32; }
  int lane() const { return current_ % 32; }
  SharedAccess shared_access(HostAccess access, std::uint32_t address, int lane, SiteId site) const;

  // A failed check: error_ says what, these add where. They do not return to the kernel.
  [[noreturn]] void fail(SiteId site);
  [[noreturn]] void fail(SiteId site, int lane);
  [[noreturn]] void fail_divergence(Meeting meeting, int variant, SiteId site);
  [[noreturn]] void fail_exit();
  void describe_missing_warps();
  static const char* meeting_name(Meeting meeting, int variant);
  std::string message() const;

  const std::string kernel_;
  const int threads_;
  GlobalMemory& global_;
  SourceSites sites_;
  SharedMemory shared_;
  FiberStacks stacks_;
  std::vector<Fiber> fibers_;
  Fiber main_;
  std::vector<Warp> warps_;
  Operands operands_;
  std::array<AccessCount, kHostAccesses> counts_;

  int current_ = 0;      // thread
  int previous_ = -1;    // what switched here; -1: main_
  bool paused_ = false;  // the block goes on with current_
  std::chrono::steady_clock::time_point next_pause_{};
  int finished_warps_ = 0;
  int warps_at_barrier_ = 0;
  std::uint32_t block_barriers_ = 0, block_begin_ = 0;  // and the number of the one that began the block
  std::array<bool, 2> any_in_block_{};  // of the barriers of even and odd numbers: a fast warp may be one ahead
  std::int64_t block_ = 0;
  ThreadFunction thread_function_ = nullptr;
  const void* params_ = nullptr;

  std::string error_;  // empty while all is well
  std::string error_site_;
  int error_thread_ = 0;
};

}  // namespace flash_attn_jit
