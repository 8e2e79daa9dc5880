#include "runtime/request/backward.h"

#include <algorithm>

#include "generator/errors.h"
#include "generator/families/families.h"
#include "generator/integers.h"
#include "generator/legality.h"

namespace flash_attn_jit {
namespace {

void require_gradients(const BackwardRequest& request) {
  if (request.dq) {
    require_readable({"dq", *request.dq});
    require_shape({"dq", *request.dq}, request.q.shape, "q's");
  }
  if (!request.dkdv) return;
  for (const NamedTensor& tensor : {NamedTensor{"dk", request.dkdv->dk}, {"dv", request.dkdv->dv}})
    require_readable(tensor);
  require_shape({"dk", request.dkdv->dk}, request.k.shape, "k's");
  require_shape({"dv", request.dkdv->dv}, request.v.shape, "v's");
}

// Sums over sequences or heads are shared out only where attn_bias is the same for all.
bool may_share_out(std::int64_t parts, std::int64_t of_bias, std::int64_t all) {
  return of_bias == 1 ? parts >= 1 && parts <= std::max<std::int64_t>(all, 1) : parts == of_bias;
}

// Behind require_options(), which has seen attn_bias.
void require_bias_gradient(const BackwardRequest& request, const ProblemShape& shape) {
  if (!request.dbias) return;
  const BiasGradient& dbias = *request.dbias;
  const std::optional<PairTensor>& bias = request.options.bias;
  if (!bias || bias->type == PairType::kBool || dbias.type == PairType::kBool)
    throw ArgumentError({"dbias", "is given without an attn_bias that has a gradient",
                         "q's dtype or float32, with an attn_bias of either"});
  if (bytes_of(dbias.type) == 2 && dbias.type != pair_type_of(request.options.dtype))
    throw ArgumentError({"dbias", "has 16 bits an element, not of q's dtype", "q's dtype or float32"});
  const std::int64_t keys = request.options.varlen ? request.options.varlen->max_seqlen_k : shape.seqlen_k;
  const bool fits = may_share_out(dbias.shape[0], bias->shape[0], shape.batch) &&
                    may_share_out(dbias.shape[1], bias->shape[1], request.q.shape[kHeads]) &&
                    dbias.shape[2] == bias->shape[2] && dbias.shape[3] == keys;
  if (!fits)
    throw ArgumentError({"dbias", "has shape " + numbers_text(dbias.shape),
                         "attn_bias's, " + numbers_text(bias->shape) + ", with " + std::to_string(keys) +
                             " keys, and with more sequences or heads only where that has 1"});
  require_memory("dbias", dbias.data, std::ranges::all_of(dbias.shape, [](std::int64_t size) { return size > 0; }));
}

void require_arguments(const BackwardRequest& request) {
  const TensorView &q = request.q, &k = request.k;
  require_inputs(q, k, request.v, request.out);
  require_readable_by_elements({"dout", request.dout});
  require_shape({"dout", request.dout}, request.out.shape, "out's");
  require_gradients(request);
  require_row_memory("softmax_lse", request.softmax_lse, q);
  require_row_memory("delta", request.delta, q);
  if (request.options.dtype == DType::kBFloat16) require_row_memory("peaks", request.peaks, q);
  const ProblemShape shape = problem_shape(q, k, request.options);
  require_options(request.options, shape, q.shape[kHeads]);
  require_bias_gradient(request, shape);
}

GlobalAccess access_of(const BackwardRequest& request) {
  const auto fits = [](const TensorView& tensor) { return is_aligned(tensor) && tiles_fit_offsets(tensor); };
  bool all_fit = true;
  for (const TensorView* tensor : {&request.q, &request.k, &request.v, &request.out, &request.dout})
    all_fit = all_fit && fits(*tensor);
  if (request.dq) all_fit = all_fit && fits(*request.dq);
  if (request.dkdv) all_fit = all_fit && fits(request.dkdv->dk) && fits(request.dkdv->dv);
  return all_fit ? GlobalAccess::kVector16B : GlobalAccess::kElement2B;
}

FlashBwdParams params_of(const BackwardRequest& request) {
  FlashBwdParams params{};
  static_cast<AttentionParams&>(params) = attention_params(request.q, request.k, request.options);
  params.q = request.q.data;
  params.k = request.k.data;
  params.v = request.v.data;
  params.out = request.out.data;
  params.dout = request.dout.data;
  params.softmax_lse = request.softmax_lse;
  params.delta = request.delta;
  params.peaks = request.peaks;
  params.q_strides = strides_of(request.q);
  params.k_strides = strides_of(request.k);
  params.v_strides = strides_of(request.v);
  params.out_strides = strides_of(request.out);
  params.dout_strides = strides_of(request.dout);
  params.dout_dim_stride = stride_of(request.dout, kHeadDim);
  if (request.dq) {
    params.dq = request.dq->data;
    params.dq_strides = strides_of(*request.dq);
  }
  if (request.dkdv) {
    params.dk = request.dkdv->dk.data;
    params.dv = request.dkdv->dv.data;
    params.dk_strides = strides_of(request.dkdv->dk);
    params.dv_strides = strides_of(request.dkdv->dv);
  }
  params.softmax_scale = static_cast<float>(request.options.softmax_scale);
  params.dlse = request.dlse;
  params.dropout = dropout_params(request.options);
  if (request.dbias) {
    const auto& [batches, heads, rows, keys] = request.dbias->shape;
    params.dbias = {request.dbias->data,
                    request.dbias->type == PairType::kFloat32,
                    static_cast<int>(problem_shape(request.q, request.k, request.options).batch),
                    static_cast<int>(batches),
                    static_cast<int>(heads),
                    static_cast<int>(rows),
                    static_cast<int>(keys)};
  }
  return params;
}

// One side of the problem: its rows, as the blocks of a kernel share them out.
struct Side {
  NamedTensor tensor;
  std::int64_t batch, seqlen;
};

// One kernel, whose blocks own rows of `rows`.
BackwardLaunch lay_out(KernelSpec spec, KernelKind kind, const std::optional<TileConfig>& tile, const Side& rows,
                       const BackwardRequest& request, const FlashBwdParams& params, const PlanTarget& target,
                       const Problem& problem) {
  spec.kind = kind;
  spec = normalized(spec);
  spec.tile = tile ? *tile : target.tiles.choose(spec, problem);
  if (!has_rows(spec, spec.tile, problem.seqlen_k))
    throw UnsupportedError("tile '" + spec.tile.text() + "' of kind " + std::string(to_text(kind)) + " has " +
                           std::to_string(spec.tile.block_m) + " keys a block, for " +
                           std::to_string(problem.seqlen_k) + "; accepted: as many as there are");
  if (spec.tile.block_m < 1) throw UnsupportedError(check(spec, target.arch).value());
  if (!fits_mask_blocks(spec, spec.tile, problem))
    throw UnsupportedError("tile '" + spec.tile.text() + "' does not fit a block_mask with blocks of " +
                           std::to_string(problem.mask_block_q) + " queries and " +
                           std::to_string(problem.mask_block_k) + " keys; accepted: rows and columns that divide them");
  BackwardLaunch launch{spec, params};
  const std::int64_t row_blocks = (rows.seqlen + spec.tile.block_m - 1) / spec.tile.block_m;
  launch.params.num_row_blocks = static_cast<int>(row_blocks);
  if (request.options.user)
    launch.params.user = user_params(request.q, request.k, request.options, family_of(spec.kind).rows);
  launch.blocks = grid_blocks(rows.tensor, rows.batch, row_blocks * family_of(spec.kind).output_splits(spec));
  return launch;
}

// The kernel of attn_bias's gradient, whose blocks own keys and rows of that. One row is the sum over all queries; an
// attn_bias that is expanded, and so read as if it had one, has a gradient for each of them.
BackwardLaunch lay_out_bias(KernelSpec spec, const BackwardRequest& request, const FlashBwdParams& params,
                            const PlanTarget& target, const Problem& problem) {
  const auto& [batches, heads, rows, keys] = request.dbias->shape;
  spec.features.set(Feature::kOneRow, rows == 1);
  const TensorView parts{nullptr, {batches, rows, heads, 1}, {}};
  BackwardLaunch launch = lay_out(spec, KernelKind::kBackwardBias, request.dbias_tile, {{"attn_bias", parts}, 0, keys},
                                  request, params, target, problem);
  const std::int64_t row_tiles = ceil_div(rows, launch.spec.tile.block_n);
  launch.blocks = grid_blocks({"attn_bias", parts}, batches, launch.params.num_row_blocks * row_tiles);
  return launch;
}

// Whether one kernel makes all gradients.
bool takes_all_keys(const BackwardRequest& request, const KernelSpec& spec, const Problem& problem,
                    const TileChooser& tiles) {
  if (problem.seqlen_k == 0) return false;          // no block has rows
  if (spec.has(Feature::kBlockMask)) return false;  // rows of a block are those of one block of the mask
  if (request.all_keys_tile) return true;
  if (!request.dq || !request.dkdv || request.preprocess_tile || request.dkdv_tile || request.dq_tile) return false;
  return tiles.takes_all_keys(spec, problem);
}

}  // namespace

std::optional<TileConfig>& tile_of(BackwardRequest& request, KernelKind kind) {
  const KernelResults& made = family_of(kind).results;
  if (made.dbias) return request.dbias_tile;
  if (made.dq && made.dkdv) return request.all_keys_tile;
  return made.dq ? request.dq_tile : made.dkdv ? request.dkdv_tile : request.preprocess_tile;
}

const std::optional<TileConfig>& tile_of(const BackwardRequest& request, KernelKind kind) {
  return tile_of(const_cast<BackwardRequest&>(request), kind);
}

BackwardPlan plan_backward(const BackwardRequest& request, const PlanTarget& target) {
  require_arguments(request);
  const KernelSpec spec = problem_spec(request.q, request.k, request.v, request.options, access_of(request));
  require_head_dim_of_gradients(spec.greatest_head_dim());
  const FlashBwdParams params = params_of(request);
  const ProblemShape shape = problem_shape(request.q, request.k, request.options);
  const NamedTensor q{"q", request.q}, k{"k", request.k};

  FlashBwdParams all_rows = params;  // the preprocess kernel asks of no row which sequence it belongs to
  all_rows.seqlen_q = static_cast<int>(request.q.shape[kSeqlen]);
  const Side rows{q, request.q.shape[kBatch], request.q.shape[kSeqlen]}, queries{q, shape.batch, shape.seqlen_q},
      keys{k, shape.batch, shape.seqlen_k};
  const Problem problem = problem_of(request.q, request.k, request.options, target.multiprocessors);
  BackwardPlan plan{};
  if (request.dbias) plan[4] = lay_out_bias(spec, request, params, target, problem);
  if (takes_all_keys(request, spec, problem, target.tiles)) {
    plan[3] =
        lay_out(spec, KernelKind::kBackwardAllKeys, request.all_keys_tile, keys, request, params, target, problem);
    return plan;
  }
  // A sink's gradient is made of delta, and attn_bias's too.
  if (request.dkdv || request.dq || request.dbias || request.options.sinks != nullptr)
    plan[0] = lay_out(spec, KernelKind::kBackwardPreprocess, request.preprocess_tile, rows, request, all_rows, target,
                      problem);
  if (request.dkdv)
    plan[1] = lay_out(spec, KernelKind::kBackwardDkDv, request.dkdv_tile, keys, request, params, target, problem);
  if (request.dq)
    plan[2] = lay_out(spec, KernelKind::kBackwardDq, request.dq_tile, queries, request, params, target, problem);
  return plan;
}

}  // namespace flash_attn_jit
