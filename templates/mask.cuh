// Scores of keys that a row does not see become -inf.
#pragma once

#include "accumulator.cuh"
#include "lane_order.cuh"
#include "primitives.cuh"
#include "sequence.cuh"

// `query` and `key` are the lane's first row and column.
template <class Columns, class Traits, int kMTiles, int kNTiles>
__device__ __forceinline__ void apply_mask(Accumulator<kMTiles, kNTiles>& acc_s, const Sequence<Traits>& sequence,
                                           int query, int key) {
#pragma unroll
  for (int r = 0; r < 2 * kMTiles; ++r) {
    const int first = sequence.first_key(query + 8 * r) - key, end = sequence.end_key(query + 8 * r) - key;
#pragma unroll
    for (int n = 0; n < kNTiles; ++n)
#pragma unroll
      for (int c = 0; c < 2; ++c)
        if (const int at = Columns::kStep * n + c; at >= end || (Traits::kIsLocal && at < first))
          acc_s[r / 2][n][r % 2 * 2 + c] = -infinity();
  }
}
