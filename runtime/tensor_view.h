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
};

enum Dim { kBatch, kSeqlen, kHeads, kHeadDim };

struct NamedTensor {
  const char* name;
  const TensorView& view;
};

// ---- what contradicts the others is an ArgumentError that names the tensor ----

void require_shape(const NamedTensor& tensor, const std::array<std::int64_t, 4>& expected, const std::string& why);
void require_readable(const NamedTensor& tensor);
void require_heads(std::int64_t num_heads, std::int64_t num_heads_k);
void require_finite_scale(float softmax_scale);
// A (batch, num_heads, seqlen_q) float32 tensor for the rows of `q` has memory, unless there are no rows.
void require_row_memory(const char* name, const float* rows, const TensorView& q);

// ---- how kernels see them ----

// The spec of a problem, but for its kind and tile. Throws UnsupportedError where no tile can make it legal.
KernelSpec problem_spec(const TensorView& q, const TensorView& k, Mask mask, GlobalAccess access);

// A dimension of one element may come with any stride; its index is always 0.
std::int64_t stride_of(const TensorView& view, Dim dim);

// May its rows be read and written 16 bytes at a time?
bool is_aligned(const TensorView& view);

// Vector access counts bytes within a tile of up to 64 rows in 32 bits: see TileOffset in templates/tile_copy.cuh.
bool tiles_fit_offsets(const TensorView& view);

// |softmax_scale| x log2(e), not below what keeps a masked -inf: see templates/flash_fwd_params.cuh.
float magnitude_log2(float softmax_scale);

// What flips the signs of two fp16 numbers where the scale is negative.
unsigned sign_flip(float softmax_scale);

// batch x heads of `tensor` x row_blocks. Throws UnsupportedError where that does not fit a grid.
std::int64_t grid_blocks(const NamedTensor& tensor, std::int64_t row_blocks);

}  // namespace flash_attn_jit
