// A row's softmax put together of parts, each of which saw some of the keys: O and row_sum above a row_max of its own.
// Parts come in a fixed order, so that the result is the same bits every time.
#pragma once

#include "primitives.cuh"
#include "softmax.cuh"

struct RowPart {
  float row_max;  // -inf: the part saw no key
  float row_sum;
};

// What a part's O and row_sum are multiplied by where the greatest row_max of all parts is `row_max`.
__device__ __forceinline__ float weight_of(const RowPart& part, float row_max) {
  return exp2_approx(part.row_max - row_max);
}

// All parts together. A row that sees no key gets out 0 and a log-sum-exp of +inf; one that sees only scores of -inf
// gets 1 / 0, whose product with 0 is NaN, as in the formula.
__device__ __forceinline__ bool sees_keys(const RowPart& row) { return row.row_max > -infinity(); }
__device__ __forceinline__ float inverse_sum(const RowPart& row) {
  return sees_keys(row) ? reciprocal(row.row_sum) : 0.0f;
}
__device__ __forceinline__ float log_sum_exp(const RowPart& row) {
  return sees_keys(row) ? log_sum_exp(row.row_max, row.row_sum) : infinity();
}
