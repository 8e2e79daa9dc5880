// fp16 and bf16 <-> double for tests, by arithmetic on the value, so that it shares nothing with what it checks.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "generator/kernel_spec.h"

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

inline double from_bf16(std::uint16_t bits) {
  const double sign = bits & 0x8000 ? -1 : 1;
  const int exponent = bits >> 7 & 255, mantissa = bits & 127;
  if (exponent == 255) return mantissa ? std::numeric_limits<double>::quiet_NaN() : sign * INFINITY;
  return exponent ? sign * std::ldexp(128 + mantissa, exponent - 134) : sign * std::ldexp(mantissa, -133);
}

// Rounds to nearest even.
inline std::uint16_t to_bf16(double value) {
  const std::uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const double magnitude = std::fabs(value);
  if (std::isnan(value)) return 0x7fff;
  if (magnitude >= std::ldexp(511, 119)) return sign | 0x7f80;
  const int exponent = magnitude < std::ldexp(1, -126) ? -126 : std::ilogb(magnitude);
  const int steps = static_cast<int>(std::nearbyint(std::ldexp(magnitude, 7 - exponent)));  // 128 to 256 if normal
  return static_cast<std::uint16_t>(sign + ((exponent + 126) << 7) + steps);
}

inline double from_stored(DType dtype, std::uint16_t bits) {
  return dtype == DType::kFloat16 ? from_fp16(bits) : from_bf16(bits);
}
inline std::uint16_t to_stored(DType dtype, double value) {
  return dtype == DType::kFloat16 ? to_fp16(value) : to_bf16(value);
}
inline double rounded_to(DType dtype, double value) { return from_stored(dtype, to_stored(dtype, value)); }

}  // namespace flash_attn_jit::testing
