// What happens to raw scores before the softmax: softcap, the ALiBi bias, and keys that a row does not see.
//
// `row` is the query of this lane's row 0 in the warp's first tile, `key` the key of its element 0.
#pragma once

#include "primitives.cuh"
#include "sequence.cuh"

// tanh, to about 2^-21 of its value, where the hardware's own approximation is off by up to 2^-11: near 0 the first terms
// of its series, which the exponential would cancel.
__device__ __forceinline__ float tanh_of(float x) {
  constexpr float kTwoLog2E = 2.88539008177792682f;
  const float square = x * x;
  float series = fma_rounded(square, -17.0f / 315, 2.0f / 15);
  series = fma_rounded(square, series, -1.0f / 3);
  series = fma_rounded(square * x, series, x);
  const float by_exponential = fma_rounded(-2.0f, reciprocal(1.0f + exp2_approx(x * kTwoLog2E)), 1.0f);
  return square < 0.04f ? series : by_exponential;
}

// Scores become tanh of what they are scaled to; softmax_scale_log2 carries the cap.
template <int kMTiles, int kNTiles>
__device__ __forceinline__ void apply_softcap(float (&acc_s)[kMTiles][kNTiles][4], float softcap_scale) {
#pragma unroll
  for (int m = 0; m < kMTiles; ++m)
#pragma unroll
    for (int n = 0; n < kNTiles; ++n)
#pragma unroll
      for (int c = 0; c < 4; ++c) acc_s[m][n][c] = tanh_of(acc_s[m][n][c] * softcap_scale);
}

// How far a key lies from a query's place on the diagonal, on either side.
template <class Traits>
__device__ __forceinline__ float alibi_distance(const Sequence<Traits>& sequence, int query, int key) {
  const int distance = query + sequence.diagonal() - key;
  return static_cast<float>(distance < 0 ? -distance : distance);
}

// `slope` is in units of a raw score.
template <class Traits, int kMTiles, int kNTiles>
__device__ __forceinline__ void apply_alibi(float (&acc_s)[kMTiles][kNTiles][4], const Sequence<Traits>& sequence,
                                            float slope, int row, int key) {
#pragma unroll
  for (int m = 0; m < kMTiles; ++m)
#pragma unroll
    for (int n = 0; n < kNTiles; ++n)
#pragma unroll
      for (int c = 0; c < 4; ++c)
        acc_s[m][n][c] = fma_rounded(
            -slope, alibi_distance(sequence, row + 16 * m + c / 2 * 8, key + 8 * n + c % 2), acc_s[m][n][c]);
}

template <class Traits, int kMTiles, int kNTiles>
__device__ __forceinline__ void apply_mask(float (&acc_s)[kMTiles][kNTiles][4], const Sequence<Traits>& sequence,
                                           int row, int key) {
#pragma unroll
  for (int m = 0; m < kMTiles; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int query = row + 16 * m + 8 * half;
      const int first = sequence.first_key(query) - key, end = sequence.end_key(query) - key;
#pragma unroll
      for (int n = 0; n < kNTiles; ++n)
#pragma unroll
        for (int c = 0; c < 2; ++c)
          if (8 * n + c >= end || (Traits::kIsLocal && 8 * n + c < first)) acc_s[m][n][2 * half + c] = -infinity();
    }
}
