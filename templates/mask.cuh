// Hides the keys that a row does not see: beyond the end of the sequence, or above the causal diagonal.
#pragma once

#include "block_info.cuh"
#include "primitives.cuh"

// `row` is the global query row of this lane's row 0 in the warp's first tile, `key` the global key of its element 0.
template <class Traits, int kMTiles, int kNTiles>
__device__ __forceinline__ void apply_mask(float (&acc_s)[kMTiles][kNTiles][4], const BlockInfo<Traits>& block,
                                           int seqlen_k, int row, int key) {
#pragma unroll
  for (int m = 0; m < kMTiles; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int visible = block.visible_keys(row + 16 * m + 8 * half, seqlen_k) - key;
#pragma unroll
      for (int n = 0; n < kNTiles; ++n)
#pragma unroll
        for (int c = 0; c < 2; ++c)
          if (8 * n + c >= visible) acc_s[m][n][2 * half + c] = -infinity();
    }
}
