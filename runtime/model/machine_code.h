// A cubin's instructions, as far as they decide time: which pipe, how many bytes, what waits for what.
//
// An sm_75 instruction is two 64-bit words, low and high:
//   low   0..8 opcode   9..11 its form   12..15 predicate   32.. immediates
//   high  41..44 stall cycles   46..48 scoreboard of the result   49..51 of the operands   52..57 scoreboards waited for
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "generator/errors.h"

namespace flash_attn_jit {

// What issues beside what. kMemory is the queue to the multiprocessor's one load/store unit.
enum class Pipe : std::uint8_t { kTensor, kFma, kAlu, kXu, kFp16, kUniform, kFp64, kControl, kMemory };
inline constexpr int kPipes = 9;
std::string_view to_text(Pipe pipe);

inline constexpr int kInstructionBytes = 16;
inline constexpr int kScoreboards = 6;
inline constexpr int kNoScoreboard = 7;

struct Instruction {
  std::uint32_t address = 0;
  std::string_view name;  // "HMMA"; of what the model does not tell apart "ALU" or "UNIFORM"
  Pipe pipe = Pipe::kAlu;
  int width = 0;  // bytes a lane moves, of memory instructions
  int stall = 0;
  int result_board = kNoScoreboard, operand_board = kNoScoreboard;
  std::uint8_t waits_for = 0;  // a bit for each scoreboard
  bool always = true;          // no predicate guards it
  std::int64_t target = -1;    // BRA: the address it goes to
  int barrier = 0;             // BAR: its number
  bool arrives_only = false;   // BAR.ARV does not wait
  int count = 0;               // BAR: warps it waits for, 0: the block's; DEPBAR: how many may be outstanding
  int counted_board = -1;      // DEPBAR: the scoreboard it looks at

  bool is(std::string_view mnemonic) const { return name == mnemonic; }
};

struct MachineCode {
  int registers = 0;    // a thread
  int static_smem = 0;  // bytes a block
  std::vector<Instruction> instructions;
};

// Not a cubin that can be read.
struct MachineCodeError : Error {
  using Error::Error;
};

Instruction decode(std::uint32_t address, std::uint64_t low, std::uint64_t high);

// The kernel `entry` of a cubin (ELF). Throws MachineCodeError.
MachineCode read_machine_code(std::string_view cubin, std::string_view entry);

}  // namespace flash_attn_jit
