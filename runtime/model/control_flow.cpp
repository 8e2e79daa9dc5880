#include "runtime/model/control_flow.h"

#include <algorithm>
#include <limits>
#include <optional>
#include <queue>

namespace flash_attn_jit {
namespace {

std::size_t target_of(const Instruction& branch) { return static_cast<std::size_t>(branch.target) / kInstructionBytes; }

bool is_branch(const Instruction& instruction) { return instruction.is("BRA") && instruction.target >= 0; }

bool ends(const Instruction& instruction) { return instruction.is("EXIT") && instruction.always; }

bool contains(const CodeLoop& outer, const CodeLoop& inner) {
  return outer.first <= inner.first && inner.last <= outer.last;
}

constexpr std::size_t kNowhere = std::numeric_limits<std::size_t>::max();

// The fewest instructions from `begin` to one that `is_end` accepts, which is not among them; nothing where none is
// reached.
template <class IsEnd>
std::optional<Stream> shortest(const MachineCode& code, std::size_t begin, IsEnd is_end) {
  std::vector<std::size_t> from(code.instructions.size(), kNowhere);
  std::queue<std::size_t> reached;  // in the order of their distance: each instruction is one step
  from.at(begin) = begin;
  for (reached.push(begin); !reached.empty() && !is_end(reached.front()); reached.pop()) {
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
  if (reached.empty()) return std::nullopt;
  Stream stream;
  for (std::size_t at = reached.front(); at != begin;) {
    at = from[at];
    stream.push_back(&code.instructions[at]);
  }
  std::ranges::reverse(stream);
  return stream;
}

// From `begin` on to the exit; branches are taken where they must be. A loop that ends by an exit, with a branch back
// behind it, is gone through once. Where that leads round and round, because what must be jumped over lies behind a
// branch that need not be taken, it is the shortest way.
Stream fall_through(const MachineCode& code, std::size_t begin) {
  Stream stream;
  std::size_t to_last_exit = 0;
  for (std::size_t at = begin; at < code.instructions.size() && stream.size() <= code.instructions.size();) {
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
  const auto is_exit = [&](std::size_t at) { return code.instructions[at].is("EXIT"); };
  if (begin < code.instructions.size())
    if (const auto way = shortest(code, begin, is_exit)) return *way;
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
  const auto way = shortest(code, 0, [&](std::size_t at) { return at == loop.first; });
  if (!way) throw MachineCodeError("no way leads to the kernel's main loop");
  return *way;
}

Stream path_from(const MachineCode& code, const CodeLoop& loop) { return fall_through(code, loop.last + 1); }

Stream path_through(const MachineCode& code) { return fall_through(code, 0); }

}  // namespace flash_attn_jit
