// Functions of float32 beyond the machine's own approximations, in a few instructions each, without a table and without
// a branch. Errors are of the result, relative but where said; infinities, NaN and the ends of the range come out as
// those of C's functions, but that results below 2^-126 may be 0.
//
//   tanh_of(x)                 2^-21
//   sigmoid_of(x)              2^-21 x the greater of 1 and |x| / 8: 1 / (1 + e^-x)
//   exp_of(x), exp2_of(x)      2^-21
//   log_of(x), log2_of(x), log1p_of(x)   2^-23: the last digit
//   pow_of(x, y)               2^-20 x the greater of 1 and |y| / 16
//   sqrt_of(x), rsqrt_of(x)    2^-23
//   sin_of(x), cos_of(x)       2^-22, absolute, where |x| < 2^20
//   erf_of(x)                  2^-21
//   divide(a, b)               rounded to nearest, as a / b
#pragma once

#include "attention_params.cuh"
#include "primitives.cuh"

constexpr float kLn2 = 0x1.62e43p-1f, kLn2Rest = -0x1.05c61p-29f;  // together ln 2
constexpr float kLog2ERest = 0x1.4ae0cp-26f;                       // with kLog2E log2(e)

// `value`, where it is a number; a correction makes NaN of what is infinite.
__device__ __forceinline__ float number_or(float value, float otherwise) { return is_nan(value) ? otherwise : value; }

// Near 0 the first terms of its series, which the exponential would cancel. The hardware's own is off by up to 2^-11.
__device__ __forceinline__ float tanh_of(float x) {
  const float square = x * x;
  float series = fma_rounded(square, -17.0f / 315, 2.0f / 15);
  series = fma_rounded(square, series, -1.0f / 3);
  series = fma_rounded(square * x, series, x);
  const float by_exponential = fma_rounded(-2.0f, reciprocal(1.0f + exp2_approx(x * (2 * kLog2E))), 1.0f);
  return square < 0.04f ? series : by_exponential;
}

__device__ __forceinline__ float sigmoid_of(float x) { return reciprocal(1.0f + exp2_approx(x * -kLog2E)); }

__device__ __forceinline__ float exp2_of(float x) { return exp2_approx(x); }

// The product's rounding is made good: of a great exponent it is many digits of the result.
__device__ __forceinline__ float exp_of(float x) {
  const float exponent = x * kLog2E;
  const float rest = fma_rounded(x, kLog2ERest, fma_rounded(x, kLog2E, -exponent));
  const float power = exp2_approx(exponent);
  return number_or(fma_rounded(power * kLn2, rest, power), power);
}

// x = 2^exponent (1 + fraction), fraction from sqrt(1/2) - 1 to sqrt(2) - 1, for finite x > 0.
struct BinaryParts {
  float exponent, fraction;
};
__device__ __forceinline__ BinaryParts binary_parts(float x) {
  constexpr unsigned kRootOfHalf = 0x3f3504f3u;
  const bool is_subnormal = x < 0x1p-126f;
  const unsigned bits = bits_of_float(is_subnormal ? x * 0x1p24f : x) - kRootOfHalf;
  const int exponent = static_cast<int>(bits) >> 23;
  const float mantissa = float_of_bits((bits & 0x7fffffu) + kRootOfHalf);
  return {static_cast<float>(is_subnormal ? exponent - 24 : exponent), mantissa - 1.0f};
}

// log(1 + x) of a fraction.
__device__ __forceinline__ float log_of_fraction(float x) {
  float series = fma_rounded(x, -0.07623060792684555f, 0.12905502319335938f);
  series = fma_rounded(x, series, -0.1324298083782196f);
  series = fma_rounded(x, series, 0.14181634783744812f);
  series = fma_rounded(x, series, -0.16609056293964386f);
  series = fma_rounded(x, series, 0.20001985132694244f);
  series = fma_rounded(x, series, -0.25001585483551025f);
  series = fma_rounded(x, series, 0.33333325386047363f);
  series = fma_rounded(x, series, -0.49999988079071045f);
  return fma_rounded(x * x, series, x);
}

// What a logarithm is where x is no finite number above 0.
__device__ __forceinline__ float or_logarithm_of_special(float value, float x) {
  if (x == 0.0f) return -infinity();
  return x > 0.0f && x < infinity() ? value : x < 0.0f ? not_a_number() : x;
}

__device__ __forceinline__ float log_of(float x) {
  const BinaryParts parts = binary_parts(x);
  const float small = fma_rounded(parts.exponent, kLn2Rest, log_of_fraction(parts.fraction));
  return or_logarithm_of_special(fma_rounded(parts.exponent, kLn2, small), x);
}

__device__ __forceinline__ float log2_of(float x) {
  const BinaryParts parts = binary_parts(x);
  const float natural = log_of_fraction(parts.fraction);
  const float small = fma_rounded(natural, kLog2E, natural * kLog2ERest);
  return or_logarithm_of_special(parts.exponent + small, x);
}

// The logarithm of the rounded sum, and what the rounding took.
__device__ __forceinline__ float log1p_of(float x) {
  const float sum = 1.0f + x;
  const float taken = x - (sum - 1.0f);
  const float log = log_of(sum);
  return number_or(fma_rounded(taken, reciprocal(sum), log), log);
}

