// A sink: a logit of a query head that takes part in the softmax of the head's rows and has no value. To a row whose
// keys are all done it is one part more, whose O is 0 (see row_parts.cuh): no loop knows of it. softmax_lse has it in,
// so that the backward kernels find it in there.
#pragma once

#include "flash_fwd_params.cuh"
#include "primitives.cuh"
#include "row_parts.cuh"

// Adds the head's sink to a row, and returns what the row's O is to be multiplied by. A row that sees no key consists
// of its sink: out 0, and lse is the sink. -inf is no sink.
__device__ __forceinline__ float add_sink(RowPart& row, const SinkParams& sinks, int head) {
  const RowPart sink{load_global_f32(sinks.logits + head) * kLog2E, 1.0f};
  if (sink.row_max == -infinity()) return 1.0f;
  const float row_max = max_ignoring_nan(row.row_max, sink.row_max), weight = weight_of(row, row_max);
  row = {row_max, fma_rounded(row.row_sum, weight, weight_of(sink, row_max))};
  return weight;
}
