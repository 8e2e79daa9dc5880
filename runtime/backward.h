// The road's two ends: a backward request, and its launches on a device or in the interpreter.
#pragma once

#include <array>
#include <optional>

#include "generator/default_tiles.h"
#include "generator/kernel_spec.h"
#include "runtime/kernel_launch.h"
#include "runtime/tensor_view.h"
#include "templates/flash_bwd_params.cuh"

namespace flash_attn_jit {

// Checked by the caller's language layer for rank, dtype and device; backward() checks shapes against each other.
struct BackwardRequest {
  TensorView q, out, dout, dq;         // (batch, seqlen_q, num_heads, head_dim)
  TensorView k, v, dk, dv;             // (batch, seqlen_k, num_heads_k, head_dim)
  const float* softmax_lse = nullptr;  // (batch, num_heads, seqlen_q), float32, contiguous: forward's
  float* delta = nullptr;              // like softmax_lse: room for what one kernel leaves to the next
  float softmax_scale = 0;
  Mask mask = Mask::kNone;
  std::optional<TileConfig> dkdv_tile, dq_tile;  // force these tiles; none: the default table decides
};

using BackwardLaunch = KernelLaunch<FlashBwdParams>;

// The preprocess kernel, then the one of dK and dV, then that of dQ.
using BackwardPlan = std::array<BackwardLaunch, 3>;

// Throws ArgumentError where shapes contradict each other, UnsupportedError where no kernel can do it.
BackwardPlan plan_backward(const BackwardRequest& request, const ArchLimits& arch, int multiprocessors);

// Launches on `stream` of CUDA device `device_ordinal`; loads and compiles the kernels first where needed.
void backward_on_device(const BackwardRequest& request, int device_ordinal, StreamHandle stream);

// Runs the same kernels in the interpreter, on host memory. Throws InterpreterError where a check fails.
void backward_in_interpreter(const BackwardRequest& request);

}  // namespace flash_attn_jit
