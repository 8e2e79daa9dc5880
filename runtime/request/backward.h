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

// What attn_bias's gradient is written into: (batches, heads, rows, keys), contiguous, of the tensors' dtype or
// float32. Rows are attn_bias's, 1 where it is the same for all queries, and keys the problem's. Where attn_bias is the
// same for all sequences, or heads, there is 1 for the sum over them, or more, among which they are shared out and
// which the caller adds.
struct BiasGradient {
  void* data = nullptr;
  PairType type = PairType::kFloat32;
  std::array<std::int64_t, 4> shape{};
};

// Checked by the caller's language layer for rank, dtype and device; backward() checks shapes against each other.
struct BackwardRequest {
  TensorView q;                        // (batch, seqlen_q, num_heads, head_dim)
  TensorView out, dout;                // like q, with v's head dim; any stride in dout's last dimension
  TensorView k, v;                     // (batch, seqlen_k, num_heads_k, head_dim); v's may be another one
  std::optional<TensorView> dq;        // like q; none: not wanted
  std::optional<KeyGradients> dkdv;    // none: not wanted
  std::optional<BiasGradient> dbias;   // none: not wanted
  const float* softmax_lse = nullptr;  // forward's
  const float* dlse = nullptr;         // like softmax_lse: its gradient; null: it has none
  float* delta = nullptr;              // like softmax_lse: room for what one kernel leaves to the next
  float* peaks = nullptr;              // the same; of bfloat16 tensors alone: see templates/gradient_scale.cuh
  AttentionOptions options;
  // Force these tiles; none: the target's chooser decides. With the last of these its kernel is taken, without it but
  // with one of the others the other three.
  std::optional<TileConfig> preprocess_tile, dkdv_tile, dq_tile, all_keys_tile;
  std::optional<TileConfig> dbias_tile;  // of its kernel, whichever the others are
};

// Of them, the one of a kind.
std::optional<TileConfig>& tile_of(BackwardRequest& request, KernelKind kind);
const std::optional<TileConfig>& tile_of(const BackwardRequest& request, KernelKind kind);

using BackwardLaunch = KernelLaunch<FlashBwdParams>;

// The preprocess kernel, then the one of dK and dV, then that of dQ; or, where a block can have all keys and everything
// is wanted, one kernel for all. Last that of attn_bias's gradient, for which these have made delta. Those that are not
// taken have no blocks.
using BackwardPlan = std::array<BackwardLaunch, 5>;

// As plan_forward().
BackwardPlan plan_backward(const BackwardRequest& request, const PlanTarget& target);

}  // namespace flash_attn_jit
