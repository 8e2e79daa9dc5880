#include "runtime/launch/interpreted_tensors.h"

#include "generator/errors.h"

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

void append_option_extents(const AttentionOptions& options, const TensorView& q, const TensorView& k,
                           std::vector<TensorExtent>& tensors) {
  const ProblemShape shape = problem_shape(q, k, options);
  visit_tensors(options, shape, q.shape[kHeads], [&](const OptionTensor& tensor) {
    tensors.push_back({.name = tensor.name,
                       .data = const_cast<void*>(tensor.data),  // only read
                       .element_bytes = 4,
                       .shape = {tensor.shape.begin(), tensor.shape.begin() + tensor.rank},
                       .strides = {tensor.strides.begin(), tensor.strides.begin() + tensor.rank},
                       .use = TensorUse::kRead});
  });
}

namespace {

void require_cu_seqlens(const std::string& side, const int* cu_seqlens, std::int64_t batch, std::int64_t max_seqlen,
                        std::int64_t total) {
  const auto refuse = [&](std::int64_t b, const std::string& why, const std::string& accepted) {
    throw ArgumentError(
        {"cu_seqlens_" + side + "[" + std::to_string(b) + "]", "is " + std::to_string(cu_seqlens[b]) + why, accepted});
  };
  if (cu_seqlens[0] != 0) refuse(0, "", "0, where the first sequence begins");
  for (std::int64_t b = 0; b < batch; ++b) {
    const std::int64_t seqlen = std::int64_t(cu_seqlens[b + 1]) - cu_seqlens[b];
    if (seqlen < 0) refuse(b + 1, ", less than the one before", "numbers that do not fall");
    if (seqlen > max_seqlen)
      refuse(b + 1, ", so that a sequence is " + std::to_string(seqlen) + " long",
             "at most max_seqlen_" + side + ", " + std::to_string(max_seqlen));
  }
  if (cu_seqlens[batch] > total) refuse(batch, "", "at most the number of rows, " + std::to_string(total));
}

}  // namespace

void require_cu_seqlens(const AttentionOptions& options, const TensorView& q, const TensorView& k) {
  if (!options.varlen) return;
  const Varlen& varlen = *options.varlen;
  require_cu_seqlens("q", varlen.cu_seqlens_q, varlen.batch, varlen.max_seqlen_q, q.shape[kSeqlen]);
  require_cu_seqlens("k", varlen.cu_seqlens_k, varlen.batch, varlen.max_seqlen_k, k.shape[kSeqlen]);
}

}  // namespace flash_attn_jit
