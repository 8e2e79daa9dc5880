#include "runtime/model/machine_code.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <optional>

namespace flash_attn_jit {
namespace {

struct Opcode {
  int bits;  // the low 9 of the instruction
  std::string_view name;
  Pipe pipe;
};

// What the model tells apart, in the order of the opcodes; all else runs on the ALU.
constexpr std::array kOpcodes = {
    Opcode{0x020, "FMUL", Pipe::kFma},     Opcode{0x021, "FADD", Pipe::kFma},
    Opcode{0x022, "FSWZADD", Pipe::kFma},  Opcode{0x023, "FFMA", Pipe::kFma},
    Opcode{0x024, "IMAD", Pipe::kFma},     Opcode{0x025, "IMAD", Pipe::kFma},
    Opcode{0x026, "IDP", Pipe::kFma},      Opcode{0x027, "IMAD", Pipe::kFma},
    Opcode{0x028, "DMUL", Pipe::kFp64},    Opcode{0x029, "DADD", Pipe::kFp64},
    Opcode{0x02a, "DSETP", Pipe::kFp64},   Opcode{0x02b, "DFMA", Pipe::kFp64},
    Opcode{0x030, "HADD2", Pipe::kFp16},   Opcode{0x031, "HFMA2", Pipe::kFp16},
    Opcode{0x032, "HMUL2", Pipe::kFp16},   Opcode{0x033, "HSET2", Pipe::kFp16},
    Opcode{0x034, "HSETP2", Pipe::kFp16},  Opcode{0x036, "HMMA884", Pipe::kTensor},
    Opcode{0x037, "IMMA", Pipe::kTensor},  Opcode{0x03a, "MOVM", Pipe::kMemory},
    Opcode{0x03b, "LDSM", Pipe::kMemory},  Opcode{0x03c, "HMMA", Pipe::kTensor},
    Opcode{0x03d, "BMMA", Pipe::kTensor},  Opcode{0x100, "FLO", Pipe::kXu},
    Opcode{0x101, "BREV", Pipe::kXu},      Opcode{0x104, "F2F", Pipe::kXu},
    Opcode{0x105, "F2I", Pipe::kXu},       Opcode{0x106, "I2F", Pipe::kXu},
    Opcode{0x107, "FRND", Pipe::kXu},      Opcode{0x108, "MUFU", Pipe::kXu},
    Opcode{0x109, "POPC", Pipe::kXu},      Opcode{0x110, "F2F64", Pipe::kFp64},
    Opcode{0x111, "F2F64", Pipe::kFp64},   Opcode{0x112, "F2F64", Pipe::kFp64},
    Opcode{0x113, "F2F64", Pipe::kFp64},   Opcode{0x118, "NOP", Pipe::kControl},
    Opcode{0x119, "S2R", Pipe::kMemory},   Opcode{0x11a, "DEPBAR", Pipe::kControl},
    Opcode{0x11d, "BAR", Pipe::kControl},  Opcode{0x141, "BSYNC", Pipe::kControl},
    Opcode{0x143, "CALL", Pipe::kControl}, Opcode{0x144, "CALL", Pipe::kControl},
    Opcode{0x145, "BSSY", Pipe::kControl}, Opcode{0x146, "YIELD", Pipe::kControl},
    Opcode{0x147, "BRA", Pipe::kControl},  Opcode{0x148, "WARPSYNC", Pipe::kControl},
    Opcode{0x14d, "EXIT", Pipe::kControl}, Opcode{0x150, "RET", Pipe::kControl},
    Opcode{0x155, "BMOV", Pipe::kControl}, Opcode{0x156, "BMOV", Pipe::kControl},
    Opcode{0x180, "LD", Pipe::kMemory},    Opcode{0x181, "LDG", Pipe::kMemory},
    Opcode{0x182, "LDC", Pipe::kMemory},   Opcode{0x183, "LDL", Pipe::kMemory},
    Opcode{0x184, "LDS", Pipe::kMemory},   Opcode{0x185, "ST", Pipe::kMemory},
    Opcode{0x186, "STG", Pipe::kMemory},   Opcode{0x187, "STL", Pipe::kMemory},
    Opcode{0x188, "STS", Pipe::kMemory},   Opcode{0x189, "SHFL", Pipe::kMemory},
    Opcode{0x18a, "ATOM", Pipe::kMemory},  Opcode{0x18b, "ATOM", Pipe::kMemory},
    Opcode{0x18c, "ATOMS", Pipe::kMemory}, Opcode{0x18d, "ATOMS", Pipe::kMemory},
    Opcode{0x18e, "RED", Pipe::kMemory},   Opcode{0x192, "MEMBAR", Pipe::kControl},
    Opcode{0x1a8, "ATOMG", Pipe::kMemory}, Opcode{0x1a9, "ATOMG", Pipe::kMemory},
    Opcode{0x1c3, "S2R", Pipe::kMemory},
};
static_assert(std::ranges::is_sorted(kOpcodes, {}, &Opcode::bits));

constexpr std::uint64_t bits(std::uint64_t word, int from, int count) {
  return word >> from & ((std::uint64_t{1} << count) - 1);
}

Opcode find_opcode(int code) {
  const auto found = std::ranges::lower_bound(kOpcodes, code, {}, &Opcode::bits);
  if (found != kOpcodes.end() && found->bits == code) return *found;
  const bool uniform = (code >= 0x80 && code < 0xc0) || code == 0x1c2;
  return uniform ? Opcode{code, "UNIFORM", Pipe::kUniform} : Opcode{code, "ALU", Pipe::kAlu};
}

int width_of(std::string_view name, std::uint64_t high) {
  if (name == "LDSM") return 4 << bits(high, 8, 2);
  constexpr std::array kWithWidth = {"LDS", "STS", "LDG", "STG", "LD", "ST", "LDL", "STL", "ATOMS"};
  if (std::ranges::find(kWithWidth, name) == kWithWidth.end()) return 0;
  constexpr std::array kWidths = {1, 1, 2, 2, 4, 8, 16, 16};
  return kWidths[bits(high, 9, 3)];
}

void decode_branch(Instruction& branch, std::uint64_t low, std::uint64_t high) {
  std::int64_t words = static_cast<std::int64_t>(bits(low, 34, 30) | bits(high, 0, 18) << 30);
  if (bits(high, 17, 1) != 0) words -= std::int64_t{1} << 48;
  branch.target = branch.address + kInstructionBytes + words * 4;
  const bool diverges = bits(low, 32, 2) == 2;  // BRA.DIV
  branch.always = branch.always && bits(high, 23, 4) == 7 && !diverges;
}

void decode_barrier(Instruction& barrier, std::uint64_t low, std::uint64_t high) {
  if (bits(low, 0, 12) != 0xb1d) return;  // its number and count are immediates in this form alone
  barrier.barrier = static_cast<int>(bits(low, 54, 4));
  barrier.count = static_cast<int>(bits(low, 42, 12)) / 32;
  barrier.arrives_only = bits(high, 13, 1) != 0;
}

void decode_dependency(Instruction& wait, std::uint64_t low) {
  wait.counted_board = static_cast<int>(bits(low, 44, 3));
  wait.count = static_cast<int>(bits(low, 38, 6));
  wait.waits_for |= static_cast<std::uint8_t>(bits(low, 32, 6));
}

// ---- ELF: the 64-bit little-endian form, as far as it is needed ----

class Elf {
 public:
  explicit Elf(std::string_view image) : image_(image) {
    if (!image.starts_with("\x7f"
                           "ELF") ||
        image.size() < 64)
      throw MachineCodeError("this is not a cubin: it does not begin as an ELF file does");
    const auto offset = read<std::uint64_t>(40);
    const auto size = read<std::uint16_t>(58), count = read<std::uint16_t>(60), names = read<std::uint16_t>(62);
    for (std::uint64_t i = 0; i < count; ++i) sections_.push_back(read<Section>(offset + i * size));
    if (names >= sections_.size()) throw MachineCodeError("the cubin has no table of names");
    names_ = content(sections_[names]);
  }

