// delta of a query row: the sum over the head dims of dout * out, less dlse, the gradient of the row's log-sum-exp. It
// is the part of dS that a row's own softmax takes back; and as lse changes by P of what its scores change by, dlse
// goes into dS = P (dP - delta) with it.
//
// Beside it comes the row's peak, where tensors are of a type that needs one: see gradient_scale.cuh.
//
// Some lanes of a warp share a row, a chunk of 8 dims each. All chunks of some rows are on their way at once.
#pragma once

#include "primitives.cuh"
#include "stored.cuh"
#include "tile_copy.cuh"

struct RowPeaks {
  float* data;          // like delta
  float softmax_scale;  // of either sign
};

template <class Traits>
class RowDelta {
  using Stored = typename Traits::Stored;
  using Matrix = GlobalMatrix<Stored>;
  static constexpr int kChunks = (Traits::kHeadDim + kChunkDims - 1) / kChunkDims;
  static constexpr int kLanesPerRow = kChunks <= 2 ? 2 : kChunks <= 4 ? 4 : kChunks <= 8 ? 8 : kChunks <= 16 ? 16 : 32;
  static constexpr int kRowsPerPass = 32 / kLanesPerRow, kPasses = kRowsPerPass > 4 ? 16 / kRowsPerPass : 4;

 public:
  static constexpr int kRowsAtOnce = kPasses * kRowsPerPass;  // of a warp; 16 rows are a multiple

  // Of the rows [row, row + kRowsAtOnce) that are below `end`. `softmax_lse`, `dlse`, which may be null, `delta` and
  // `peaks` are row 0's.
  static __device__ __forceinline__ void write(const Matrix& out, const Matrix& dout, int row, int end, int lane,
                                               const float* softmax_lse, const float* dlse, float* delta,
                                               const RowPeaks& peaks) {
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
      if constexpr (kConverts<Traits>) {
        const float peak = peak_of_row(out_chunks[pass], dout_chunks[pass], lse_gradient[pass], peaks.softmax_scale);
        if (at < end && dim == 0) store_global_f32(peaks.data + at, lse[pass] == infinity() ? 0.0f : peak);
      }
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
      sum = fma_rounded(Stored::low(dout.word[i]), Stored::low(out.word[i]), sum);
      sum = fma_rounded(Stored::high(dout.word[i]), Stored::high(out.word[i]), sum);
    }
#pragma unroll
    for (int distance = 1; distance < kLanesPerRow; distance *= 2) sum += shuffle_xor(sum, distance);
    return sum;
  }

  static __device__ __forceinline__ float magnitude(float x) { return max_ignoring_nan(x, -x); }

  // Of finite numbers: gradients of a row that has others are no numbers, whatever they are multiplied by.
  static __device__ __forceinline__ float peak_of_row(const Vec16& out, const Vec16& dout, float lse_gradient,
                                                      float softmax_scale) {
    float sum = 0.0f, largest = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float d[2] = {Stored::low(dout.word[i]), Stored::high(dout.word[i])};
      const float o[2] = {Stored::low(out.word[i]), Stored::high(out.word[i])};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        largest = max_ignoring_nan(largest, magnitude(d[half]));
        sum += magnitude(d[half] * o[half]);
      }
    }
#pragma unroll
    for (int distance = 1; distance < kLanesPerRow; distance *= 2) {
      sum += shuffle_xor(sum, distance);
      largest = max_ignoring_nan(largest, shuffle_xor(largest, distance));
    }
    const float peak = max_ignoring_nan(largest, magnitude(softmax_scale) * (sum + magnitude(lse_gradient)));
    return peak < infinity() ? peak : 0.0f;
  }
};
