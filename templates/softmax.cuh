// The online softmax of one warp's rows, in base 2: p = 2^(s * scale - row_max).
//
// row_max is allowed to lag behind: p may reach 2^kMaxRise before the maximum is corrected. The division by row_sum
// cancels that, and nearly every iteration does without touching the accumulator. A small kMaxRise costs corrections.
//
// row_sum takes p as it is, V is multiplied by p rounded to fp16. Where one key dominates a row, out must be its v all
// the same, or the backward pass finds dP and delta different. So that key's p is 1, which fp16 holds: a correction
// leaves the maximum's exponent at 0 without any rounding. Nor does a lag matter there: row_max is the score of a key,
// at most kMaxRise below the greatest, so that a row whose row_max lags is not one key's. See log_sum_exp(), too.
#pragma once

#include "accumulator.cuh"
#include "primitives.cuh"

// In log2 units.
constexpr float kMaxRise = 2.0f;
constexpr float kLowMaximum = -1024.0f;  // above it what rises by as much keeps digits below 2^-12
constexpr float kNoMaximum = -1e30f;     // before a row has seen a key; finite, so that -inf - row_max stays -inf

// The phases of a tile. Products q k become scores (see score_feature.cuh), those exponents, those probabilities.
template <int kMTiles, int kNTiles>
struct Scores {
  Accumulator<kMTiles, kNTiles> s;
};
template <int kMTiles, int kNTiles>
struct Exponents {
  Accumulator<kMTiles, kNTiles> t;  // s * scale - row_max
};
// Packed pairs: the A operands of the next product.
template <int kMTiles, int kNTiles>
using Probabilities = unsigned[kMTiles][kNTiles][2];

// The natural logarithm of a row's sum of exponentials, of its maximum and of its sum above that.
//
// The backward pass makes 2^(s * scale - lse) of it, whose exponent is wrong by what float32 rounds at the size of lse,
// while that of a key that has the row to itself has to come out at 0. Where that would tell in fp16, the lse of such a
// row is rounded down by more than all that: its p is then above 1, and saturate() makes it 1.
__device__ __forceinline__ float log_sum_exp(float row_max, float sum) {
  constexpr float kLn2 = 0.693147180559945309f;
  constexpr float kTells = 1024.0f;     // in log2 units: kRounded of it changes p by 2^-12, half of fp16's last bit
  constexpr float kRounded = 0x3p-23f;  // of row_max (4 half bits), of the product with kLn2 and of that with kLog2E
  const float lse = fma_rounded(row_max, kLn2, log2_approx(sum) * kLn2);
  const float magnitude = max_ignoring_nan(row_max, -row_max);
  const bool is_one_keys = sum <= 1.0f + 0x1p-12f && magnitude > kTells;
  return is_one_keys ? lse - kLn2 * kRounded * magnitude : lse;
}

// kRoundsProducts: s * scale is rounded, so that scores that are alike have exponents that are alike, however large
// they are. Otherwise that of a maximum is off by what row_max rounded off.
template <class Element, int kMTiles, int kNTiles, bool kRoundsProducts = false>
struct Softmax {
  static constexpr int kRows = 2 * kMTiles;
  static constexpr int kElements = kMTiles * kNTiles * 4;
  using Scores = ::Scores<kMTiles, kNTiles>;
  using Exponents = ::Exponents<kMTiles, kNTiles>;
  using Probabilities = ::Probabilities<kMTiles, kNTiles>;

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

  __device__ __forceinline__ float exponent(float s, int row) const {
    return kRoundsProducts ? multiply_rounded(s, scale) - row_max[row] : fma_rounded(s, scale, -row_max[row]);
  }

