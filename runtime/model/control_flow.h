// The loops of a kernel's machine code that hold tensor instructions, and the ways to and from them.
#pragma once

#include <cstddef>
#include <vector>

#include "runtime/model/machine_code.h"
#include "runtime/model/multiprocessor.h"

namespace flash_attn_jit {

// Instructions `first` to `last`, which branches back to it.
struct CodeLoop {
  std::size_t first = 0, last = 0;
  int tensor = 0;  // instructions of the tensor cores
};

// Those without another such loop inside, the one with the most tensor instructions first, of equals the shortest.
std::vector<CodeLoop> tensor_loops(const MachineCode& code);

// A loop as straight-line code: what a branch inside it skips counts as run.
Stream stream_of(const MachineCode& code, const CodeLoop& loop);

// The fewest instructions from the kernel's entry to `loop`: what a block does before it that is not another loop's
// work.
Stream path_to(const MachineCode& code, const CodeLoop& loop);

// From behind `loop` to the exit. A branch forward, which skips what lies at an edge of the problem or happens rarely,
// is not taken, and other loops are passed through once.
Stream path_from(const MachineCode& code, const CodeLoop& loop);

// From the kernel's entry to its exit, in the same way, of one without such loops.
Stream path_through(const MachineCode& code);

}  // namespace flash_attn_jit
