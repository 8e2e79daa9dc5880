// Operators as Python and torch have them, where C++ differs: // and % round down, integers wrap, shifts go as far as
// one likes, a maximum with NaN is NaN.
#pragma once

#include "primitives.cuh"
#include "transcendental.cuh"

// ---- integers: int and long long ----

__device__ __forceinline__ int add_wrapped(int a, int b) {
  return static_cast<int>(static_cast<unsigned>(a) + static_cast<unsigned>(b));
}
__device__ __forceinline__ long long add_wrapped(long long a, long long b) {
  return static_cast<long long>(static_cast<unsigned long long>(a) + static_cast<unsigned long long>(b));
}
__device__ __forceinline__ int subtract_wrapped(int a, int b) {
  return static_cast<int>(static_cast<unsigned>(a) - static_cast<unsigned>(b));
}
__device__ __forceinline__ long long subtract_wrapped(long long a, long long b) {
  return static_cast<long long>(static_cast<unsigned long long>(a) - static_cast<unsigned long long>(b));
}
__device__ __forceinline__ int multiply_wrapped(int a, int b) {
  return static_cast<int>(static_cast<unsigned>(a) * static_cast<unsigned>(b));
}
__device__ __forceinline__ long long multiply_wrapped(long long a, long long b) {
  return static_cast<long long>(static_cast<unsigned long long>(a) * static_cast<unsigned long long>(b));
}
template <class Int>
__device__ __forceinline__ Int negate_wrapped(Int a) {
  return subtract_wrapped(Int{0}, a);
}

// By 0: 0, where Python raises; rows beyond a sequence's end may come to that.
template <class Int>
__device__ __forceinline__ Int truncated_quotient(Int a, Int b) {
  return b == 0 ? 0 : b == -1 ? negate_wrapped(a) : a / b;
}
template <class Int>
__device__ __forceinline__ Int truncated_remainder(Int a, Int b) {
  return b == 0 || b == -1 ? 0 : a % b;
}
template <class Int>
__device__ __forceinline__ Int floor_quotient(Int a, Int b) {
  const Int rest = truncated_remainder(a, b);
  return truncated_quotient(a, b) - (rest != 0 && (rest < 0) != (b < 0) ? 1 : 0);
}
template <class Int>
__device__ __forceinline__ Int floor_remainder(Int a, Int b) {
  const Int rest = truncated_remainder(a, b);
  return rest != 0 && (rest < 0) != (b < 0) ? rest + b : rest;
}

// By less than 0 or by all bits and more: 0 to the left, the sign's to the right.
__device__ __forceinline__ int shift_left(int a, int b) {
  return b < 0 || b > 31 ? 0 : static_cast<int>(static_cast<unsigned>(a) << b);
}
__device__ __forceinline__ long long shift_left(long long a, long long b) {
  return b < 0 || b > 63 ? 0 : static_cast<long long>(static_cast<unsigned long long>(a) << b);
}
template <class Int>
__device__ __forceinline__ Int shift_right(Int a, Int b) {
  constexpr int kMost = 8 * sizeof(Int) - 1;
  return a >> (b < 0 || b > kMost ? kMost : b);
}

// ---- floats ----

__device__ __forceinline__ float maximum_or_nan(float a, float b) { return a < b || is_nan(b) ? b : a; }
__device__ __forceinline__ float minimum_or_nan(float a, float b) { return b < a || is_nan(b) ? b : a; }

__device__ __forceinline__ float sign_of(float x) { return x > 0.0f ? 1.0f : x < 0.0f ? -1.0f : 0.0f; }

// a - whole x b, exact where whole is below 2^24. Nothing of an infinite b is taken.
__device__ __forceinline__ float rest_of(float a, float whole, float b) {
  return whole == 0.0f ? a : fma_rounded(-whole, b, a);
}

// A quotient just below a whole number may have been rounded to that: the rest tells.
__device__ __forceinline__ float floor_quotient(float a, float b) {
  const float whole = round_down(divide(a, b)), rest = rest_of(a, whole, b);
  return rest != 0.0f && (rest < 0.0f) != (b < 0.0f) ? whole - 1.0f : whole;
}
__device__ __forceinline__ float floor_remainder(float a, float b) {
  const float rest = rest_of(a, round_down(divide(a, b)), b);
  return rest != 0.0f && (rest < 0.0f) != (b < 0.0f) ? rest + b : rest;
}
__device__ __forceinline__ float truncated_remainder(float a, float b) {
  const float rest = rest_of(a, round_to_zero(divide(a, b)), b);
  return rest != 0.0f && (rest < 0.0f) != (a < 0.0f) ? (a < 0.0f ? rest - absolute(b) : rest + absolute(b)) : rest;
}
