// What tensors are made of, 16 bits each, two in a register: Traits::Stored. Products are made of Traits::Element, so
// that what is loaded may have to be converted before it is multiplied, and sums are rounded to what is stored.
//
//   Stored::Bits                                   one as it lies in memory
//   Stored::low(unsigned), high(unsigned) -> float  the halves of a pair, exact
//   Stored::pack(lo, hi) -> unsigned               two floats rounded to nearest even, lo in the low half
//   to_elements<Traits>(unsigned) -> unsigned      a pair that was loaded, as elements
//   to_elements<Traits>(unsigned, factor)          the same, each multiplied by a float
//
// Where the two are one type, nothing is converted, and nothing multiplied.
#pragma once

#include "primitives.cuh"

// The upper half of a float: its range with 8 binary digits. As a float16, which has 11 digits, a number of at least
// 2^-14 stays what it is up to 65504, and beyond becomes that; a smaller one is cut off to a multiple of 2^-24.
struct Bf16 {
  using Bits = unsigned short;

  static __device__ __forceinline__ float low(unsigned pair) { return float_of_bits(pair << 16); }
  static __device__ __forceinline__ float high(unsigned pair) { return float_of_bits(pair & 0xffff0000u); }
  static __device__ __forceinline__ unsigned pack(float lo, float hi) { return high_halves(rounded(lo), rounded(hi)); }

 private:
  // In the upper half; a NaN has no rounding that it might lose itself in.
  static __device__ __forceinline__ unsigned rounded(float x) {
    const unsigned bits = bits_of_float(x);
    return is_nan(x) ? 0x7fff0000u : bits + 0x7fffu + (bits >> 16 & 1u);
  }
};

template <class One, class Other>
constexpr bool kIsSame = false;
template <class One>
constexpr bool kIsSame<One, One> = true;

template <class Traits>
constexpr bool kConverts = !kIsSame<typename Traits::Stored, typename Traits::Element>;

template <class Traits>
__device__ __forceinline__ unsigned to_elements(unsigned pair) {
  if constexpr (kConverts<Traits>)
    return Traits::Element::pack_toward_zero(Traits::Stored::low(pair), Traits::Stored::high(pair));
  return pair;
}
template <class Traits>
__device__ __forceinline__ unsigned to_elements(unsigned pair, float factor) {
  if constexpr (kConverts<Traits>)
    return Traits::Element::pack_toward_zero(Traits::Stored::low(pair) * factor, Traits::Stored::high(pair) * factor);
  return pair;
}

// Of 8 dims. `factor` is nothing, or a float.
template <class Traits, class... Factor>
__device__ __forceinline__ void to_elements(Vec16& chunk, Factor... factor) {
  if constexpr (kConverts<Traits>)
#pragma unroll
    for (int i = 0; i < 4; ++i) chunk.word[i] = to_elements<Traits>(chunk.word[i], factor...);
}
