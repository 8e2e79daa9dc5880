// The way out of one warp's accumulators: rounded to what is stored and written through shared memory, a few dims at a
// time, so that whole 32-byte sectors of global memory are written.
#pragma once

#include "accumulator.cuh"
#include "primitives.cuh"
#include "tile_copy.cuh"

template <class Traits, int kRows, int kDims>
struct RowOutput {
  static constexpr int kMTiles = kRows / 16;
  static constexpr int kStagingDims = kDims % 32 == 0 ? 32 : 16;
  static constexpr int kStagingBytes = kRows * row_pitch(kStagingDims);  // of a warp

  // Rows [0, rows) of `acc` to dims [first_dim, first_dim + kDims) of the
  // rows from `base` on. A lane's row r is multiplied by factor[r]; `Order` is which one that is.
  template <class Order>
  static __device__ __forceinline__ void write(const Accumulator<kMTiles, kDims / 8>& acc,
                                               const float (&factor)[2 * kMTiles], typename Traits::Stored::Bits* base,
                                               long long row_stride, int rows, int first_dim, SharedAddress staging,
                                               int lane) {
    const SharedAddress lane_staging =
        staging + Order::first(lane) * row_pitch(kStagingDims) + lane_column(lane) * kElementBytes;
#pragma unroll
    for (int dim = 0; dim < kDims; dim += kStagingDims) {
      const bool is_half = kDims % 16 != 0 && dim + kStagingDims > kDims;  // the last 8 dims
#pragma unroll
      for (int r = 0; r < 2 * kMTiles; ++r)
#pragma unroll
        for (int d = 0; d < (is_half ? 1 : kStagingDims / 8); ++d) {
          const float* pair = &acc[r / 2][dim / 8 + d][r % 2 * 2];
          store_shared_4B(lane_staging + Order::kStep * r * row_pitch(kStagingDims) + d * kChunkBytes,
                          Traits::Stored::pack(pair[0] * factor[r], pair[1] * factor[r]));
        }
      warp_barrier();
      if (is_half)
        WarpRows<Traits, kRows, 8>::write_back(base, row_stride, rows, first_dim + dim, staging,
                                               row_pitch(kStagingDims), lane);
      else
        WarpRows<Traits, kRows, kStagingDims>::write_back(base, row_stride, rows, first_dim + dim, staging,
                                                          row_pitch(kStagingDims), lane);
      warp_barrier();
    }
  }
};
