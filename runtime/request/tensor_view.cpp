#include "runtime/request/tensor_view.h"

#include <algorithm>
#include <limits>

#include "generator/errors.h"

namespace flash_attn_jit {
namespace {

constexpr std::int64_t kMostInt = std::numeric_limits<int>::max();
// Kernels count rows in ints, and round them up to whole blocks on the way.
constexpr std::int64_t kMostExtent = kMostInt - 65535;
constexpr std::int64_t kVectorElements = 8;  // fp16 elements in 16 bytes
std::string text_of(const std::array<std::int64_t, 4>& numbers) {
  std::string text;
  for (const std::int64_t number : numbers) text += (text.empty() ? "(" : ", ") + std::to_string(number);
  return text + ")";
}

bool has_elements(const TensorView& view) {
  return std::all_of(view.shape.begin(), view.shape.end(), [](std::int64_t extent) { return extent > 0; });
}

}  // namespace

void require_shape(const NamedTensor& tensor, const std::array<std::int64_t, 4>& expected,
                   const std::string& why) {
  if (tensor.view.shape == expected) return;
  throw ArgumentError(std::string(tensor.name) + " has shape " + text_of(tensor.view.shape) +
                      "; accepted: " + text_of(expected) + ", " + why);
}

void require_readable_by_elements(const NamedTensor& tensor) {
  const TensorView& view = tensor.view;
  for (const std::int64_t extent : view.shape)
    if (extent < 0 || extent > kMostExtent)
      throw UnsupportedError(std::string(tensor.name) + " has shape " + text_of(view.shape) +
                             "; accepted: 0 to " + std::to_string(kMostExtent) + " in each dimension");
  if (has_elements(view) && view.data == nullptr)
    throw ArgumentError(std::string(tensor.name) + " has shape " + text_of(view.shape) +
                        " and no memory (a null pointer); accepted: a tensor with its data");
}

void require_readable(const NamedTensor& tensor) {
  require_readable_by_elements(tensor);
  const TensorView& view = tensor.view;
  if (has_elements(view) && view.shape[kHeadDim] > 1 && view.strides[kHeadDim] != 1)
    throw ArgumentError(std::string(tensor.name) + " has strides " + text_of(view.strides) +
                        "; accepted: a contiguous last dimension (stride 1)");
}

void require_heads(std::int64_t num_heads, std::int64_t num_heads_k) {
  if (num_heads == 0 && num_heads_k == 0) return;
  if (num_heads_k > 0 && num_heads > 0 && num_heads % num_heads_k == 0) return;
  throw ArgumentError("q has " + std::to_string(num_heads) + " heads and k " + std::to_string(num_heads_k) +
                      "; accepted: a number of heads of q that is a multiple of k's");
}

void require_row_memory(const char* name, const float* rows, const TensorView& q) {
  const bool has_rows = q.shape[kBatch] > 0 && q.shape[kSeqlen] > 0 && q.shape[kHeads] > 0;
  if (rows == nullptr && has_rows)
    throw ArgumentError(std::string(name) +
                        " is a null pointer; accepted: memory for (batch, num_heads, seqlen_q) float32");
}

std::int64_t stride_of(const TensorView& view, Dim dim) {
  return view.shape[dim] > 1 ? view.strides[dim] : 0;
}

bool is_aligned(const TensorView& view) {
  if (view.shape[kHeadDim] % kVectorElements != 0) return false;
  return !has_elements(view) ||
         (view.strides[kHeadDim] == 1 && reinterpret_cast<std::uintptr_t>(view.data) % 16 == 0 &&
          stride_of(view, kBatch) % kVectorElements == 0 && stride_of(view, kSeqlen) % kVectorElements == 0 &&
          stride_of(view, kHeads) % kVectorElements == 0);
}

bool tiles_fit_offsets(const TensorView& view) {
  constexpr std::int64_t kMostRowsOfTile = 64;
  return stride_of(view, kSeqlen) < kMostInt / (2 * kMostRowsOfTile);
}

// batch x heads x row_blocks, each below 2^31.
std::int64_t grid_blocks(const NamedTensor& tensor, std::int64_t batch, std::int64_t row_blocks) {
  const std::int64_t heads = tensor.view.shape[kHeads], batch_heads = batch * heads;
  if (batch_heads == 0 || row_blocks == 0) return 0;
  if (batch_heads > kMostInt / row_blocks)
    throw UnsupportedError(std::string(tensor.name) + " has shape " + text_of(tensor.view.shape) + ", which takes " +
                           std::to_string(batch) + " x " + std::to_string(heads) + " x " +
                           std::to_string(row_blocks) +
                           " thread blocks; accepted: at most 2147483647. Split the batch");
  return batch_heads * row_blocks;
}

}  // namespace flash_attn_jit
