// Scores of keys that a row does not see become -inf.
//
// `row` is the query of this lane's row 0 in the warp's first tile, `key` the key of its element 0.
#pragma once

#include "primitives.cuh"
#include "sequence.cuh"

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
