// The first level of instruction cache of a sub-partition: sets of lines, least recently used out first, and a stream
// buffer that runs ahead of the last miss.
#pragma once

#include <cstdint>
#include <vector>

#include "runtime/model/card.h"

namespace flash_attn_jit {

class InstructionCache {
 public:
  explicit InstructionCache(const MultiprocessorModel& model)
      : model_(model), sets_(static_cast<std::size_t>(model.instruction_sets)) {}

  // The cycle at which the instruction at `address` can be read: `now` if its line is there, else when it arrives.
  std::int64_t ready_at(std::uint32_t address, std::int64_t now);

 private:
  struct Line {
    std::uint32_t number;
    std::int64_t arrival;
  };
  using Lines = std::vector<Line>;  // of a set: the least recently used first

  void refill_stream(std::uint32_t next, std::int64_t arrival);

  const MultiprocessorModel& model_;
  std::vector<Lines> sets_;
  Lines stream_;
};

}  // namespace flash_attn_jit
