// fp16 <-> double for tests, by arithmetic on the value, so that it shares nothing with what it checks.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

namespace flash_attn_jit::testing {

inline double from_fp16(std::uint16_t bits) {
  const double sign = bits & 0x8000 ? -1 : 1;
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  if (exponent == 31) return mantissa ? std::numeric_limits<double>::quiet_NaN() : sign * INFINITY;
  return exponent ? sign * std::ldexp(1024 + mantissa, exponent - 25) : sign * std::ldexp(mantissa, -24);
}

// Rounds to nearest even.
inline std::uint16_t to_fp16(double value) {
  const std::uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const double magnitude = std::fabs(value);
  if (std::isnan(value)) return 0x7fff;
  if (magnitude >= 65520) return sign | 0x7c00;
  const int exponent = magnitude < std::ldexp(1, -14) ? -14 : std::ilogb(magnitude);
  const int steps = static_cast<int>(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));  // 1024 to 2048 if normal
  return static_cast<std::uint16_t>(sign + ((exponent + 14) << 10) + steps);
}

inline double rounded_to_fp16(double value) { return from_fp16(to_fp16(value)); }

}  // namespace flash_attn_jit::testing
