#include "runtime/request/tensor_view.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <string>

#include "generator/errors.h"

namespace flash_attn_jit {
namespace {

constexpr std::int64_t kMostInt = std::numeric_limits<int>::max();
// Kernels count rows in ints, and round them up to whole blocks on the way.
constexpr std::int64_t kMostExtent = kMostInt - 65535;
constexpr std::int64_t kVectorElements = 8;  // fp16 elements in 16 bytes

// As the caller of a tensor of `rank` dimensions counts.
std::string shape_came(const TensorView& view) { return "has shape " + numbers_text(view.shape, view.rank); }

bool has_elements(const TensorView& view) {
  return std::all_of(view.shape.begin(), view.shape.end(), [](std::int64_t extent) { return extent > 0; });
}

bool has_contiguous_rows(const TensorView& view) {
  return !has_elements(view) || view.shape[kHeadDim] <= 1 || view.strides[kHeadDim] == 1;
}

[[noreturn]] void refuse_strides(const NamedTensor& tensor, const std::string& advice) {
  throw ArgumentError(
      {tensor.name, "has strides " + numbers_text(tensor.view.strides, tensor.view.rank), kAcceptedLastDim, advice});
}

bool has_memory(const TensorView& view) { return view.data != nullptr && has_elements(view); }

// In memory, counted in fp16 elements.
std::int64_t place_of(const TensorView& view) { return reinterpret_cast<std::intptr_t>(view.data) / 2; }

// Elements from its first one to behind its last one.
std::int64_t extent_of(const TensorView& view) {
  std::int64_t last = 0;
  for (std::size_t i = 0; i < view.shape.size(); ++i) last += (view.shape[i] - 1) * view.strides[i];
  return last + 1;
}

// Elements that lie one after the other, and a number that the distances between such runs are multiples of.
struct Runs {
  std::int64_t length = 1, apart = 0;
};

Runs runs_of(const TensorView& view) {
  Runs runs;
  for (int dim = kHeadDim; dim >= kBatch; --dim) {
    const std::int64_t stride = stride_of(view, static_cast<Dim>(dim));
    if (stride == runs.length && runs.apart == 0)
      runs.length *= view.shape[dim];
    else
      runs.apart = std::gcd(runs.apart, stride);
  }
  return runs;
}

// Whether every run of `a` lies between runs of `b`, whose first element is `distance` elements behind a's.
bool lie_between(const TensorView& a, const TensorView& b, std::int64_t distance) {
  const Runs of_a = runs_of(a), of_b = runs_of(b);
  const std::int64_t period = std::gcd(of_a.apart, of_b.apart);
  if (period == 0) return false;
  const std::int64_t behind = (distance % period + period) % period;  // of the last run of `a` before a run of `b`
  return behind >= of_a.length && behind + of_b.length <= period;
}

void require_heads(std::int64_t num_heads, std::int64_t num_heads_k) {
  if (num_heads == 0 && num_heads_k == 0) return;
  if (num_heads_k > 0 && num_heads > 0 && num_heads % num_heads_k == 0) return;
  throw ArgumentError({"q", "has " + std::to_string(num_heads) + " heads and k " + std::to_string(num_heads_k),
                       "a number of heads of q that is a multiple of k's"});
}

}  // namespace

std::string numbers_text(const std::array<std::int64_t, 4>& numbers, int rank) {
  std::string text;
  for (std::size_t i = numbers.size() - rank; i < numbers.size(); ++i)
    text += (text.empty() ? "(" : ", ") + std::to_string(numbers[i]);
  return text + ")";
}

void require_shape(const NamedTensor& tensor, const std::array<std::int64_t, 4>& expected, const char* why) {
  if (tensor.view.shape == expected) return;
  throw ArgumentError({tensor.name, shape_came(tensor.view), numbers_text(expected, tensor.view.rank) + ", " + why});
}

void require_readable_by_elements(const NamedTensor& tensor) {
  const TensorView& view = tensor.view;
  for (const std::int64_t extent : view.shape)
    if (extent < 0 || extent > kMostExtent)
      throw UnsupportedError(
          {tensor.name, shape_came(view), "0 to " + std::to_string(kMostExtent) + " in each dimension"});
  require_memory(tensor.name, view.data, has_elements(view));
}

void require_readable(const NamedTensor& tensor) {
  require_readable_by_elements(tensor);
  if (!has_contiguous_rows(tensor.view)) refuse_strides(tensor, "Use " + std::string(tensor.name) + ".contiguous()");
}

void require_writable(const NamedTensor& tensor) {
  require_readable_by_elements(tensor);
  if (!has_contiguous_rows(tensor.view))
    refuse_strides(tensor, "Allocate it so: what is written into a copy does not come back");
}

void require_inputs(const TensorView& q, const TensorView& k, const TensorView& v, const TensorView& out, bool paged) {
  for (const NamedTensor& tensor : {NamedTensor{"q", q}, {"k", k}, {"v", v}}) require_readable(tensor);
  require_writable({"out", out});
  require_shape({"k", k}, {(paged ? k : q).shape[kBatch], k.shape[kSeqlen], k.shape[kHeads], q.shape[kHeadDim]},
                paged ? "pages with q's head dim" : "with q's batch and head dim");
  const std::int64_t dims_v = v.shape[kHeadDim];
  require_shape({"v", v}, {k.shape[kBatch], k.shape[kSeqlen], k.shape[kHeads], dims_v}, "k's, with any last dimension");
  require_shape({"out", out}, {q.shape[kBatch], q.shape[kSeqlen], q.shape[kHeads], dims_v}, "q's with v's head dim");
  require_heads(q.shape[kHeads], k.shape[kHeads]);
}

void require_apart(const NamedTensor& written, const NamedTensor& read) {
  const TensorView &a = written.view, &b = read.view;
  if (!has_memory(a) || !has_memory(b)) return;
  const std::int64_t distance = place_of(b) - place_of(a);
  if (distance >= extent_of(a) || -distance >= extent_of(b) || lie_between(a, b, distance)) return;
  throw ArgumentError(
      {written.name, std::string("shares memory with ") + read.name, "memory that is none of q's, k's or v's"});
}

void require_memory(const char* name, const void* memory, bool is_needed) {
  if (memory == nullptr && is_needed)
    throw ArgumentError(
        {name, "has elements but no memory (a null pointer, as a fake tensor's)", "a tensor with its data"});
}

void require_row_memory(const char* name, const float* rows, const TensorView& q) {
  require_memory(name, rows, q.shape[kBatch] > 0 && q.shape[kSeqlen] > 0 && q.shape[kHeads] > 0);
}

std::int64_t stride_of(const TensorView& view, Dim dim) { return view.shape[dim] > 1 ? view.strides[dim] : 0; }

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
    throw UnsupportedError({tensor.name,
                            shape_came(tensor.view) + ", which takes " + std::to_string(batch) + " x " +
                                std::to_string(heads) + " x " + std::to_string(row_blocks) + " thread blocks",
                            "at most " + std::to_string(kMostInt), "Split the batch"});
  return batch_heads * row_blocks;
}

}  // namespace flash_attn_jit
