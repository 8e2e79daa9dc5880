// Tensors as the caller gives them, and the checks that every kernel family's plan makes of them.
#pragma once

#include <array>
#include <cstdint>
#include <string>

#include "generator/kernel_spec.h"

namespace flash_attn_jit {

// A 4-d tensor (batch, seqlen, heads, head_dim); strides count elements; the last one is 1.
struct TensorView {
  void* data = nullptr;
  std::array<std::int64_t, 4> shape{};
  std::array<std::int64_t, 4> strides{};
  int rank = 4;  // as the caller counts: 3 where it has no batch, shape[kBatch] is 1 and messages leave it out
};

enum Dim { kBatch, kSeqlen, kHeads, kHeadDim };

// Of every tensor but dout, in words.
inline constexpr const char* kAcceptedLastDim = "a last dimension that is contiguous (stride 1)";

struct NamedTensor {
  const char* name;
  const TensorView& view;
};

// The last `rank` of them, in words: "(2, 64, 8, 128)".
std::string numbers_text(const std::array<std::int64_t, 4>& numbers, int rank = 4);

// ---- what contradicts the others is an ArgumentError that names the tensor ----

void require_shape(const NamedTensor& tensor, const std::array<std::int64_t, 4>& expected, const char* why);
void require_readable(const NamedTensor& tensor);
// The same of what is written in place, where a copy is no help.
void require_writable(const NamedTensor& tensor);
// The same, but for its last dimension, which may have any stride.
void require_readable_by_elements(const NamedTensor& tensor);
// What both passes read: each one is readable, and their shapes go together.
// `paged`: k and v are pages, as many as there are.
void require_inputs(const TensorView& q, const TensorView& k, const TensorView& v, const TensorView& out,
                    bool paged = false);
// `written` shares no memory with `read`. Their bytes may lie between one another's, as slices of one tensor do.
void require_apart(const NamedTensor& written, const NamedTensor& read);
// Memory that `is_needed` is there.
void require_memory(const char* name, const void* memory, bool is_needed);
// A (batch, num_heads, seqlen_q) float32 tensor for the rows of `q` has memory, unless there are no rows.
void require_row_memory(const char* name, const float* rows, const TensorView& q);

// ---- how kernels see them ----

// A dimension of one element may come with any stride; its index is always 0.
std::int64_t stride_of(const TensorView& view, Dim dim);

// May its rows be read and written 16 bytes at a time?
bool is_aligned(const TensorView& view);

// Vector access counts bytes within a tile of up to 64 rows in 32 bits: see TileOffset in templates/tile_copy.cuh.
bool tiles_fit_offsets(const TensorView& view);

// batch x heads of `tensor` x row_blocks. Throws UnsupportedError where that does not fit a grid.
std::int64_t grid_blocks(const NamedTensor& tensor, std::int64_t batch, std::int64_t row_blocks);

}  // namespace flash_attn_jit
