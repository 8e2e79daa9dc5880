// A forward request, and its launch as planned.
#pragma once

#include <cstdint>
#include <optional>

#include "generator/kernel_spec.h"
#include "generator/tile_chooser.h"
#include "runtime/request/attention_options.h"
#include "runtime/request/kernel_launch.h"
#include "runtime/request/tensor_view.h"
#include "templates/flash_fwd_params.cuh"

namespace flash_attn_jit {

// Checked by the caller's language layer for rank, dtype and device; forward() checks shapes against each other.
struct ForwardRequest {
  TensorView q;                  // (batch, seqlen_q, num_heads, head_dim)
  TensorView k, v;               // (batch, seqlen_k, num_heads_k, head_dim)
  TensorView out;                // like q
  float* softmax_lse = nullptr;  // (batch, num_heads, seqlen_q), varlen (num_heads, total_q); float32, contiguous
  AttentionOptions options;
  std::optional<TileConfig> tile;  // forces this tile; none: the target's chooser decides
};

using LaunchPlan = KernelLaunch<FlashFwdParams>;

// Throws ArgumentError where shapes contradict each other, UnsupportedError where no tile is for the head dim. Whether
// the spec is legal is checked by whoever makes its kernel, once for each kernel and not at each call.
LaunchPlan plan_forward(const ForwardRequest& request, const PlanTarget& target);

}  // namespace flash_attn_jit
