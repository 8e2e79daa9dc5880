// One multiprocessor that runs warps through straight streams of instructions, cycle by cycle: four sub-partitions,
// each of which issues one warp's next instruction a cycle in order, pipes with fixed intervals, one load/store unit
// for all, and a first level of instruction cache each.
#pragma once

#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "runtime/model/card.h"
#include "runtime/model/machine_code.h"

namespace flash_attn_jit {

// The instructions of one warp, in the order in which it runs them.
using Stream = std::vector<const Instruction*>;

struct ResidentBlocks {
  int blocks = 1;  // at a time
  int warps = 1;   // of a block
};

// (address, reason) -> cycles that warps spent before the instruction there, for that reason.
using Waits = std::map<std::pair<std::uint32_t, std::string>, std::int64_t>;

struct Usage {
  std::array<double, kPipes> busy{};  // shares of the time; of kMemory nothing: see load_store
  double load_store = 0;              // of the multiprocessor's one unit
  double issue = 0;                   // of the issue slots
  double cycles = 0;                  // a turn, or a block
};

// The warps of all blocks go round `loop`, `turns` times in the mean after `warm_up` times: those of the youngest block
// go first, and may starve others for thousands of turns. `offset` cycles lie between the starts of two blocks.
struct LoopRun {
  int turns = 8, warm_up = 3;
  std::int64_t offset = 0;
};
Usage play_loop(const MultiprocessorModel& model, const Stream& loop, const ResidentBlocks& resident,
                const LoopRun& run = {}, Waits* waits = nullptr);

// `blocks` blocks, one after the other as there is room for them, each warp once through `whole`.
Usage play_blocks(const MultiprocessorModel& model, const Stream& whole, const ResidentBlocks& resident, int blocks);

}  // namespace flash_attn_jit
