// What gradients are multiplied by on their way through elements, where tensors are made of numbers that reach further
// down: training in bfloat16 scales no loss, and a dout of 1e-8 is nothing to a float16.
//
// A query has a peak, which the kernel that makes its delta leaves beside that: the greatest of its dout, or what its
// dS come to where values are large,
//
//   max(max |dout|, |softmax_scale| (sum of |dout out| + |dlse|))
//
// Kernels that make gradients take the greatest peak of the queries that they add up to kScaledPeak or above, by a
// power of two: dout is multiplied by it where it is converted, delta too, and what comes out is divided by it. All of
// that is exact. float16 has room for 2^8 above and for 2^21 below, without subnormal numbers; what is still too large
// (dS) is cut off to 65504.
#pragma once

#include "flash_bwd_params.cuh"
#include "primitives.cuh"
#include "stored.cuh"

// Where nothing is converted, it is 1 and costs nothing.
template <class Traits>
class GradientScale {
  static constexpr int kScaledPeak = 7;  // an exponent of 2
  static constexpr int kBias = 127, kMantissaBits = 23;
  static constexpr int kMostExponent = 119;  // so that the inverse is no subnormal number

 public:
  GradientScale() = default;

  // Of a peak that is 0 or more, and finite. Of 0 it is as great as any: it does nothing to zeros.
  __device__ __forceinline__ explicit GradientScale(float peak) {
    const int exponent = kScaledPeak - (static_cast<int>(bits_of_float(peak) >> kMantissaBits) - kBias);
    factor_ = float_of_bits(static_cast<unsigned>((exponent < kMostExponent ? exponent : kMostExponent) + kBias)
                            << kMantissaBits);
  }

  // It is the same in all of a warp's lanes, and from here on ptxas knows.
  __device__ __forceinline__ void take_from_first_lane() {
    factor_ = float_of_bits(shuffle(bits_of_float(factor_), 0));
  }

  __device__ __forceinline__ float factor() const {
    if constexpr (kConverts<Traits>) return factor_;
    return 1.0f;
  }
  __device__ __forceinline__ float inverse() const {
    if constexpr (kConverts<Traits>) return float_of_bits((2u * kBias << kMantissaBits) - bits_of_float(factor_));
    return 1.0f;
  }

 private:
  float factor_ = 1.0f;
};

// Of a query, or of none.
__device__ __forceinline__ float load_peak(const FlashBwdParams& params, long long offset, bool exists) {
  return exists ? load_global_f32(params.peaks + offset) : 0.0f;
}

template <int kFirstDistance = 1>
__device__ __forceinline__ float greatest_in_warp(float x) {
#pragma unroll
  for (int distance = kFirstDistance; distance < 32; distance *= 2) x = max_ignoring_nan(x, shuffle_xor(x, distance));
  return x;
}

// Through the first words of shared memory, which are free before and after.
template <int kNWarps>
__device__ __forceinline__ float greatest_in_block(float x) {
  x = greatest_in_warp(x);
  if (thread_in_block() % 32 == 0) store_shared_f32(thread_in_block() / 32 * 4, x);
  block_barrier();
#pragma unroll
  for (int warp = 0; warp < kNWarps; ++warp) x = max_ignoring_nan(x, load_shared_f32(warp * 4));
  block_barrier();
  return x;
}
