// delta, for every query row, and its peak (see row_delta.cuh).
//
// Rows of all sequences are alike here: varlen tensors come as one sequence of total_q rows.
//
// A block has kBlockM rows of one head, a warp 16 or 32 of them.
#pragma once

#include "flash_bwd_params.cuh"
#include "primitives.cuh"
#include "row_delta.cuh"
#include "tile_copy.cuh"

template <class Traits>
__device__ __forceinline__ void flash_bwd_preprocess(const FlashBwdParams& params) {
  using Bits = typename Traits::Stored::Bits;
  constexpr int kRowsPerWarp = Traits::kBlockM / Traits::kNWarps;
  const int batch_head = block_in_grid() / params.num_row_blocks;
  const int head = batch_head % params.num_heads, batch = batch_head / params.num_heads;
  const auto matrix = [&](const void* tensor, const TensorStrides& strides, long long dim_stride) {
    const Bits* base = static_cast<const Bits*>(tensor) + batch * strides.batch + head * strides.head;
    return GlobalMatrix<typename Traits::Stored>{base, strides.row, dim_stride};
  };
  const auto out = matrix(params.out, params.out_strides, 1);
  const auto dout = matrix(params.dout, params.dout_strides, params.dout_dim_stride);
  const long long statistics = (static_cast<long long>(batch) * params.num_heads + head) * params.seqlen_q;
  const float* const dlse = params.dlse != nullptr ? params.dlse + statistics : nullptr;
  const int row = block_in_grid() % params.num_row_blocks * Traits::kBlockM + thread_in_block() / 32 * kRowsPerWarp;
#pragma unroll 4
  for (int i = 0; i < kRowsPerWarp; i += RowDelta<Traits>::kRowsAtOnce)
    RowDelta<Traits>::write(out, dout, row + i, params.seqlen_q, thread_in_block() % 32,
                            params.softmax_lse + statistics, dlse, params.delta + statistics,
                            {params.peaks + statistics, params.softmax_scale});
}
