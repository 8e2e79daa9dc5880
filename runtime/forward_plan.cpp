#include "runtime/forward_plan.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>

#include "generator/errors.h"
#include "generator/legality.h"

namespace flash_attn_jit {
namespace {

enum Dim { kBatch, kSeqlen, kHeads, kHeadDim };

constexpr std::int64_t kMostInt = std::numeric_limits<int>::max();
constexpr std::int64_t kVectorElements = 8;  // fp16 elements in 16 bytes
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLeastScale = 0x1p-100f;  // see softmax_scale_log2 in templates/flash_fwd_params.cuh
constexpr unsigned kFlipBothSigns = 0x80008000u;

struct NamedTensor {
  const char* name;
  const TensorView& view;
};

std::string text_of(const std::array<std::int64_t, 4>& numbers) {
  std::string text;
  for (const std::int64_t number : numbers) text += (text.empty() ? "(" : ", ") + std::to_string(number);
  return text + ")";
}

bool has_elements(const TensorView& view) {
  return std::all_of(view.shape.begin(), view.shape.end(), [](std::int64_t extent) { return extent > 0; });
}

void require_shape(const NamedTensor& tensor, const std::array<std::int64_t, 4>& expected,
                   const std::string& why) {
  if (tensor.view.shape == expected) return;
  throw ArgumentError(std::string(tensor.name) + " has shape " + text_of(tensor.view.shape) +
                      "; accepted: " + text_of(expected) + ", " + why);
}

void require_readable(const NamedTensor& tensor) {
  const TensorView& view = tensor.view;
  for (const std::int64_t extent : view.shape)
    if (extent < 0 || extent > kMostInt)
      throw UnsupportedError(std::string(tensor.name) + " has shape " + text_of(view.shape) +
                             "; accepted: 0 to 2147483647 in each dimension");
  if (!has_elements(view)) return;
  if (view.data == nullptr)
    throw ArgumentError(std::string(tensor.name) + " has shape " + text_of(view.shape) +
                        " and no memory (a null pointer); accepted: a tensor with its data");
  if (view.shape[kHeadDim] > 1 && view.strides[kHeadDim] != 1)
    throw ArgumentError(std::string(tensor.name) + " has strides " + text_of(view.strides) +
                        "; accepted: a contiguous last dimension (stride 1)");
}

void require_heads(std::int64_t num_heads, std::int64_t num_heads_k) {
  if (num_heads == 0 && num_heads_k == 0) return;
  if (num_heads_k > 0 && num_heads > 0 && num_heads % num_heads_k == 0) return;
  throw ArgumentError("q has " + std::to_string(num_heads) + " heads and k " + std::to_string(num_heads_k) +
                      "; accepted: a number of heads of q that is a multiple of k's");
}

void require_arguments(const ForwardRequest& request) {
  const TensorView &q = request.q, &k = request.k;
  for (const NamedTensor& tensor : {NamedTensor{"q", q}, {"k", k}, {"v", request.v}, {"out", request.out}})
    require_readable(tensor);
  require_shape({"k", k}, {q.shape[kBatch], k.shape[kSeqlen], k.shape[kHeads], q.shape[kHeadDim]},
                "with q's batch and head dim");
  require_shape({"v", request.v}, k.shape, "k's");
  require_shape({"out", request.out}, q.shape, "q's");
  require_heads(q.shape[kHeads], k.shape[kHeads]);
  const bool has_rows = q.shape[kBatch] > 0 && q.shape[kSeqlen] > 0 && q.shape[kHeads] > 0;
  if (request.softmax_lse == nullptr && has_rows)
    throw ArgumentError(
        "softmax_lse is a null pointer; accepted: memory for (batch, num_heads, seqlen_q) float32");
  if (!std::isfinite(request.softmax_scale * kLog2E))
    throw ArgumentError("softmax_scale is " + std::to_string(request.softmax_scale) +
                        "; accepted: a finite number");
}

// A dimension of one element may come with any stride; its index is always 0.
std::int64_t stride_of(const TensorView& view, Dim dim) {
  return view.shape[dim] > 1 ? view.strides[dim] : 0;
}

bool is_aligned(const TensorView& view) {
  return !has_elements(view) ||
         (reinterpret_cast<std::uintptr_t>(view.data) % 16 == 0 &&
          stride_of(view, kBatch) % kVectorElements == 0 && stride_of(view, kSeqlen) % kVectorElements == 0 &&
          stride_of(view, kHeads) % kVectorElements == 0);
}

// Vector access counts bytes within a tile of up to 64 keys in 32 bits: see TileOffset in
// templates/tile_copy.cuh.
bool tiles_fit_offsets(const TensorView& view) {
  constexpr std::int64_t kMostKeysOfTile = 64;
  return stride_of(view, kSeqlen) < kMostInt / (2 * kMostKeysOfTile);
}

GlobalAccess access_of(const ForwardRequest& request) {
  const bool aligned = tiles_fit_offsets(request.k) && tiles_fit_offsets(request.v) &&
                       request.q.shape[kHeadDim] % kVectorElements == 0 && is_aligned(request.q) &&
                       is_aligned(request.k) && is_aligned(request.v) && is_aligned(request.out);
  return aligned ? GlobalAccess::kVector16B : GlobalAccess::kElement2B;
}

// Everything of the spec but its tile. Throws where no tile can make it legal.
KernelSpec spec_without_tile(const ForwardRequest& request, const ArchLimits& arch) {
  const std::int64_t num_heads_k = request.k.shape[kHeads];
  KernelSpec spec;
  spec.head_dim = static_cast<int>(request.q.shape[kHeadDim]);
  spec.mask = request.mask;
  spec.group_size = num_heads_k > 0 ? static_cast<int>(request.q.shape[kHeads] / num_heads_k) : 1;
  spec.access = access_of(request);
  // The table of tiles answers for legal head dims alone.
  if (spec.head_dim < 1 || spec.head_dim > 256) throw UnsupportedError(check(spec, arch).value());
  return spec;
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
  params.softmax_scale_log2 = std::max(std::fabs(request.softmax_scale) * kLog2E, kLeastScale);
  params.q_sign = request.softmax_scale < 0 ? kFlipBothSigns : 0;
  return params;
}

// batch x num_heads x num_m_blocks, each below 2^31, where it fits a grid.
std::int64_t grid_blocks(const ForwardRequest& request, std::int64_t num_m_blocks) {
  const std::int64_t batch_heads = request.q.shape[kBatch] * request.q.shape[kHeads];
  if (batch_heads == 0 || num_m_blocks == 0) return 0;
  if (batch_heads > kMostInt / num_m_blocks)
    throw UnsupportedError("q has shape " + text_of(request.q.shape) + ", which takes " +
                           std::to_string(request.q.shape[kBatch]) + " x " +
                           std::to_string(request.q.shape[kHeads]) + " x " + std::to_string(num_m_blocks) +
                           " thread blocks; accepted: at most 2147483647. Split the batch");
  return batch_heads * num_m_blocks;
}

}  // namespace

LaunchPlan lay_out_forward(const ForwardRequest& request, const ArchLimits& arch, int multiprocessors) {
  require_arguments(request);
  LaunchPlan plan;
  plan.spec = spec_without_tile(request, arch);
  const std::int64_t seqlen_q = request.q.shape[kSeqlen];
  const ProblemSize size{seqlen_q, request.q.shape[kBatch] * request.q.shape[kHeads], multiprocessors};
  plan.spec.tile = request.tile ? *request.tile : choose_tile(plan.spec, arch, size);
  if (plan.spec.tile.block_m < 1) throw UnsupportedError(check(plan.spec, arch).value());
  const std::int64_t num_m_blocks = (seqlen_q + plan.spec.tile.block_m - 1) / plan.spec.tile.block_m;
  plan.params = params_of(request, num_m_blocks);
  plan.blocks = grid_blocks(request, num_m_blocks);
  return plan;
}

LaunchPlan plan_forward(const ForwardRequest& request, const ArchLimits& arch, int multiprocessors) {
  const LaunchPlan plan = lay_out_forward(request, arch, multiprocessors);
  if (const auto reason = check(plan.spec, arch)) throw UnsupportedError(*reason);
  return plan;
}

}  // namespace flash_attn_jit
