// The road's two ends: a forward request, and its launch on a device or in the interpreter.
#pragma once

#include <cstdint>
#include <optional>

#include "generator/tile_chooser.h"
#include "generator/kernel_spec.h"
#include "runtime/request/attention_options.h"
#include "runtime/request/kernel_launch.h"
#include "runtime/request/tensor_view.h"
#include "templates/flash_fwd_params.cuh"

namespace flash_attn_jit {

// Checked by the caller's language layer for rank, dtype and device; forward() checks shapes against each other.
struct ForwardRequest {
  TensorView q;             // (batch, seqlen_q, num_heads, head_dim)
  TensorView k, v;          // (batch, seqlen_k, num_heads_k, head_dim)
  TensorView out;           // like q
  float* softmax_lse = nullptr;  // (batch, num_heads, seqlen_q), varlen (num_heads, total_q); float32, contiguous
  AttentionOptions options;
  std::optional<TileConfig> tile;  // forces this tile; none: the default table decides
};

using LaunchPlan = KernelLaunch<FlashFwdParams>;

// Throws ArgumentError where shapes contradict each other, UnsupportedError where no kernel can do it.
LaunchPlan plan_forward(const ForwardRequest& request, const ArchLimits& arch, int multiprocessors);

// Launches on `stream` of CUDA device `device_ordinal`; loads and compiles the kernel first where needed.
void forward_on_device(const ForwardRequest& request, int device_ordinal, StreamHandle stream);

// Runs the same kernel in the interpreter, on host memory. Throws InterpreterError where a check fails.
void forward_in_interpreter(const ForwardRequest& request);

}  // namespace flash_attn_jit
