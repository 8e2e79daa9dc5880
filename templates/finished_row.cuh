// A row of the forward pass whose keys are all done.
#pragma once

#include "block_info.cuh"
#include "flash_fwd_params.cuh"
#include "primitives.cuh"
#include "sink.cuh"
#include "softmax.cuh"

// Writes the log-sum-exp of a row, of a lane that `is_writer`, and returns what its accumulators are multiplied by. A
// row that sees no key, which a kernel knows by the sum where what hides keys may hide all, gets +inf and 0; one that
// sees only scores of -inf gets 1 / 0, whose product with 0 is NaN, as in the formula.
template <bool kMayHideRows, class Traits>
__device__ __forceinline__ float finish_row(const FlashFwdParams& params, const BlockInfo<Traits>& block, int row,
                                            float row_max, float sum, bool is_writer) {
  const bool sees_keys = block.sequence.sees_keys(row) && !(kMayHideRows && sum == 0.0f);
  const bool writes = row < block.sequence.seqlen_q() && is_writer;
  if constexpr (Traits::kHasSink) {
    RowPart all{sees_keys ? row_max : -infinity(), sum};
    const float weight = add_sink(all, params.sinks, block.head);
    if (writes)
      store_global_f32(params.softmax_lse + block.sequence.statistics_offset(block.head, row), log_sum_exp(all));
    return inverse_sum(all) * weight;
  }
  if (writes) {
    const float lse = sees_keys ? log_sum_exp(row_max, sum) : infinity();
    store_global_f32(params.softmax_lse + block.sequence.statistics_offset(block.head, row), lse);
  }
  return sees_keys ? reciprocal(sum) : 0.0f;
}
