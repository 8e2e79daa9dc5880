// Division by a number that is known before a kernel runs: see Divisor in templates/flash_fwd_params.cuh.
#pragma once

#include <bit>
#include <cstdint>

#include "templates/flash_fwd_params.cuh"

namespace flash_attn_jit {

// By d, 1 to 2^31 - 1. With 2^shift >= d the multiplier is 2^(31 + shift) / d, rounded up: off by less than 2^shift / d
// of its last bit, so that a quotient of a number below 2^31 is off by less than 1 / d and comes out whole.
constexpr Divisor divisor_of(int d) {
  const auto by = static_cast<std::uint64_t>(d);
  const int shift = std::bit_width(by - 1);
  return {static_cast<unsigned>(((std::uint64_t{1} << (31 + shift)) + by - 1) / by), shift};
}

}  // namespace flash_attn_jit
