// The splits of flash_decode.cuh, put together: a warp has a row.
//
// Rows of all sequences are alike here: varlen tensors come as one sequence of total_q rows.
#pragma once

#include "flash_decode_params.cuh"
#include "primitives.cuh"
#include "row_parts.cuh"
#include "sink.cuh"
#include "tile_copy.cuh"

template <class Traits>
class FlashDecodeCombine {
  using Stored = typename Traits::Stored;
  using Bits = typename Stored::Bits;

 public:
  __device__ __forceinline__ FlashDecodeCombine(const FlashDecodeParams& params, int row, int lane)
      : params_(params), row_(row), lane_(lane) {}

  __device__ __forceinline__ void run() const {
    RowPart all = whole_row();
    // The parts' O are weighed by the maximum that it may raise.
    if constexpr (Traits::kHasSink) add_sink(all, params_.sinks, row_ / params_.seqlen_q % params_.num_heads);
    if (lane_ == 0) store_global_f32(params_.softmax_lse + row_, log_sum_exp(all));
    for (int dim = lane_ * kChunkDims; dim < Traits::kTileDims; dim += 32 * kChunkDims) write_dims(dim, all);
  }

 private:
  __device__ __forceinline__ long long place_of(int split) const {
    return static_cast<long long>(split) * params_.total_rows + row_;
  }
  __device__ __forceinline__ RowPart part(int split) const {
    const float* const at = params_.partial_rows + 2 * place_of(split);
    return {load_global_f32(at), load_global_f32(at + 1)};
  }

  // Each lane has some of the splits.
  __device__ __forceinline__ RowPart whole_row() const {
    RowPart all{-infinity(), 0.0f};
    for (int split = lane_; split < params_.num_splits; split += 32)
      all.row_max = max_ignoring_nan(all.row_max, part(split).row_max);
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2)
      all.row_max = max_ignoring_nan(all.row_max, shuffle_xor(all.row_max, distance));
    if (!sees_keys(all)) return all;
    for (int split = lane_; split < params_.num_splits; split += 32) {
      const RowPart one = part(split);
      all.row_sum = fma_rounded(one.row_sum, weight_of(one, all.row_max), all.row_sum);
    }
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) all.row_sum += shuffle_xor(all.row_sum, distance);
    return all;
  }

  __device__ __forceinline__ void write_dims(int dim, const RowPart& all) const {
    float o[kChunkDims] = {};
    if (sees_keys(all)) {
#pragma unroll 4
      for (int split = 0; split < params_.num_splits; ++split) {
        const float* const at = params_.partial_out + place_of(split) * Traits::kTileDims + dim;
        Vec16 halves[2];
        load_global_16B(halves[0], at);
        load_global_16B(halves[1], at + 4);
        const float weight =
            weight_of({load_global_f32(params_.partial_rows + 2 * place_of(split)), 0.0f}, all.row_max);
#pragma unroll
        for (int i = 0; i < kChunkDims; ++i) o[i] = fma_rounded(float_of_bits(halves[i / 4].word[i % 4]), weight, o[i]);
      }
    }
    Vec16 chunk;
    pack_chunk<Stored>(chunk, o, inverse_sum(all));
    const int query = row_ % params_.seqlen_q, batch_head = row_ / params_.seqlen_q;
    const TensorStrides& strides = params_.out_strides;
    Bits* const out = static_cast<Bits*>(params_.out) + batch_head / params_.num_heads * strides.batch +
                      batch_head % params_.num_heads * strides.head + query * strides.row + dim;
    store_chunk<Traits>(out, dim, chunk);
  }

  const FlashDecodeParams& params_;
  const int row_, lane_;
};

template <class Traits>
__device__ __forceinline__ void flash_decode_combine(const FlashDecodeParams& params) {
  const int row = block_in_grid() * Traits::kNWarps + thread_in_block() / 32;
  if (row < params.total_rows) FlashDecodeCombine<Traits>(params, row, thread_in_block() % 32).run();
}
