// What tensors are made of, 16 bits each, two in a register: Traits::Stored. Products are made of Traits::Element, so
// that what is loaded may have to be converted before it is multiplied, and sums are rounded to what is stored.
//
//   Stored::Bits                                   one as it lies in memory
//   Stored::low(unsigned), high(unsigned) -> float  the halves of a pair, exact
//   Stored::pack(lo, hi) -> unsigned               two floats rounded to nearest even, lo in the low half
//   to_elements<Traits>(unsigned) -> unsigned      a pair that was loaded, as elements
//   to_elements<Traits>(unsigned, factor)          the same, each multiplied by a float
//
// Where the two are one type, nothing is converted, and nothing multiplied. A Conversion says how it is done and not
// what comes out: ptxas schedules a main loop by that.
#pragma once

#include "primitives.cuh"

enum class Conversion {
  kPlain,
  kPermuting,     // the low half moves up as bytes do (PRMT), which is the ALU's work and never the FMA units'
  kLastWordFirst  // of a chunk
};

// The upper half of a float: its range with 8 binary digits. As a float16, which has 11 digits, a number of at least
// 2^-14 stays what it is up to 65504, and beyond becomes that; a smaller one is cut off to a multiple of 2^-24.
struct Bf16 {
  using Bits = unsigned short;

  template <Conversion kHow = Conversion::kPlain>
  static __device__ __forceinline__ float low(unsigned pair) {
    return float_of_bits(kHow == Conversion::kPermuting ? low_halves(0u, pair) : pair << 16);
  }
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

template <class Traits, Conversion kHow = Conversion::kPlain>
__device__ __forceinline__ unsigned to_elements(unsigned pair) {
  using Stored = typename Traits::Stored;
  if constexpr (kConverts<Traits>)
    return Traits::Element::pack_toward_zero(Stored::template low<kHow>(pair), Stored::high(pair));
  return pair;
}
template <class Traits, Conversion kHow = Conversion::kPlain>
__device__ __forceinline__ unsigned to_elements(unsigned pair, float factor) {
  using Stored = typename Traits::Stored;
  if constexpr (kConverts<Traits>)
    return Traits::Element::pack_toward_zero(Stored::template low<kHow>(pair) * factor, Stored::high(pair) * factor);
  return pair;
}

// Of 8 dims. `factor` is nothing, or a float.
template <class Traits, Conversion kHow = Conversion::kPlain, class... Factor>
__device__ __forceinline__ void to_elements(Vec16& chunk, Factor... factor) {
  if constexpr (kConverts<Traits>)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      unsigned& word = chunk.word[kHow == Conversion::kLastWordFirst ? 3 - i : i];
      word = to_elements<Traits, kHow>(word, factor...);
    }
}
