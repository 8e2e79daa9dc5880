// How the interpreter is told of the tensors that every kernel family knows.
#pragma once

#include "runtime/interpreter/tensor_extent.h"
#include "runtime/request/attention_options.h"
#include "runtime/request/backward.h"
#include "runtime/request/tensor_view.h"

namespace flash_attn_jit {

// A Tesla T4's, NVIDIA T4 data sheet: the interpreter's tile is the one that a T4 would be given.
inline constexpr int kInterpretedMultiprocessors = 40;

TensorExtent fp16_extent(const char* name, const TensorView& view, TensorUse use);

// (batch, num_heads, seqlen_q) float32, contiguous, for the queries `q`.
TensorExtent row_extent(const char* name, const float* data, const TensorView& q, TensorUse use);

TensorExtent bias_gradient_extent(const BiasGradient& dbias);

// What an option reads, where it is on.
void append_option_extents(const AttentionOptions& options, const TensorView& q, const TensorView& k,
                           std::vector<TensorExtent>& tensors);

// Throws ArgumentError where the numbers in cu_seqlens, seqused_k, leftpad_k or a block_table are not what they must
// be. A kernel on a GPU cannot tell; what it makes of them stays in the tensors.
void require_pages(const PageTable& pages, std::int64_t b, std::int64_t used, const TensorView& k);  // of sequence b
void require_lengths(const AttentionOptions& options, const TensorView& q, const TensorView& k);

}  // namespace flash_attn_jit
