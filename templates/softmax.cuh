// The online softmax of one warp's rows, in base 2: p = 2^(s * scale - row_max).
//
// row_max is allowed to lag behind: p may reach 2^kMaxRise before the maximum is corrected. The division by row_sum
// cancels that, and nearly every turn does without touching the accumulator. A small kMaxRise costs corrections.
//
// row_sum takes p as it is, V is multiplied by p rounded to fp16. Where one key dominates a row, out must be its v all the
// same, or the backward pass finds dP and delta different. So that key's p is 1, which fp16 holds: a correction leaves the
// maximum's exponent at 0 without any rounding. Nor does a lag matter there: row_max is the score of a key, at most
// kMaxRise below the greatest, so that a row whose row_max lags is not one key's.
#pragma once

#include "accumulator.cuh"
#include "primitives.cuh"

constexpr float kMaxRise = 2.0f;       // in log2 units
constexpr float kNoMaximum = -1e30f;   // before a row has seen a key; finite, so that -inf - row_max stays -inf

template <int kMTiles, int kNTiles>
struct Softmax {
  static constexpr int kRows = 2 * kMTiles;
  using Scores = Accumulator<kMTiles, kNTiles>;

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
    for_each_in_row(acc_s, row, [&](float s, int) { largest = max_ignoring_nan(largest, s); });
    return largest;
  }

  // Has some row of the warp no maximum yet?
  __device__ __forceinline__ bool lacks_maximum() const {
    bool lacks = false;
#pragma unroll
    for (int r = 0; r < kRows; ++r) lacks |= row_max[r] == kNoMaximum;
    return any_in_warp(lacks);
  }

  // Has some row of the warp risen so far that its maximum must be corrected before these scores are used?
  __device__ __forceinline__ bool must_correct(const Scores& acc_s) const {
    bool rises = false;
#pragma unroll
    for (int r = 0; r < kRows; ++r) rises |= exponent(lane_max(acc_s, r), r) > kMaxRise;
    return any_in_warp(rises);
  }

  // Raises the maxima to those of the scores acc_s and rescales what was accumulated under the old ones. `remainder` is
  // s * scale - row_max of a maximum, which the product of the two rounded off, to be taken off all exponents of its row.
  template <int kDTiles>
  __device__ __forceinline__ void correct(const Scores& acc_s, Accumulator<kMTiles, kDTiles>& acc_o,
                                          float (&remainder)[kRows]) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float largest = across_row(lane_max(acc_s, r));
      const float raised = max_ignoring_nan(row_max[r], largest * scale);
      remainder[r] = raised == largest * scale ? fma_rounded(largest, scale, -raised) : 0.0f;
      rescale(r, exp2_approx(row_max[r] - raised), acc_o);
      row_max[r] = raised;
    }
  }

  // The same where the scores have become exponents t = s * scale - row_max already. Only for rows that have seen a key,
  // because kNoMaximum swallows the score.
  template <int kDTiles>
  __device__ __forceinline__ void correct_exponents(Scores& t, Accumulator<kMTiles, kDTiles>& acc_o) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float rise = max_ignoring_nan(across_row(lane_max(t, r)), 0.0f);
      rescale(r, exp2_approx(-rise), acc_o);
      row_max[r] += rise;
      for_each_in_row(t, r, [&](float& exponent, int) { exponent -= rise; });
    }
  }

  // The whole row's sum, after the last tile.
  __device__ __forceinline__ float total(int row) const {
    float sum = row_sum[row];
    sum += shuffle_xor(sum, 1);
    sum += shuffle_xor(sum, 2);
    return sum;
  }

 private:
  // The largest value in the 4 lanes that share a row.
  static __device__ __forceinline__ float across_row(float v) {
    v = max_ignoring_nan(v, shuffle_xor(v, 1));
    return max_ignoring_nan(v, shuffle_xor(v, 2));
  }

  template <int kDTiles>
  __device__ __forceinline__ void rescale(int row, float factor, Accumulator<kMTiles, kDTiles>& acc_o) {
    row_sum[row] *= factor;
    for_each_in_row(acc_o, row, [&](float& o, int) { o *= factor; });
  }
};
