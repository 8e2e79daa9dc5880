// fp16 and bf16 <-> double for tests, by arithmetic on the value, so that it shares nothing with what it checks.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#include "generator/kernel_spec.h"

namespace flash_attn_jit::testing {

// As a double, which is normal for all exponents here. std::ldexp took a quarter of the tests' time.
inline double power_of_two(int exponent) {
  return std::bit_cast<double>(static_cast<std::uint64_t>(exponent + 1023) << 52);
}

// 16 bits: a sign, an exponent, a mantissa.
template <int kMantissaBits>
struct HalfFormat {
  static constexpr int kExponentBits = 15 - kMantissaBits, kMostExponent = (1 << kExponentBits) - 1;
  static constexpr int kLeastExponent = 2 - (1 << (kExponentBits - 1));  // of a normal number
  static constexpr int kOne = 1 << kMantissaBits;                        // steps in a power of two

  static double value_of(std::uint16_t bits) {
    const double sign = bits & 0x8000 ? -1 : 1;
    const int exponent = bits >> kMantissaBits & kMostExponent, mantissa = bits & (kOne - 1);
    if (exponent == kMostExponent) return mantissa ? std::numeric_limits<double>::quiet_NaN() : sign * INFINITY;
    return exponent ? sign * (kOne + mantissa) * power_of_two(exponent - 1 + kLeastExponent - kMantissaBits)
                    : sign * mantissa * power_of_two(kLeastExponent - kMantissaBits);
  }

  // Rounds to nearest even.
  static std::uint16_t bits_of(double value) {
    const std::uint16_t sign = std::signbit(value) ? 0x8000 : 0;
    const double magnitude = std::fabs(value);
    if (std::isnan(value)) return 0x7fff;
    const int exponent = magnitude < power_of_two(kLeastExponent) ? kLeastExponent : std::ilogb(magnitude);
    if (exponent > 1 - kLeastExponent) return sign | kMostExponent << kMantissaBits;
    // kOne to 2 kOne if it is normal; what rounds up to the latter has the next exponent, which may be infinity's.
    const int steps = static_cast<int>(std::nearbyint(magnitude * power_of_two(kMantissaBits - exponent)));
    return static_cast<std::uint16_t>(sign + ((exponent - kLeastExponent) << kMantissaBits) + steps);
  }
};

using Fp16Format = HalfFormat<10>;
using Bf16Format = HalfFormat<7>;

inline double from_fp16(std::uint16_t bits) { return Fp16Format::value_of(bits); }
inline std::uint16_t to_fp16(double value) { return Fp16Format::bits_of(value); }
inline double rounded_to_fp16(double value) { return from_fp16(to_fp16(value)); }

inline double from_stored(DType dtype, std::uint16_t bits) {
  return dtype == DType::kFloat16 ? from_fp16(bits) : Bf16Format::value_of(bits);
}
inline std::uint16_t to_stored(DType dtype, double value) {
  return dtype == DType::kFloat16 ? to_fp16(value) : Bf16Format::bits_of(value);
}
inline double rounded_to(DType dtype, double value) { return from_stored(dtype, to_stored(dtype, value)); }

}  // namespace flash_attn_jit::testing
