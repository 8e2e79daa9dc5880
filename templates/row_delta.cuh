// delta of a query row: the sum over the head dims of dout * out, less dlse, the gradient of the row's log-sum-exp. It
// is the part of dS that a row's own softmax takes back; and as lse changes by P of what its scores change by, dlse
// goes into dS = P (dP - delta) with it.
//
// Some lanes of a warp share a row, a chunk of 8 dims each. All chunks of some rows are on their way at once.
#pragma once

#include "primitives.cuh"
#include "tile_copy.cuh"

template <class Traits>
class RowDelta {
  using Element = typename Traits::Element;
  using Matrix = GlobalMatrix<Element>;
  static constexpr int kChunks = (Traits::kHeadDim + kChunkDims - 1) / kChunkDims;
  static constexpr int kLanesPerRow = kChunks <= 2 ? 2 : kChunks <= 4 ? 4 : kChunks <= 8 ? 8 : kChunks <= 16 ? 16 : 32;
  static constexpr int kRowsPerPass = 32 / kLanesPerRow, kPasses = kRowsPerPass > 4 ? 16 / kRowsPerPass : 4;

 public:
  static constexpr int kRowsAtOnce = kPasses * kRowsPerPass;  // of a warp; 16 rows are a multiple

  // Of the rows [row, row + kRowsAtOnce) that are below `end`. `softmax_lse`, `dlse`, which may be null, and
  // `delta` are row 0's.
  static __device__ __forceinline__ void write(const Matrix& out, const Matrix& dout, int row, int end, int lane,
                                               const float* softmax_lse, const float* dlse, float* delta) {
    Vec16 out_chunks[kPasses], dout_chunks[kPasses];
    float lse[kPasses], lse_gradient[kPasses];
    const int dim = lane % kLanesPerRow * kChunkDims;
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const int at = row_of(row, pass, lane);
      out_chunks[pass] = dout_chunks[pass] = Vec16{};
      lse[pass] = lse_gradient[pass] = 0.0f;
      if (at < end && dim < Traits::kHeadDim) load(out_chunks[pass], dout_chunks[pass], out, dout, at, dim);
      if (at >= end || dim > 0) continue;
      lse[pass] = load_global_f32(softmax_lse + at);
      if (dlse != nullptr) lse_gradient[pass] = load_global_f32(dlse + at);
    }
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const float sum = sum_of_row(out_chunks[pass], dout_chunks[pass]) - lse_gradient[pass];
      const int at = row_of(row, pass, lane);
      // A row that sees no key has no gradient, whatever its dout and dlse hold.
      if (at < end && dim == 0) store_global_f32(delta + at, lse[pass] == infinity() ? 0.0f : sum);
    }
  }

 private:
  static __device__ __forceinline__ int row_of(int row, int pass, int lane) {
    return row + pass * kRowsPerPass + lane / kLanesPerRow;
  }

  static __device__ __forceinline__ void load(Vec16& out_chunk, Vec16& dout_chunk, const Matrix& out,
                                              const Matrix& dout, int row, int dim) {
    const long long dim_stride = Traits::kVectorAccess ? 1 : dout.dim_stride;
    load_chunk<Traits>(out_chunk, out.base + row * out.row_stride + dim, dim, 1);
    load_chunk<Traits>(dout_chunk, dout.base + row * dout.row_stride + dim * dim_stride, dim, dim_stride);
  }

  static __device__ __forceinline__ float sum_of_row(const Vec16& out, const Vec16& dout) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      sum = fma_rounded(Element::low(dout.word[i]), Element::low(out.word[i]), sum);
      sum = fma_rounded(Element::high(dout.word[i]), Element::high(out.word[i]), sum);
    }
#pragma unroll
    for (int distance = 1; distance < kLanesPerRow; distance *= 2) sum += shuffle_xor(sum, distance);
    return sum;
  }
};
