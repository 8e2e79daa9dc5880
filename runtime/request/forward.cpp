#include "runtime/request/forward.h"

#include <cstdint>

#include "generator/errors.h"
#include "generator/families/families.h"
#include "generator/integers.h"
#include "generator/key_splits.h"
#include "generator/legality.h"
#include "generator/tile_layout.h"

namespace flash_attn_jit {
namespace {

void require_arguments(const ForwardRequest& request) {
  const TensorView &q = request.q, &k = request.k;
  require_inputs(q, k, request.v, request.out, request.options.pages.has_value());
  if (!request.workspace) require_row_memory("softmax_lse", request.softmax_lse, q);
  require_options(request.options, problem_shape(q, k, request.options), q.shape[kHeads]);
}

GlobalAccess access_of(const ForwardRequest& request) {
  const bool aligned = tiles_fit_offsets(request.k) && tiles_fit_offsets(request.v) && is_aligned(request.q) &&
                       is_aligned(request.k) && is_aligned(request.v) && is_aligned(request.out);
  return aligned ? GlobalAccess::kVector16B : GlobalAccess::kElement2B;
}

KeyCacheParams cache_of(const ForwardRequest& request) {
  KeyCacheParams cache{};
  if (const auto& lengths = request.options.key_lengths) {
    cache.used = lengths->used;
    cache.leftpad = lengths->leftpad;
    cache.used_more = static_cast<int>(lengths->used_more);
  }
  if (request.options.pages) set_pages(cache, *request.options.pages, request.k);
  return cache;
}

FlashDecodeParams params_of(const ForwardRequest& request) {
  FlashDecodeParams params{};
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
  params.cache = cache_of(request);
  params.sinks = {request.options.sinks};
  params.dropout = dropout_params(request.options);
  params.user = user_params(request.q, request.k, request.options, RowSide::kQueries);
  return params;
}

bool takes_decode(const ForwardRequest& request, const KernelSpec& spec, const Problem& problem,
                  const TileChooser& tiles) {
  if (request.tile || request.decode_tile) return request.decode_tile.has_value();
  if (spec.has(Feature::kDropout) || spec.features.are_users() || spec.kind == KernelKind::kForwardWide) return false;
  return !request.options.has_backward && tiles.takes_decode(spec, problem);
}

// Rows of all sequences are alike where splits are put together: those of softmax_lse, in its order.
ForwardLaunch plan_combine(const ForwardLaunch& decode, const PlanTarget& target, const Problem& problem) {
  ForwardLaunch combine{.spec = combine_of(decode.spec), .params = decode.params};
  combine.spec.tile = target.tiles.choose(combine.spec, problem);
  combine.blocks = ceil_div(decode.params.total_rows, combine.spec.tile.warps);
  if (decode.spec.has(Feature::kVarlen)) combine.params.seqlen_q = decode.params.total_q;
  return combine;
}

void plan_decode(LaunchPlan& plan, const ForwardRequest& request, const PlanTarget& target, const Problem& problem) {
  plan.spec.kind = KernelKind::kDecode;
  plan.spec.tile = request.decode_tile ? *request.decode_tile : target.tiles.choose(plan.spec, problem);
  if (plan.spec.tile.block_m < 1) throw UnsupportedError(check(plan.spec, target.arch).value());
  const std::int64_t row_blocks = decode_blocks_of_head(plan.spec, problem.seqlen_q);
  const KeySplits splits = split_keys(plan.spec, problem, request.workspace != nullptr ? request.num_splits : 1);
  const TensorView& q = request.q;
  const std::int64_t total_rows = q.shape[kBatch] * q.shape[kHeads] * q.shape[kSeqlen];
  plan.params.num_m_blocks = static_cast<int>(row_blocks);
  plan.params.num_splits = splits.count;
  plan.params.keys_per_split = splits.keys;
  plan.params.total_rows = static_cast<int>(total_rows);
  plan.blocks =
      grid_blocks({"k", request.k}, problem_shape(q, request.k, request.options).batch, row_blocks * splits.count);
  if (splits.count == 1 || plan.blocks == 0) return;
  plan.split_floats = splits.count * total_rows * (kernel_value_dims(plan.spec) + 2);
  plan.combine = plan_combine(plan, target, problem);
}

void plan_whole(LaunchPlan& plan, const ForwardRequest& request, const PlanTarget& target, const Problem& problem) {
  plan.spec.tile = request.tile ? *request.tile : target.tiles.choose(plan.spec, problem);
  if (plan.spec.tile.block_m < 1) throw UnsupportedError(check(plan.spec, target.arch).value());
  if (!fits_mask_blocks(plan.spec, plan.spec.tile, problem))
    throw UnsupportedError("tile '" + plan.spec.tile.text() + "' does not fit a block_mask with blocks of " +
                           std::to_string(problem.mask_block_q) + " queries and " +
                           std::to_string(problem.mask_block_k) + " keys; accepted: rows and columns that divide them");
  const ProblemShape shape = problem_shape(request.q, request.k, request.options);
  const std::int64_t num_m_blocks = ceil_div(shape.seqlen_q, plan.spec.tile.block_m);
  plan.params.num_m_blocks = static_cast<int>(num_m_blocks);
  plan.blocks = grid_blocks({"q", request.q}, shape.batch, num_m_blocks);
}

}  // namespace

void give_workspace(LaunchPlan& plan, Workspace* workspace) {
  const std::int64_t floats = plan.split_floats + plan.lse_floats;
  if (floats == 0) return;
  float* const memory = workspace->allocate(floats);
  const std::int64_t rows = std::int64_t{plan.params.num_splits} * plan.params.total_rows;
  for (ForwardLaunch* launch : {static_cast<ForwardLaunch*>(&plan), &plan.combine}) {
    launch->params.partial_out = memory;
    launch->params.partial_rows = memory + rows * kernel_value_dims(plan.spec);
    if (plan.lse_floats > 0) launch->params.softmax_lse = memory + plan.split_floats;
  }
}

LaunchPlan plan_forward(const ForwardRequest& request, const PlanTarget& target) {
  require_arguments(request);
  LaunchPlan plan;
  plan.spec = problem_spec(request.q, request.k, request.v, request.options, access_of(request));
  if (request.options.has_backward) require_head_dim_of_gradients(plan.spec.greatest_head_dim());
  if (plan.spec.head_dim > kMostNarrowHeadDim) plan.spec.kind = KernelKind::kForwardWide;
  plan.params = params_of(request);
  const Problem problem = problem_of(request.q, request.k, request.options, target.multiprocessors);
  if (takes_decode(request, plan.spec, problem, target.tiles))
    plan_decode(plan, request, target, problem);
  else
    plan_whole(plan, request, target, problem);
  if (!request.softmax_lse)
    plan.lse_floats = request.q.shape[kBatch] * request.q.shape[kHeads] * request.q.shape[kSeqlen];
  return plan;
}

}  // namespace flash_attn_jit
