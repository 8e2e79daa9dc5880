// The online softmax of one warp's rows, in base 2: p = 2^(s * scale - row_max).
//
// A thread holds, of an accumulator acc_s[kMTiles][kNTiles][4], two rows of every 16-row tile: lane / 4 (elements 0, 1)
// and lane / 4 + 8 (elements 2, 3). Its rows are numbered 2 * m + (element >> 1).
//
// row_max is allowed to lag behind: p may reach 2^kMaxRise before the maximum is corrected. fp16 holds that with room
// to spare, the division by row_sum cancels it exactly, and nearly every turn does without touching the accumulator.
#pragma once

#include "primitives.cuh"

constexpr float kMaxRise = 8.0f;       // in log2 units; p up to 256, far below fp16's 65504
constexpr float kNoMaximum = -1e30f;   // before a row has seen a key; finite, so that -inf - row_max stays -inf

template <int kMTiles, int kNTiles>
struct Softmax {
  static constexpr int kRows = 2 * kMTiles;
  using Scores = float[kMTiles][kNTiles][4];

  float row_max[kRows];  // of s * scale, as far as corrected; the same in the 4 lanes that share a row
  float row_sum[kRows];  // of this lane's p
  float scale;           // softmax_scale x log2(e), positive

  __device__ __forceinline__ explicit Softmax(float softmax_scale_log2) : scale(softmax_scale_log2) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      row_max[r] = kNoMaximum;
      row_sum[r] = 0.0f;
    }
  }

  __device__ __forceinline__ float exponent(float s, int row) const { return fma_rounded(s, scale, -row_max[row]); }

  // The largest raw score of this lane's part of a row.
  __device__ __forceinline__ static float lane_max(const Scores& acc_s, int row) {
    float largest = -infinity();
#pragma unroll
    for (int n = 0; n < kNTiles; ++n) {
      largest = max_ignoring_nan(largest, acc_s[row / 2][n][row % 2 * 2]);
      largest = max_ignoring_nan(largest, acc_s[row / 2][n][row % 2 * 2 + 1]);
    }
    return largest;
  }

  // Has some row of the warp risen so far that its maximum must be corrected before these scores are used?
  __device__ __forceinline__ bool must_correct(const Scores& acc_s) const {
    bool rises = false;
#pragma unroll
    for (int r = 0; r < kRows; ++r) rises |= exponent(lane_max(acc_s, r), r) > kMaxRise;
    return any_in_warp(rises);
  }

  // Raises the maxima to those of acc_s and rescales what was accumulated under the old ones.
  template <int kDTiles>
  __device__ __forceinline__ void correct(const Scores& acc_s, float (&acc_o)[kMTiles][kDTiles][4]) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float largest = lane_max(acc_s, r);
      largest = max_ignoring_nan(largest, shuffle_xor(largest, 1));
      largest = max_ignoring_nan(largest, shuffle_xor(largest, 2));
      const float raised = max_ignoring_nan(row_max[r], largest * scale);
      const float factor = exp2_approx(row_max[r] - raised);
      row_max[r] = raised;
      row_sum[r] *= factor;
#pragma unroll
      for (int d = 0; d < kDTiles; ++d) {
        acc_o[r / 2][d][r % 2 * 2] *= factor;
        acc_o[r / 2][d][r % 2 * 2 + 1] *= factor;
      }
    }
  }

  // The whole row's sum, after the last tile.
  __device__ __forceinline__ float total(int row) const {
    float sum = row_sum[row];
    sum += shuffle_xor(sum, 1);
    sum += shuffle_xor(sum, 2);
    return sum;
  }
};
