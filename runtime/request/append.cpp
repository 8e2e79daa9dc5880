#include "runtime/request/append.h"

#include <limits>

#include "generator/errors.h"
#include "generator/families/families.h"
#include "generator/integers.h"
#include "generator/legality.h"

namespace flash_attn_jit {
namespace {

constexpr std::int64_t kMostRows = std::numeric_limits<int>::max() / 2;

void require_rotary(const Rotary& rotary, std::int64_t head_dim) {
  if (rotary.dims < 2 || rotary.dims > head_dim || rotary.dims % 2 != 0)
    throw ArgumentError({"rotary_cos",
                         "turns " + std::to_string(rotary.dims) + " dims of a head, twice its last dimension",
                         "an even number up to head_dim, " + std::to_string(head_dim)});
  if (rotary.rows < 1) throw ArgumentError({"rotary_cos", "has no rows", "a row for each place that a key may have"});
}

void require_new_rows(std::int64_t rows_new, std::int64_t rows) {
  if (rows_new > rows)
    throw ArgumentError({"k", "has " + std::to_string(rows_new) + " rows for each sequence",
                         "at most " + std::to_string(rows) + ", the rows that a sequence has in k_cache"});
}

void require_arguments(const AppendRequest& request) {
  const TensorView &k_new = request.k_new, &k = request.k;
  for (const NamedTensor& tensor : {NamedTensor{"k", k_new}, {"v", request.v_new}}) require_readable(tensor);
  for (const NamedTensor& tensor : {NamedTensor{"k_cache", k}, {"v_cache", request.v}}) require_writable(tensor);
  const std::int64_t batch = k_new.shape[kBatch], heads = k.shape[kHeads], dims = k.shape[kHeadDim];
  const std::int64_t dims_v = request.v.shape[kHeadDim];
  require_head_dims(dims, dims_v);
  require_shape({"k", k_new}, {batch, k_new.shape[kSeqlen], heads, dims}, "with k_cache's heads and head dim");
  require_shape({"v", request.v_new}, {batch, k_new.shape[kSeqlen], heads, dims_v}, "k's with v_cache's head dim");
  require_shape({"v_cache", request.v}, {k.shape[kBatch], k.shape[kSeqlen], heads, dims_v},
                "k_cache's, with any last dimension");
  if (!request.pages) require_shape({"k_cache", k}, {batch, k.shape[kSeqlen], heads, dims}, "with k's batch");
  require_new_rows(k_new.shape[kSeqlen], cache_rows(request));
  require_memory("cache_seqlens", request.used, batch > 0);
  if (!request.rotary) return;
  require_rotary(*request.rotary, dims);
  const TensorView& q = request.q;
  for (const NamedTensor& tensor : {NamedTensor{"q", q}, {"q_turned", request.q_turned}}) require_readable(tensor);
  require_shape({"q", q}, {batch, q.shape[kSeqlen], q.shape[kHeads], dims}, "with k's batch and head dim");
  require_shape({"q_turned", request.q_turned}, q.shape, "q's");
}

RotaryParams params_of(const Rotary& rotary) {
  return {.cos = rotary.cos,
          .sin = rotary.sin,
          .cos_stride = rotary.cos_stride,
          .sin_stride = rotary.sin_stride,
          .rows = static_cast<int>(std::min(rotary.rows, kMostRows)),
          .dims = static_cast<int>(rotary.dims),
          .interleaved = rotary.interleaved};
}

FlashAppendParams params_of(const AppendRequest& request) {
  FlashAppendParams params{};
  params.k_new = request.k_new.data;
  params.v_new = request.v_new.data;
  params.k = request.k.data;
  params.v = request.v.data;
  params.k_new_strides = strides_of(request.k_new);
  params.v_new_strides = strides_of(request.v_new);
  params.k_strides = strides_of(request.k);
  params.v_strides = strides_of(request.v);
  params.batch = static_cast<int>(request.k_new.shape[kBatch]);
  params.seqlen_new = static_cast<int>(request.k_new.shape[kSeqlen]);
  params.num_heads_k = static_cast<int>(request.k.shape[kHeads]);
  params.cache_rows = static_cast<int>(cache_rows(request));
  params.queries_advance = request.queries_advance;
  params.cache.used = request.used;
  if (request.pages) set_pages(params.cache, *request.pages, request.k);
  if (!request.rotary) return params;
  params.q = request.q.data;
  params.q_turned = request.q_turned.data;
  params.q_strides = strides_of(request.q);
  params.q_turned_strides = strides_of(request.q_turned);
  params.seqlen_q = static_cast<int>(request.q.shape[kSeqlen]);
  params.num_heads = static_cast<int>(request.q.shape[kHeads]);
  params.rotary = params_of(*request.rotary);
  return params;
}

}  // namespace

std::int64_t cache_rows(const AppendRequest& request) {
  return request.k.shape[kSeqlen] * (request.pages ? request.pages->columns : 1);
}

AppendLaunch plan_append(const AppendRequest& request, const PlanTarget& target) {
  require_arguments(request);
  if (cache_rows(request) > kMostRows)
    throw UnsupportedError({"k_cache", "has room for " + std::to_string(cache_rows(request)) + " keys a sequence",
                            "at most " + std::to_string(kMostRows)});
  AppendLaunch launch;
  launch.params = params_of(request);
  launch.spec.kind = KernelKind::kAppend;
  launch.spec.dtype = request.dtype;
  launch.spec.set_head_dims(static_cast<int>(request.k.shape[kHeadDim]), static_cast<int>(request.v.shape[kHeadDim]));
  launch.spec.access = GlobalAccess::kElement2B;  // one kernel for all
  launch.spec.tile = target.tiles.choose(launch.spec, {});
  const FlashAppendParams& params = launch.params;
  const std::int64_t rows =
      2 * std::int64_t{params.seqlen_new} * params.num_heads_k + std::int64_t{params.seqlen_q} * params.num_heads;
  if (rows > 0 && params.batch > kMostRows / rows)
    throw UnsupportedError(
        {"k", "has more rows than a launch has", "at most " + std::to_string(kMostRows), "Split the batch"});
  launch.blocks = ceil_div(rows * params.batch, launch.spec.tile.warps);
  return launch;
}

}  // namespace flash_attn_jit