  // Returns the lane's largest exponent.
  __device__ __forceinline__ float to_exponents(const Scores& scores, Exponents& exponents) const {
    float largest = -infinity();
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      const OperandOrder<kMTiles> at(i);
      float& t = exponents.t[at.m][at.n][at.c];
      t = exponent(scores.s[at.m][at.n][at.c], at.row);
      largest = max_ignoring_nan(largest, t);
    }
    return largest;
  }

  // After correct(): less the remainders.
  __device__ __forceinline__ void to_exponents(const Scores& scores, const float (&remainder)[kRows],
                                               Exponents& exponents) const {
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      const OperandOrder<kMTiles> at(i);
      exponents.t[at.m][at.n][at.c] = exponent(scores.s[at.m][at.n][at.c], at.row) - remainder[at.row];
    }
  }

  // In the order in which the next product needs them: all of 8 keys first. Uses the exponents up. All count in the
  // row's sum; those of which keeps(row, n, column) is false are 0 in the product.
  template <class Keeps>
  __device__ __forceinline__ void to_probabilities(Exponents& exponents, Probabilities& p, Keeps keeps) {
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      const OperandOrder<kMTiles> at(i);
      float (&t)[4] = exponents.t[at.m][at.n];
      t[at.c] = exp2_approx(t[at.c]);
      row_sum[at.row] += t[at.c];
      if (!keeps(at.row, at.n, at.c % 2)) t[at.c] = 0.0f;
      if (at.c % 2 == 1) p[at.m][at.n][at.c / 2] = Element::pack(t[at.c - 1], t[at.c]);
    }
  }

  // The largest score or exponent of this lane's part of a row.
  __device__ __forceinline__ static float lane_max(const Accumulator<kMTiles, kNTiles>& acc, int row) {
    float largest = -infinity();
    for_each_in_row(acc, row, [&](float s, int) { largest = max_ignoring_nan(largest, s); });
    return largest;
  }

  // Has some row of the warp no maximum yet? `kMayBeLow`: or one of keys that a mask put out of the way, from which the
  // digits of a score that comes after it would not be told.
  template <bool kMayBeLow>
  __device__ __forceinline__ bool lacks_maximum() const {
    bool lacks = false;
#pragma unroll
    for (int r = 0; r < kRows; ++r) lacks |= kMayBeLow ? row_max[r] < kLowMaximum : row_max[r] == kNoMaximum;
    return any_in_warp(lacks);
  }

  // Has some row of the warp risen so far that its maximum must be corrected before these scores are used?
  __device__ __forceinline__ bool must_correct(const Scores& scores) const {
    bool rises = false;
#pragma unroll
    for (int r = 0; r < kRows; ++r) rises |= exponent(lane_max(scores.s, r), r) > kMaxRise;
    return any_in_warp(rises);
  }

  // Raises the maxima to those of the scores and rescales what was accumulated under the old ones. `remainder` is s *
  // scale - row_max of a maximum, which the product of the two rounded off, to be taken off all exponents of its row.
  template <int kDTiles>
  __device__ __forceinline__ void correct(const Scores& scores, Accumulator<kMTiles, kDTiles>& acc_o,
                                          float (&remainder)[kRows]) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float before = row_max[r];
      remainder[r] = raise(across_row(lane_max(scores.s, r)), r);
      rescale(r, exp2_approx(before - row_max[r]), acc_o);
    }
  }

  // Raises a row's maximum to that of its scores, and returns the remainder.
  __device__ __forceinline__ float raise(float largest, int row) {
    row_max[row] = max_ignoring_nan(row_max[row], largest * scale);
    return !kRoundsProducts && row_max[row] == largest * scale ? fma_rounded(largest, scale, -row_max[row]) : 0.0f;
  }

  // The same where the scores have become exponents already. Only for rows that have seen a key,
  // because kNoMaximum swallows the score.
  template <int kDTiles>
  __device__ __forceinline__ void correct_exponents(Exponents& exponents, Accumulator<kMTiles, kDTiles>& acc_o) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float rise = max_ignoring_nan(across_row(lane_max(exponents.t, r)), 0.0f);
      rescale(r, exp2_approx(-rise), acc_o);
      row_max[r] += rise;
      for_each_in_row(exponents.t, r, [&](float& t, int) { t -= rise; });
    }
  }

  // The whole row's sum, after the last tile.
  __device__ __forceinline__ float total(int row) const {
    float sum = row_sum[row];
    sum += shuffle_xor(sum, 1);
    sum += shuffle_xor(sum, 2);
    return sum;
  }

  // The largest value in the 4 lanes that share a row.
  static __device__ __forceinline__ float across_row(float v) {
    v = max_ignoring_nan(v, shuffle_xor(v, 1));
    return max_ignoring_nan(v, shuffle_xor(v, 2));
  }

 private:
  template <int kDTiles>
  __device__ __forceinline__ void rescale(int row, float factor, Accumulator<kMTiles, kDTiles>& acc_o) {
    row_sum[row] *= factor;
    for_each_in_row(acc_o, row, [&](float& o, int) { o *= factor; });
  }
};
