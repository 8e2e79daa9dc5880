#include "runtime/model/control_flow.h"

#include <algorithm>
#include <limits>
#include <queue>

namespace flash_attn_jit {
namespace {

std::size_t target_of(const Instruction& branch) { return static_cast<std::size_t>(branch.target) / kInstructionBytes; }

bool is_branch(const Instruction& instruction) { return instruction.is("BRA") && instruction.target >= 0; }

bool ends(const Instruction& instruction) { return instruction.is("EXIT") && instruction.always; }

bool contains(const CodeLoop& outer, const CodeLoop& inner) {
  return outer.first <= inner.first && inner.last <= outer.last;
}

// From `at` on to the exit; branches are taken where they must be. A loop that ends by an exit, with a branch back behind
// it, is gone through once.
Stream fall_through(const MachineCode& code, std::size_t at) {
  Stream stream;
  std::size_t to_last_exit = 0;
  while (at < code.instructions.size() && stream.size() <= code.instructions.size()) {
    const Instruction& instruction = code.instructions[at];
    stream.push_back(&instruction);
    if (instruction.is("EXIT")) to_last_exit = stream.size();
    if (ends(instruction)) return stream;
    const bool jumps = is_branch(instruction) && instruction.always;
    if (jumps && target_of(instruction) <= at && to_last_exit > 0) {
      stream.resize(to_last_exit);
      return stream;
    }
    at = jumps ? target_of(instruction) : at + 1;
  }
  throw MachineCodeError("the way through the kernel reaches no exit");
}

}  // namespace

std::vector<CodeLoop> tensor_loops(const MachineCode& code) {
  std::vector<CodeLoop> loops;
  for (std::size_t i = 0; i < code.instructions.size(); ++i) {
    const Instruction& branch = code.instructions[i];
    if (!is_branch(branch) || branch.target >= branch.address) continue;
    CodeLoop loop{target_of(branch), i};
    for (std::size_t j = loop.first; j <= loop.last; ++j) loop.tensor += code.instructions[j].pipe == Pipe::kTensor;
    if (loop.tensor > 0) loops.push_back(loop);
  }
  std::vector<CodeLoop> inner;
  for (const CodeLoop& loop : loops)
    if (std::ranges::none_of(loops, [&](const CodeLoop& other) { return &other != &loop && contains(loop, other); }))
      inner.push_back(loop);
  std::ranges::stable_sort(inner, [](const CodeLoop& a, const CodeLoop& b) {
    return a.tensor != b.tensor ? a.tensor > b.tensor : a.last - a.first < b.last - b.first;
  });
  return inner;
}

Stream stream_of(const MachineCode& code, const CodeLoop& loop) {
  Stream stream;
  for (std::size_t i = loop.first; i <= loop.last; ++i) stream.push_back(&code.instructions[i]);
  return stream;
}

Stream path_to(const MachineCode& code, const CodeLoop& loop) {
  constexpr std::size_t kNowhere = std::numeric_limits<std::size_t>::max();
  std::vector<std::size_t> from(code.instructions.size(), kNowhere);
  std::queue<std::size_t> reached;  // in the order of their distance: each instruction is one step
  from.at(0) = 0;
  for (reached.push(0); !reached.empty() && reached.front() != loop.first; reached.pop()) {
    const std::size_t at = reached.front();
    const Instruction& instruction = code.instructions[at];
    const auto go = [&](std::size_t next) {
      if (next >= from.size() || from[next] != kNowhere) return;
      from[next] = at;
      reached.push(next);
    };
    if (ends(instruction)) continue;
    if (is_branch(instruction)) go(target_of(instruction));
    if (!is_branch(instruction) || !instruction.always) go(at + 1);
  }
  if (loop.first != 0 && from[loop.first] == kNowhere) throw MachineCodeError("no way leads to the kernel's main loop");
  Stream stream;
  for (std::size_t at = loop.first; at != 0;) {
    at = from[at];
    stream.push_back(&code.instructions[at]);
  }
  std::ranges::reverse(stream);
  return stream;
}

Stream path_from(const MachineCode& code, const CodeLoop& loop) { return fall_through(code, loop.last + 1); }

Stream path_through(const MachineCode& code) { return fall_through(code, 0); }

}  // namespace flash_attn_jit
