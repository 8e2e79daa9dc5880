#include "runtime/interpreter/tensor_extents.h"

namespace flash_attn_jit {

TensorExtent fp16_extent(const char* name, const TensorView& view, TensorUse use) {
  return {.name = name,
          .data = view.data,
          .element_bytes = 2,
          .shape = {view.shape.begin(), view.shape.end()},
          .strides = {view.strides.begin(), view.strides.end()},
          .use = use};
}

TensorExtent row_extent(const char* name, const float* data, const TensorView& q, TensorUse use) {
  const std::int64_t batch = q.shape[kBatch], seqlen_q = q.shape[kSeqlen], heads = q.shape[kHeads];
  return {.name = name,
          .data = const_cast<float*>(data),  // a registered tensor is only written where its use says so
          .element_bytes = 4,
          .shape = {batch, heads, seqlen_q},
          .strides = {heads * seqlen_q, seqlen_q, 1},
          .use = use};
}

}  // namespace flash_attn_jit
