// The tensor instructions that the attention kernels are made of, and nothing beside them: how fast a GPU can be at
// all.
#pragma once

#include "primitives.cuh"
#include "tensor_peak_params.cuh"

template <typename Element, int kThreads>
__device__ void tensor_peak(const TensorPeakParams& params) {
  const int thread = thread_in_block();
  // Numbers with all their bits in use, as attention's have: what an instruction costs in power depends on them.
  const float x = 0.37f + 0.0029f * thread, y = 0.81f - 0.0017f * thread;
  const unsigned a0 = Element::pack(x, -y), a1 = Element::pack(-y, x), b = Element::pack(y, x);
  float sums[kTensorPeakChains][4] = {};
  for (int i = 0; i < params.iterations; ++i)
#pragma unroll
    for (int chain = 0; chain < kTensorPeakChains; ++chain) Element::multiply_add(sums[chain], a0, a1, b);
  float sum = 0;
#pragma unroll
  for (int chain = 0; chain < kTensorPeakChains; ++chain)
    sum += sums[chain][0] + sums[chain][1] + sums[chain][2] + sums[chain][3];
  store_global_f32(params.sums + block_in_grid() * kThreads + thread, sum);
}
