#include "runtime/model/multiprocessor.h"

#include <algorithm>
#include <array>
#include <deque>
#include <memory>
#include <optional>
#include <queue>
#include <unordered_map>

#include "runtime/model/instruction_cache.h"

namespace flash_attn_jit {
namespace {

constexpr int kPartitions = 4;
constexpr int kLanes = 32;
// More than any kernel here takes: a barrier that some warps never reach would go on for ever.
constexpr std::int64_t kMostCycles = 50'000'000;
constexpr std::int64_t kNever = std::int64_t{1} << 60;

// Cycles until a pipe of a sub-partition takes the next instruction of a warp.
int interval_of(const MultiprocessorModel& model, const Instruction& instruction) {
  switch (instruction.pipe) {
    case Pipe::kTensor:
      return instruction.is("IMMA") || instruction.is("HMMA884") ? model.mma_interval / 2 : model.mma_interval;
    case Pipe::kXu:
      return model.xu_interval;
    case Pipe::kFp64:
      return model.fp64_interval;
    case Pipe::kMemory:
      return 1;
    default:
      return model.alu_interval;
  }
}

// Cycles until the result of what is not a memory instruction is there, where a scoreboard says so.
int latency_of(const MultiprocessorModel& model, Pipe pipe) {
  switch (pipe) {
    case Pipe::kTensor:
      return model.mma_latency;
    case Pipe::kXu:
      return model.xu_latency;
    case Pipe::kFp64:
      return model.fp64_latency;
    default:
      return model.alu_latency;
  }
}

// What a memory instruction costs, without bank conflicts: cycles of the load/store unit, and from then to its result.
struct MemoryCost {
  int data = 0, latency = 0;
};

MemoryCost memory_cost(const MultiprocessorModel& model, const Instruction& instruction) {
  const std::string_view name = instruction.name;
  const int data = std::max(2, instruction.width * kLanes / model.shared_bytes_per_cycle);
  if (name == "LDSM" || name == "LDS" || name == "STS" || name == "ATOMS") return {data, model.shared_latency + data};
  if (name == "SHFL") return {2, model.shuffle_latency};
  if (name == "LDG" || name == "LD") return {data, model.global_latency};
  if (name == "STG" || name == "ST" || name == "LDL" || name == "STL") return {data, model.store_latency};
  if (name == "RED" || name == "ATOM" || name == "ATOMG") return {model.atomic_interval, model.atomic_latency};
  return {1, model.other_memory_latency};
}

// An instruction with all that the clockwork below asks of it.
struct Step {
  const Instruction* instruction;
  int pipe, interval, stall;
  int result_latency, operand_latency;
  MemoryCost memory;
};

struct Warp {
  int block, partition;
  std::int64_t ready = 0;  // not before this cycle
  std::size_t at = 0;      // in the stream
  bool waits_at_barrier = false;
  std::array<int, kScoreboards> held{};

  bool is_held(const Instruction& by) const {
    for (int board = 0; board < kScoreboards; ++board)
      if ((by.waits_for >> board & 1) != 0 && held[static_cast<std::size_t>(board)] > 0) return true;
    return by.counted_board >= 0 && by.counted_board < kScoreboards &&
           held[static_cast<std::size_t>(by.counted_board)] > by.count;
  }
};

// A scoreboard of a warp that is let go.
struct Release {
  std::int64_t cycle;
  Warp* warp;
  int board;
  bool operator>(const Release& other) const { return cycle > other.cycle; }
};

class Multiprocessor {
 public:
  Multiprocessor(const MultiprocessorModel& model, const Stream& stream, const ResidentBlocks& resident, Waits* waits)
      : model_(model), resident_(resident), waits_(waits) {
    for (const Instruction* instruction : stream) steps_.push_back(step_of(*instruction));
    for (int i = 0; i < kPartitions; ++i) partitions_.emplace_back(model_);
  }

  Usage go_round(const LoopRun& run) {
    run_ = run;
    for (int block = 0; block < resident_.blocks; ++block) start_block(block * run.offset);
    go_on();
    return usage(run.turns);
  }

  Usage go_through(int blocks) {
    blocks_to_run_ = blocks;
    measured_from_ = 0;
    for (int block = 0; block < std::min(resident_.blocks, blocks); ++block) start_block(0);
    go_on();
    return usage(blocks);
  }

 private:
  struct Partition {
    explicit Partition(const MultiprocessorModel& model) : cache(model) {}
    std::vector<Warp*> warps;  // the oldest first
    std::array<std::int64_t, kPipes> free{};
    std::deque<std::pair<Warp*, const Step*>> memory_queue;
    Warp* last = nullptr;  // that issued
    InstructionCache cache;
  };

  static constexpr auto kMemory = static_cast<std::size_t>(Pipe::kMemory);

