#include "runtime/forward_plan.h"

#include <algorithm>
#include <cstdint>
#include <string>

#include "generator/errors.h"
#include "generator/legality.h"

namespace flash_attn_jit {
namespace {

void require_arguments(const ForwardRequest& request) {
  const TensorView &q = request.q, &k = request.k;
  for (const NamedTensor& tensor : {NamedTensor{"q", q}, {"k", k}, {"v", request.v}, {"out", request.out}})
    require_readable(tensor);
  require_shape({"k", k}, {q.shape[kBatch], k.shape[kSeqlen], k.shape[kHeads], q.shape[kHeadDim]},
                "with q's batch and head dim");
  require_shape({"v", request.v}, k.shape, "k's");
  require_shape({"out", request.out}, q.shape, "q's");
  require_heads(q.shape[kHeads], k.shape[kHeads]);
  require_row_memory("softmax_lse", request.softmax_lse, q);
  require_finite_scale(request.softmax_scale);
}

GlobalAccess access_of(const ForwardRequest& request) {
  const bool aligned = tiles_fit_offsets(request.k) && tiles_fit_offsets(request.v) && is_aligned(request.q) &&
                       is_aligned(request.k) && is_aligned(request.v) && is_aligned(request.out);
  return aligned ? GlobalAccess::kVector16B : GlobalAccess::kElement2B;
}

FlashFwdParams params_of(const ForwardRequest& request, std::int64_t num_m_blocks) {
  const TensorView &q = request.q, &k = request.k, &v = request.v, &out = request.out;
  FlashFwdParams params{};
  params.q = q.data;
  params.k = k.data;
  params.v = v.data;
  params.out = out.data;
  params.softmax_lse = request.softmax_lse;
  params.q_batch_stride = stride_of(q, kBatch);
  params.q_row_stride = stride_of(q, kSeqlen);
  params.q_head_stride = stride_of(q, kHeads);
  params.k_batch_stride = stride_of(k, kBatch);
  params.k_row_stride = stride_of(k, kSeqlen);
  params.k_head_stride = stride_of(k, kHeads);
  params.v_batch_stride = stride_of(v, kBatch);
  params.v_row_stride = stride_of(v, kSeqlen);
  params.v_head_stride = stride_of(v, kHeads);
  params.out_batch_stride = stride_of(out, kBatch);
  params.out_row_stride = stride_of(out, kSeqlen);
  params.out_head_stride = stride_of(out, kHeads);
  params.seqlen_q = static_cast<int>(q.shape[kSeqlen]);
  params.seqlen_k = static_cast<int>(k.shape[kSeqlen]);
  params.num_heads = static_cast<int>(q.shape[kHeads]);
  params.num_m_blocks = static_cast<int>(num_m_blocks);
  params.softmax_scale_log2 = magnitude_log2(request.softmax_scale);
  params.q_sign = sign_flip(request.softmax_scale);
  return params;
}

}  // namespace

LaunchPlan lay_out_forward(const ForwardRequest& request, const ArchLimits& arch, int multiprocessors) {
  require_arguments(request);
  LaunchPlan plan;
  plan.spec = problem_spec(request.q, request.k, request.mask, access_of(request));
  const std::int64_t seqlen_q = request.q.shape[kSeqlen];
  const ProblemSize size{seqlen_q, request.q.shape[kBatch] * request.q.shape[kHeads], multiprocessors};
  plan.spec.tile = request.tile ? *request.tile : choose_tile(plan.spec, arch, size);
  if (plan.spec.tile.block_m < 1) throw UnsupportedError(check(plan.spec, arch).value());
  const std::int64_t num_m_blocks = (seqlen_q + plan.spec.tile.block_m - 1) / plan.spec.tile.block_m;
  plan.params = params_of(request, num_m_blocks);
  plan.blocks = grid_blocks({"q", request.q}, num_m_blocks);
  return plan;
}

LaunchPlan plan_forward(const ForwardRequest& request, const ArchLimits& arch, int multiprocessors) {
  const LaunchPlan plan = lay_out_forward(request, arch, multiprocessors);
  if (const auto reason = check(plan.spec, arch)) throw UnsupportedError(*reason);
  return plan;
}

}  // namespace flash_attn_jit
