// Which pairs dropout keeps, as templates/dropout.cuh has it, for what is computed on the host.
#pragma once

#include <array>
#include <cstdint>

namespace flash_attn_jit {

// Philox4x32 of 7 rounds: the 128 bits of a counter.
std::array<std::uint32_t, 4> philox(std::array<std::uint32_t, 4> counter, std::array<std::uint32_t, 2> key);

struct DropoutBits {
  std::array<std::uint32_t, 2> seed;
  int kept;  // of 65536

  DropoutBits(const void* seed, double p);  // 8 bytes

  // Whether query i keeps key j, of head `batch_head`: batch entry (or sequence) x heads + head.
  bool keep(std::int64_t batch_head, std::int64_t i, std::int64_t j) const;
  double scale() const { return 65536.0 / kept; }  // of what is kept
};

}  // namespace flash_attn_jit