  Step step_of(const Instruction& instruction) const {
    const bool tensor = instruction.pipe == Pipe::kTensor, memory = instruction.pipe == Pipe::kMemory;
    return {.instruction = &instruction,
            .pipe = static_cast<int>(instruction.pipe),
            .interval = interval_of(model_, instruction),
            .stall = std::max(1, instruction.stall),
            .result_latency = latency_of(model_, instruction.pipe),
            .operand_latency = tensor ? model_.mma_read : 6,
            .memory = memory ? memory_cost(model_, instruction) : MemoryCost{}};
  }

  void start_block(std::int64_t cycle) {
    for (int i = 0; i < resident_.warps; ++i) {
      all_.push_back(std::make_unique<Warp>(Warp{.block = started_, .partition = i % kPartitions, .ready = cycle}));
      partitions_[static_cast<std::size_t>(i % kPartitions)].warps.push_back(all_.back().get());
    }
    alive_[started_++] = resident_.warps;
    running_ += resident_.warps;
  }

  void go_on() {
    while (!ended_at_) {
      for (; !releases_.empty() && releases_.top().cycle <= now_; releases_.pop())
        --releases_.top().warp->held[static_cast<std::size_t>(releases_.top().board)];
      bool acted = serve_memory();
      next_ = kNever;
      for (Partition& partition : partitions_) acted = issue(partition) || acted;
      advance(acted);
      if (now_ > kMostCycles) throw Error("the model makes no progress: a barrier that some warps never reach");
    }
  }

  bool measures() const { return measured_from_ >= 0; }

  // The load/store unit takes the next instruction, of the sub-partitions in turn.
  bool serve_memory() {
    if (unit_free_ > now_) return false;
    for (int i = 0; i < kPartitions; ++i) {
      auto& queue = partitions_[static_cast<std::size_t>((turn_ + i) % kPartitions)].memory_queue;
      if (queue.empty()) continue;
      const auto [warp, step] = queue.front();
      queue.pop_front();
      const auto [data, latency] = step->memory;
      unit_free_ = now_ + data;
      if (measures()) unit_busy_ += data;
      release(*warp, step->instruction->result_board, latency + data - 1);
      release(*warp, step->instruction->operand_board, data + 4);
      turn_ = (turn_ + i + 1) % kPartitions;
      return true;
    }
    return false;
  }

  void release(Warp& warp, int board, int cycles) {
    if (board < kScoreboards) releases_.push({now_ + cycles, &warp, board});
  }

  // At most one warp issues: the one that did last if it can, else the youngest that can.
  bool issue(Partition& partition) {
    order_.clear();
    const auto add = [this](Warp* warp) {
      if (!warp->waits_at_barrier && warp->ready <= now_) order_.push_back(warp);
    };
    if (partition.last != nullptr && partition.last->at < steps_.size()) add(partition.last);
    for (auto warp = partition.warps.rbegin(); warp != partition.warps.rend(); ++warp)
      if (*warp != partition.last) add(*warp);
    bool taken = false;
    for (Warp* warp : order_) {
      const char* const obstacle = taken ? "another warp" : obstacle_of(partition, *warp);
      if (obstacle != nullptr) {
        note_wait(*warp, obstacle);
        continue;
      }
      taken = true;
      issue(partition, *warp);
    }
    if (waits_ != nullptr && measures())
      for (const Warp* warp : partition.warps)
        if (warp->waits_at_barrier)
          ++(*waits_)[{steps_[(warp->at + steps_.size() - 1) % steps_.size()].instruction->address, "barrier"}];
    return taken;
  }

  void note_wait(const Warp& warp, const char* reason) {
    if (waits_ != nullptr && measures()) ++(*waits_)[{steps_[warp.at].instruction->address, reason}];
  }

  // Why the warp's next instruction cannot go now, if it cannot.
  const char* obstacle_of(Partition& partition, const Warp& warp) {
    constexpr std::array<const char*, kPipes> kBusy = {"tensor pipe", "fma pipe",     "alu pipe",
                                                       "xu pipe",     "fp16 pipe",    "uniform pipe",
                                                       "fp64 pipe",   "control pipe", "memory pipe"};
    const Step& step = steps_[warp.at];
    if (warp.is_held(*step.instruction)) return "scoreboard";
    if (const std::int64_t line = partition.cache.ready_at(step.instruction->address, now_); line > now_) {
      next_ = std::min(next_, line);
      return "instruction cache";
    }
    const auto pipe = static_cast<std::size_t>(step.pipe);
    if (pipe == kMemory && partition.memory_queue.size() >= static_cast<std::size_t>(model_.memory_queue))
      return "memory queue";
    if (partition.free[pipe] > now_) {
      next_ = std::min(next_, partition.free[pipe]);
      return kBusy[pipe];
    }
    return nullptr;
  }

