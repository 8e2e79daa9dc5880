#include "runtime/request/forward.h"

#include <cstdint>

#include "generator/errors.h"
#include "generator/legality.h"

namespace flash_attn_jit {
namespace {

void require_arguments(const ForwardRequest& request) {
  const TensorView &q = request.q, &k = request.k;
  require_inputs(q, k, request.v, request.out);
  require_row_memory("softmax_lse", request.softmax_lse, q);
  require_options(request.options, problem_shape(q, k, request.options), q.shape[kHeads]);
}

GlobalAccess access_of(const ForwardRequest& request) {
  const bool aligned = tiles_fit_offsets(request.k) && tiles_fit_offsets(request.v) && is_aligned(request.q) &&
                       is_aligned(request.k) && is_aligned(request.v) && is_aligned(request.out);
  return aligned ? GlobalAccess::kVector16B : GlobalAccess::kElement2B;
}

FlashFwdParams params_of(const ForwardRequest& request, std::int64_t num_m_blocks) {
  FlashFwdParams params{};
  static_cast<AttentionParams&>(params) = attention_params(request.q, request.k, request.options);
  params.q = request.q.data;
  params.k = request.k.data;
  params.v = request.v.data;
  params.out = request.out.data;
  params.softmax_lse = request.softmax_lse;
  params.q_strides = strides_of(request.q);
  params.k_strides = strides_of(request.k);
  params.v_strides = strides_of(request.v);
  params.out_strides = strides_of(request.out);
  params.num_m_blocks = static_cast<int>(num_m_blocks);
  return params;
}

}  // namespace

LaunchPlan plan_forward(const ForwardRequest& request, const PlanTarget& target) {
  require_arguments(request);
  LaunchPlan plan;
  plan.spec = problem_spec(request.q, request.k, request.options, access_of(request));
  const ProblemShape shape = problem_shape(request.q, request.k, request.options);
  const Problem problem = problem_of(request.q, request.k, request.options, target.multiprocessors);
  plan.spec.tile = request.tile ? *request.tile : target.tiles.choose(plan.spec, problem);
  if (plan.spec.tile.block_m < 1) throw UnsupportedError(check(plan.spec, target.arch).value());
  const std::int64_t num_m_blocks = (shape.seqlen_q + plan.spec.tile.block_m - 1) / plan.spec.tile.block_m;
  plan.params = params_of(request, num_m_blocks);
  plan.blocks = grid_blocks({"q", request.q}, shape.batch, num_m_blocks);
  return plan;
}

}  // namespace flash_attn_jit