  struct Section {
    std::uint32_t name, type;
    std::uint64_t flags, address, offset, size;
    std::uint32_t link, info;
    std::uint64_t alignment, entry_size;
  };

  std::optional<Section> find(const std::string& name) const {
    for (const Section& section : sections_)
      if (name_of(section) == name) return section;
    return std::nullopt;
  }

  std::string_view content(const Section& section) const {
    if (section.offset > image_.size() || section.size > image_.size() - section.offset)
      throw MachineCodeError("a section of the cubin lies beyond its end");
    return image_.substr(section.offset, section.size);
  }

 private:
  template <class T>
  T read(std::uint64_t offset) const {
    if (offset > image_.size() || sizeof(T) > image_.size() - offset)
      throw MachineCodeError("the cubin ends within its tables");
    T value;
    std::memcpy(&value, image_.data() + offset, sizeof value);
    return value;
  }

  std::string_view name_of(const Section& section) const {
    if (section.name >= names_.size()) return {};
    const std::string_view rest = names_.substr(section.name);
    return rest.substr(0, std::min(rest.find('\0'), rest.size()));
  }

  std::string_view image_;
  std::vector<Section> sections_;
  std::string_view names_;
};

}  // namespace

std::string_view to_text(Pipe pipe) {
  constexpr std::array<std::string_view, kPipes> kNames = {"tensor",  "fma",  "alu",     "xu",    "fp16",
                                                           "uniform", "fp64", "control", "memory"};
  return kNames[static_cast<std::size_t>(pipe)];
}

Instruction decode(std::uint32_t address, std::uint64_t low, std::uint64_t high) {
  const Opcode opcode = find_opcode(static_cast<int>(bits(low, 0, 9)));
  Instruction instruction{.address = address, .name = opcode.name, .pipe = opcode.pipe};
  instruction.width = width_of(opcode.name, high);
  instruction.stall = static_cast<int>(bits(high, 41, 4));
  instruction.result_board = static_cast<int>(bits(high, 46, 3));
  instruction.operand_board = static_cast<int>(bits(high, 49, 3));
  instruction.waits_for = static_cast<std::uint8_t>(bits(high, 52, 6));
  instruction.always = bits(low, 12, 4) == 7;
  if (instruction.is("BRA")) decode_branch(instruction, low, high);
  if (instruction.is("BAR")) decode_barrier(instruction, low, high);
  if (instruction.is("DEPBAR")) decode_dependency(instruction, low);
  return instruction;
}

MachineCode read_machine_code(std::string_view cubin, std::string_view entry) {
  const Elf elf(cubin);
  const auto text = elf.find(".text." + std::string(entry));
  if (!text) throw MachineCodeError("the cubin has no kernel '" + std::string(entry) + "'");
  MachineCode code;
  code.registers = static_cast<int>(text->info >> 24);
  if (const auto shared = elf.find(".nv.shared." + std::string(entry)))
    code.static_smem = static_cast<int>(shared->size);
  const std::string_view bytes = elf.content(*text);
  code.instructions.reserve(bytes.size() / kInstructionBytes);
  for (std::size_t at = 0; at + kInstructionBytes <= bytes.size(); at += kInstructionBytes) {
    std::uint64_t words[2];
    std::memcpy(words, bytes.data() + at, sizeof words);
    code.instructions.push_back(decode(static_cast<std::uint32_t>(at), words[0], words[1]));
  }
  return code;
}

}  // namespace flash_attn_jit