  void issue(Partition& partition, Warp& warp) {
    const Step& step = steps_[warp.at];
    const Instruction& instruction = *step.instruction;
    const auto pipe = static_cast<std::size_t>(step.pipe);
    partition.free[pipe] = now_ + step.interval;
    if (pipe == kMemory) partition.memory_queue.emplace_back(&warp, &step);
    for (const auto& [board, latency] : {std::pair(instruction.result_board, step.result_latency),
                                         std::pair(instruction.operand_board, step.operand_latency)}) {
      if (board >= kScoreboards) continue;
      ++warp.held[static_cast<std::size_t>(board)];
      if (pipe != kMemory) release(warp, board, latency);
    }
    if (measures()) {
      busy_[pipe] += step.interval;
      ++issued_;
    }
    warp.ready = now_ + step.stall;
    partition.last = &warp;
    if (const std::size_t ahead = warp.at + static_cast<std::size_t>(model_.fetch_ahead); ahead < steps_.size())
      partition.cache.ready_at(steps_[ahead].instruction->address, now_);
    if (instruction.is("BAR")) arrive(warp, instruction);
    if (++warp.at == steps_.size()) end_of_stream(partition, warp);
  }

  void arrive(Warp& warp, const Instruction& barrier) {
    std::vector<Warp*>& here = arrived_[{warp.block, barrier.barrier}];
    here.push_back(&warp);
    warp.waits_at_barrier = !barrier.arrives_only;
    if (static_cast<int>(here.size()) != (barrier.count > 0 ? barrier.count : resident_.warps)) return;
    for (Warp* each : here) {
      if (!each->waits_at_barrier) continue;
      each->waits_at_barrier = false;
      each->ready = std::max(each->ready, now_ + model_.barrier_latency);
    }
    arrived_.erase({warp.block, barrier.barrier});
  }

  void end_of_stream(Partition& partition, Warp& warp) {
    if (blocks_to_run_ > 0) {
      std::erase(partition.warps, &warp);
      if (--alive_[warp.block] > 0) return;
      if (++finished_ == blocks_to_run_)
        ended_at_ = warp.ready;
      else if (started_ < blocks_to_run_)
        start_block(now_);
      return;
    }
    warp.at = 0;
    ++turns_;
    if (turns_ == run_.warm_up * running_) measured_from_ = now_;
    if (turns_ == (run_.warm_up + run_.turns) * running_) ended_at_ = now_;
  }

  // To the next cycle, or, where nothing could go, to the next at which something may.
  void advance(bool acted) {
    if (acted || waits_ != nullptr) {
      ++now_;
      return;
    }
    if (!releases_.empty()) next_ = std::min(next_, releases_.top().cycle);
    bool queued = false;
    for (const Partition& partition : partitions_) {
      queued = queued || !partition.memory_queue.empty();
      for (const Warp* warp : partition.warps)
        if (!warp->waits_at_barrier && warp->ready > now_) next_ = std::min(next_, warp->ready);
    }
    if (queued && unit_free_ > now_) next_ = std::min(next_, unit_free_);
    now_ = std::max(now_ + 1, next_);
  }

  Usage usage(int parts) const {
    const auto span = static_cast<double>(*ended_at_ - measured_from_);
    Usage usage;
    for (std::size_t pipe = 0; pipe < kMemory; ++pipe)
      usage.busy[pipe] = static_cast<double>(busy_[pipe]) / (kPartitions * span);
    usage.load_store = static_cast<double>(unit_busy_) / span;
    usage.issue = static_cast<double>(issued_) / (kPartitions * span);
    usage.cycles = span / parts;
    return usage;
  }

  const MultiprocessorModel model_;
  const ResidentBlocks resident_;
  Waits* const waits_;
  std::vector<Step> steps_;
  std::vector<Partition> partitions_;
  std::vector<std::unique_ptr<Warp>> all_;
  std::vector<Warp*> order_;

  LoopRun run_;
  int blocks_to_run_ = 0;  // 0: it goes round
  int started_ = 0, finished_ = 0, running_ = 0;
  int turns_ = 0;                       // of all warps together
  std::unordered_map<int, int> alive_;  // block -> warps that have not ended
  std::map<std::pair<int, int>, std::vector<Warp*>> arrived_;
  std::priority_queue<Release, std::vector<Release>, std::greater<>> releases_;

  std::int64_t now_ = 0, next_ = kNever;
  std::int64_t unit_free_ = 0, unit_busy_ = 0;
  int turn_ = 0;
  std::int64_t measured_from_ = -1;
  std::optional<std::int64_t> ended_at_;
  std::array<std::int64_t, kPipes> busy_{};
  std::int64_t issued_ = 0;
};

}  // namespace

Usage play_loop(const MultiprocessorModel& model, const Stream& loop, const ResidentBlocks& resident,
                const LoopRun& run, Waits* waits) {
  return Multiprocessor(model, loop, resident, waits).go_round(run);
}

Usage play_blocks(const MultiprocessorModel& model, const Stream& whole, const ResidentBlocks& resident, int blocks) {
  return Multiprocessor(model, whole, resident, nullptr).go_through(blocks);
}

}  // namespace flash_attn_jit
