// A backward request, and its launches as planned.
#pragma once

#include <array>
#include <optional>

#include "generator/kernel_spec.h"
#include "generator/tile_chooser.h"
#include "runtime/request/attention_options.h"
#include "runtime/request/kernel_launch.h"
#include "runtime/request/tensor_view.h"
#include "templates/flash_bwd_params.cuh"

namespace flash_attn_jit {

struct KeyGradients {
  TensorView dk, dv;  // like k and v
};

// Checked by the caller's language layer for rank, dtype and device; backward() checks shapes against each other.
struct BackwardRequest {
  TensorView q, out, dout;             // (batch, seqlen_q, num_heads, head_dim); any stride in dout's last dimension
  TensorView k, v;                     // (batch, seqlen_k, num_heads_k, head_dim)
  std::optional<TensorView> dq;        // like q; none: not wanted
  std::optional<KeyGradients> dkdv;    // none: not wanted
  const float* softmax_lse = nullptr;  // forward's
  float* delta = nullptr;              // like softmax_lse: room for what one kernel leaves to the next
  AttentionOptions options;
  std::optional<TileConfig> preprocess_tile, dkdv_tile,
      dq_tile;  // force these tiles; none: the target's chooser decides
};

using BackwardLaunch = KernelLaunch<FlashBwdParams>;

// The preprocess kernel, then the one of dK and dV, then that of dQ; those of what is not wanted have no blocks.
using BackwardPlan = std::array<BackwardLaunch, 3>;

// As plan_forward().
BackwardPlan plan_backward(const BackwardRequest& request, const PlanTarget& target);

}  // namespace flash_attn_jit
