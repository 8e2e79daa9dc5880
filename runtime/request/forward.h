// A forward request, and its launch as planned.
#pragma once

#include <cstdint>
#include <optional>

#include "generator/kernel_spec.h"
#include "generator/tile_chooser.h"
#include "runtime/request/attention_options.h"
#include "runtime/request/kernel_launch.h"
#include "runtime/request/tensor_view.h"
#include "templates/flash_decode_params.cuh"

namespace flash_attn_jit {

// Memory for what a pass's kernels hand each other. Asked for once, before anything is launched; what it gives stays
// until the launches of the same stream are done.
class Workspace {
 public:
  virtual ~Workspace() = default;
  virtual float* allocate(std::int64_t floats) = 0;  // aligned to 16 bytes
};

// Checked by the caller's language layer for rank, dtype and device; forward() checks shapes against each other.
struct ForwardRequest {
  TensorView q;     // (batch, seqlen_q, num_heads, head_dim)
  TensorView k, v;  // (batch, seqlen_k, num_heads_k, head_dim); v's may be another one
  TensorView out;   // like q, with v's head dim
  // (batch, num_heads, seqlen_q), varlen (num_heads, total_q); float32, contiguous. None where there is a workspace and
  // nobody wants it: kernels write it all the same.
  float* softmax_lse = nullptr;
  AttentionOptions options;
  Workspace* workspace = nullptr;  // for launches on a device; where there is none, the keys are not split
  std::int64_t num_splits = 0;  // of the keys, at the most, where the pass takes the decode kernel; 0: as many as pay
  // Either forces this tile, and so which kernel the pass takes; none: the target's chooser decides.
  std::optional<TileConfig> tile, decode_tile;
};

using ForwardLaunch = KernelLaunch<FlashDecodeParams>;  // the forward kernel reads what is before

// The pass's kernel, and what runs behind it.
struct LaunchPlan : ForwardLaunch {
  ForwardLaunch combine;          // of the decode kernel's splits; without blocks where there are none
  std::int64_t split_floats = 0;  // memory that both share
  std::int64_t lse_floats = 0;    // for a softmax_lse that nobody wants
};

// Gives the pass's kernels their memory, where they need some.
void give_workspace(LaunchPlan& plan, Workspace* workspace);

// Throws ArgumentError where shapes contradict each other, UnsupportedError where no tile is for the head dim. Whether
// the spec is legal is checked by whoever makes its kernel, once for each kernel and not at each call.
LaunchPlan plan_forward(const ForwardRequest& request, const PlanTarget& target);

}  // namespace flash_attn_jit
