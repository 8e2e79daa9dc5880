// The argument of the kernel that measures the tensor instructions' peak.
#pragma once

// Products of a warp that do not wait for each other.
constexpr int kTensorPeakChains = 8;

struct TensorPeakParams {
  float* sums;  // one for each thread of the grid
  int iterations;
};
