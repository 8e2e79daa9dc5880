// delta = sum over the head dims of dout * out, for every row: the part of dS that a row's own softmax takes back.
//
// Rows of all sequences are alike here: varlen tensors come as one sequence of total_q rows.
//
// A block has kBlockM rows of one head, a warp 16 or 32 of them. Some lanes share a row, a chunk of 8 dims each.
#pragma once

#include "flash_bwd_params.cuh"
#include "primitives.cuh"
#include "tile_copy.cuh"

template <class Traits>
class FlashBwdPreprocess {
  using Element = typename Traits::Element;
  static constexpr int kChunks = (Traits::kHeadDim + kChunkDims - 1) / kChunkDims;
  static constexpr int kLanesPerRow = kChunks <= 2 ? 2 : kChunks <= 4 ? 4 : kChunks <= 8 ? 8 : kChunks <= 16 ? 16 : 32;
  static constexpr int kRowsAtOnce = 32 / kLanesPerRow;
  static constexpr int kRowsPerWarp = Traits::kBlockM / Traits::kNWarps;

 public:
  __device__ __forceinline__ explicit FlashBwdPreprocess(const FlashBwdParams& params) : params_(params) {
    const int batch_head = block_in_grid() / params.num_row_blocks;
    row_begin_ = block_in_grid() % params.num_row_blocks * Traits::kBlockM + thread_in_block() / 32 * kRowsPerWarp;
    head_ = batch_head % params.num_heads;
    batch_ = batch_head / params.num_heads;
  }

  __device__ __forceinline__ void run() {
    const int lane = thread_in_block() % 32;
#pragma unroll 4
    for (int i = 0; i < kRowsPerWarp; i += kRowsAtOnce)
      work_on_row(row_begin_ + i + lane / kLanesPerRow, lane % kLanesPerRow);
  }

 private:
  __device__ __forceinline__ void work_on_row(int row, int chunk) {
    float sum = 0.0f;
    const bool exists = row < params_.seqlen_q;
    if (exists && chunk < kChunks) {
      Vec16 out, dout;
      const int dim = chunk * kChunkDims;
      const long long dim_stride = Traits::kVectorAccess ? 1 : params_.dout_dim_stride;
      load_chunk<Traits>(out, at_row(params_.out, params_.out_strides, row) + dim, dim, 1);
      load_chunk<Traits>(dout, at_row(params_.dout, params_.dout_strides, row) + dim * dim_stride, dim, dim_stride);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sum = fma_rounded(Element::low(dout.word[i]), Element::low(out.word[i]), sum);
        sum = fma_rounded(Element::high(dout.word[i]), Element::high(out.word[i]), sum);
      }
    }
#pragma unroll
    for (int distance = 1; distance < kLanesPerRow; distance *= 2) sum += shuffle_xor(sum, distance);
    if (exists && chunk == 0) {
      const long long index = (static_cast<long long>(batch_) * params_.num_heads + head_) * params_.seqlen_q + row;
      // A row that sees no key has no gradient, whatever its dout holds.
      store_global_f32(params_.delta + index, load_global_f32(params_.softmax_lse + index) == infinity() ? 0.0f : sum);
    }
  }

  __device__ __forceinline__ const typename Element::Bits* at_row(const void* tensor, const TensorStrides& strides,
                                                                  int row) const {
    return static_cast<const typename Element::Bits*>(tensor) + batch_ * strides.batch + head_ * strides.head +
           row * strides.row;
  }

  const FlashBwdParams& params_;
  int row_begin_, head_, batch_;
};

template <class Traits>
__device__ __forceinline__ void flash_bwd_preprocess(const FlashBwdParams& params) {
  FlashBwdPreprocess<Traits>(params).run();
}
