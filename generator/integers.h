// Integer arithmetic that several files need.
#pragma once

#include <cstdint>

namespace flash_attn_jit {

constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

}  // namespace flash_attn_jit