__device__ __forceinline__ float divide(float a, float b) {
  // The reciprocal of what is greater may be 0, of what is less infinite.
  const float magnitude = absolute(b);
  const float scale = magnitude > 0x1p100f ? 0x1p-64f : magnitude < 0x1p-100f ? 0x1p64f : 1.0f;
  const float divisor = b * scale;
  const float estimate = reciprocal(divisor);
  const float inverse = fma_rounded(fma_rounded(-divisor, estimate, 1.0f), estimate, estimate);
  const float quotient = a * inverse;
  const float rounded = fma_rounded(fma_rounded(-divisor, quotient, a), inverse, quotient);
  return number_or(rounded, a * estimate) * scale;
}

__device__ __forceinline__ float sqrt_of(float x) {
  const float root = sqrt_approx(x);
  const float rest = fma_rounded(-root, root, x);
  return number_or(fma_rounded(rest * 0.5f, reciprocal(root), root), root);
}

__device__ __forceinline__ float rsqrt_of(float x) {
  const float root = rsqrt_approx(x);
  const float rest = fma_rounded(-root * x, root, 1.0f);
  return number_or(fma_rounded(root * 0.5f, rest, root), root);
}

// 2^(y log2 |x|), the exponent in two parts.
__device__ __forceinline__ float pow_of(float x, float y) {
  const float base = absolute(x);
  const BinaryParts parts = binary_parts(base);
  const float natural = log_of_fraction(parts.fraction);
  const float small = fma_rounded(natural, kLog2E, natural * kLog2ERest);
  const float log = parts.exponent + small, rest_of_log = small - (log - parts.exponent);
  const bool is_ordinary = base > 0.0f && base < infinity();
  const float whole_log = is_ordinary ? log : base == 0.0f ? -infinity() : base;
  const float exponent = y * whole_log;
  const float rest = fma_rounded(y, rest_of_log, fma_rounded(y, whole_log, -exponent));
  const float power = exp2_approx(exponent);
  const float magnitude = y == 0.0f || x == 1.0f ? 1.0f : number_or(fma_rounded(power * kLn2, rest, power), power);
  const bool is_whole = round_to_zero(y) == y, is_odd = is_whole && round_to_zero(y * 0.5f) != y * 0.5f;
  if (bits_of_float(x) >> 31 == 0) return magnitude;
  return is_odd ? -magnitude : is_whole || base == 0.0f || base == infinity() ? magnitude : not_a_number();
}

// x = quarter x pi/2 + rest, pi/2 in three parts.
struct QuarterTurns {
  int quarter;
  float rest;
};
__device__ __forceinline__ QuarterTurns quarter_turns(float x) {
  const float turns = round_to_even(x * 0.636619772f);
  float rest = fma_rounded(turns, -0x1.921fb6p+0f, x);
  rest = fma_rounded(turns, 0x1.777a5cp-25f, rest);
  rest = fma_rounded(turns, 0x1.ee59dap-50f, rest);
  return {to_int(turns), rest};
}

__device__ __forceinline__ float sine_of_turns(QuarterTurns turns) {
  const float x = turns.rest, square = x * x;
  float sine = fma_rounded(square, -0.00019368990615475923f, 0.008330872282385826f);
  sine = fma_rounded(square, sine, -0.16666629910469055f);
  sine = fma_rounded(square * x, sine, x);
  float cosine = fma_rounded(square, 2.4272021619253792e-05f, -0.0013885647058486938f);
  cosine = fma_rounded(square, cosine, 0.041666604578495026f);
  cosine = fma_rounded(square * square, cosine, fma_rounded(square, -0.5f, 1.0f));
  const float value = (turns.quarter & 1) != 0 ? cosine : sine;
  return (turns.quarter & 2) != 0 ? -value : value;
}

__device__ __forceinline__ float sin_of(float x) { return sine_of_turns(quarter_turns(x)); }

__device__ __forceinline__ float cos_of(float x) {
  QuarterTurns turns = quarter_turns(x);
  turns.quarter = (turns.quarter & 3) + 1;
  return sine_of_turns(turns);
}

// Up to 1 a series, beyond it 1 - 2^-polynomial; 1 from 4 on.
__device__ __forceinline__ float erf_of(float x) {
  const float magnitude = absolute(x), square = x * x;
  float series = fma_rounded(square, 7.853857823647559e-05f, -0.0008010192541405559f);
  series = fma_rounded(square, series, 0.005188327748328447f);
  series = fma_rounded(square, series, -0.026853810995817184f);
  series = fma_rounded(square, series, 0.1128358542919159f);
  series = fma_rounded(square, series, -0.3761262595653534f);
  series = fma_rounded(square, series, 1.1283791065216064f);
  const float bounded = magnitude > 4.0f ? 4.0f : magnitude;
  float exponent = fma_rounded(bounded, 0.0002688896202016622f, -0.004252584185451269f);
  exponent = fma_rounded(bounded, exponent, 0.03150571510195732f);
  exponent = fma_rounded(bounded, exponent, -0.14875170588493347f);
  exponent = fma_rounded(bounded, exponent, -0.9206482768058777f);
  exponent = fma_rounded(bounded, exponent, -1.626046061515808f);
  exponent = fma_rounded(bounded, exponent, -0.0004926985129714012f);
  const float tail = 1.0f - exp2_approx(exponent);
  return magnitude < 1.0f ? series * x : x < 0.0f ? -tail : tail;
}
