#include "runtime/backward_plan.h"

#include "generator/errors.h"
#include "generator/legality.h"
#include "generator/tile_layout.h"

namespace flash_attn_jit {
namespace {

void require_arguments(const BackwardRequest& request) {
  const TensorView &q = request.q, &k = request.k;
  for (const NamedTensor& tensor :
       {NamedTensor{"q", q}, {"k", k}, {"v", request.v}, {"out", request.out}, {"dout", request.dout},
        {"dq", request.dq}, {"dk", request.dk}, {"dv", request.dv}})
    require_readable(tensor);
  require_shape({"k", k}, {q.shape[kBatch], k.shape[kSeqlen], k.shape[kHeads], q.shape[kHeadDim]},
                "with q's batch and head dim");
  for (const NamedTensor& tensor :
       {NamedTensor{"out", request.out}, {"dout", request.dout}, {"dq", request.dq}})
    require_shape(tensor, q.shape, "q's");
  for (const NamedTensor& tensor : {NamedTensor{"v", request.v}, {"dk", request.dk}, {"dv", request.dv}})
    require_shape(tensor, k.shape, "k's");
  require_heads(q.shape[kHeads], k.shape[kHeads]);
  require_row_memory("softmax_lse", request.softmax_lse, q);
  require_row_memory("delta", request.delta, q);
  require_finite_scale(request.softmax_scale);
}

GlobalAccess access_of(const BackwardRequest& request) {
  for (const TensorView* tensor : {&request.q, &request.k, &request.v, &request.out, &request.dout, &request.dq,
                                   &request.dk, &request.dv})
    if (!is_aligned(*tensor) || !tiles_fit_offsets(*tensor)) return GlobalAccess::kElement2B;
  return GlobalAccess::kVector16B;
}

TensorStrides strides_of(const TensorView& view) {
  return {stride_of(view, kBatch), stride_of(view, kSeqlen), stride_of(view, kHeads)};
}

FlashBwdParams params_of(const BackwardRequest& request) {
  FlashBwdParams params{};
  params.q = request.q.data;
  params.k = request.k.data;
  params.v = request.v.data;
  params.out = request.out.data;
  params.dout = request.dout.data;
  params.dq = request.dq.data;
  params.dk = request.dk.data;
  params.dv = request.dv.data;
  params.softmax_lse = request.softmax_lse;
  params.delta = request.delta;
  params.q_strides = strides_of(request.q);
  params.k_strides = strides_of(request.k);
  params.v_strides = strides_of(request.v);
  params.out_strides = strides_of(request.out);
  params.dout_strides = strides_of(request.dout);
  params.dq_strides = strides_of(request.dq);
  params.dk_strides = strides_of(request.dk);
  params.dv_strides = strides_of(request.dv);
  params.seqlen_q = static_cast<int>(request.q.shape[kSeqlen]);
  params.seqlen_k = static_cast<int>(request.k.shape[kSeqlen]);
  params.num_heads = static_cast<int>(request.q.shape[kHeads]);
  params.num_heads_k = static_cast<int>(request.k.shape[kHeads]);
  params.softmax_scale = request.softmax_scale;
  params.softmax_scale_log2 = magnitude_log2(request.softmax_scale);
  params.sign = sign_flip(request.softmax_scale);
  return params;
}

// One kernel, whose blocks own rows of `rows`.
BackwardLaunch lay_out(KernelSpec spec, KernelKind kind, const std::optional<TileConfig>& tile,
                       const NamedTensor& rows, const FlashBwdParams& params, const ArchLimits& arch,
                       int multiprocessors) {
  const auto& shape = rows.view.shape;
  spec.kind = kind;
  spec = normalized(spec);
  spec.tile = tile ? *tile
                   : choose_tile(spec, arch, {shape[kSeqlen], shape[kBatch] * shape[kHeads], multiprocessors});
  if (spec.tile.block_m < 1) throw UnsupportedError(check(spec, arch).value());
  BackwardLaunch launch{spec, params};
  const std::int64_t row_blocks = (shape[kSeqlen] + spec.tile.block_m - 1) / spec.tile.block_m;
  launch.params.num_row_blocks = static_cast<int>(row_blocks);
  launch.blocks = grid_blocks(rows, row_blocks * output_splits(spec));
  return launch;
}

}  // namespace

BackwardPlan lay_out_backward(const BackwardRequest& request, const ArchLimits& arch, int multiprocessors) {
  require_arguments(request);
  const KernelSpec spec = problem_spec(request.q, request.k, request.mask, access_of(request));
  const FlashBwdParams params = params_of(request);
  const NamedTensor q{"q", request.q}, k{"k", request.k};
  return {lay_out(spec, KernelKind::kBackwardPreprocess, std::nullopt, q, params, arch, multiprocessors),
          lay_out(spec, KernelKind::kBackwardDkDv, request.dkdv_tile, k, params, arch, multiprocessors),
          lay_out(spec, KernelKind::kBackwardDq, request.dq_tile, q, params, arch, multiprocessors)};
}

BackwardPlan plan_backward(const BackwardRequest& request, const ArchLimits& arch, int multiprocessors) {
  const BackwardPlan plan = lay_out_backward(request, arch, multiprocessors);
  for (const BackwardLaunch& launch : plan)
    if (const auto reason = check(launch.spec, arch)) throw UnsupportedError(*reason);
  return plan;
}

}  // namespace flash_attn_jit
