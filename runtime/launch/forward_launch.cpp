#include "runtime/launch/forward_launch.h"

#include <array>
#include <utility>
#include <vector>

#include "generator/legality.h"
#include "generator/tile_layout.h"
#include "runtime/interpreter/interpreter.h"
#include "runtime/launch/autotune.h"
#include "runtime/launch/interpreted_tensors.h"
#include "runtime/launch/process.h"

namespace flash_attn_jit {

namespace {

class HostWorkspace final : public Workspace {
 public:
  float* allocate(std::int64_t floats) override {
    memory_.resize(static_cast<std::size_t>(floats / 4 + 1));
    return memory_.front().numbers;
  }

 private:
  struct alignas(16) Four {
    float numbers[4];
  };
  std::vector<Four> memory_;
};

// What a launch of the pass reads and writes. Splits are written by the first and read by the second.
std::vector<TensorExtent> forward_extents(const ForwardRequest& request, const ForwardLaunch& launch, bool has_splits) {
  std::vector<TensorExtent> tensors;
  const bool combines = launch.spec.kind == KernelKind::kDecodeCombine;
  if (has_splits) {
    const FlashDecodeParams& params = launch.params;
    const std::int64_t rows = std::int64_t{params.num_splits} * params.total_rows,
                       dims = kernel_value_dims(launch.spec);
    const TensorUse use = combines ? TensorUse::kRead : TensorUse::kWrite;
    tensors.push_back({"the splits' out", params.partial_out, 4, {rows, dims}, {dims, 1}, use});
    tensors.push_back({"the splits' row_max and row_sum", params.partial_rows, 4, {rows, 2}, {2, 1}, use});
  }
  if (!has_splits || combines) {
    tensors.push_back(fp16_extent("out", request.out, TensorUse::kWrite));
    tensors.push_back(row_extent("softmax_lse", launch.params.softmax_lse, request.q, TensorUse::kWrite));
  }
  append_option_extents(request.options, request.q, request.k, tensors);
  if (combines) return tensors;
  tensors.push_back(fp16_extent("q", request.q, TensorUse::kRead));
  tensors.push_back(fp16_extent("k", request.k, TensorUse::kRead));
  tensors.push_back(fp16_extent("v", request.v, TensorUse::kRead));
  return tensors;
}

}  // namespace

void launch_forward(Device& device, const ForwardRequest& request, StreamHandle stream) {
  LaunchPlan plan = plan_forward(request, device.plan_target());
  give_workspace(plan, request.workspace);
  device.launch(std::array<ForwardLaunch, 2>{plan, plan.combine}, stream);
}

void forward_on_device(const ForwardRequest& request, int device_ordinal, StreamHandle stream) {
  Device& device = process_devices().device(device_ordinal);
  if (Autotuner* autotuner = process_autotuner_if_on()) autotuner->meet(device, request, stream);
  launch_forward(device, request, stream);
}

void forward_in_interpreter(const ForwardRequest& request) {
  if (Autotuner* autotuner = process_autotuner_if_on()) autotuner->meet_interpreted();
  HostWorkspace workspace;
  ForwardRequest with_workspace = request;
  with_workspace.workspace = &workspace;
  LaunchPlan plan =
      plan_forward(with_workspace, {arch_limits(75), kInterpretedMultiprocessors, process_tile_chooser()});
  require_lengths(request.options, request.q, request.k);
  give_workspace(plan, &workspace);
  for (const ForwardLaunch* launch : {static_cast<const ForwardLaunch*>(&plan), &std::as_const(plan.combine)}) {
    if (launch->blocks == 0) continue;
    const FoundKernel found = process_host_kernels().find_or_compile(launch->spec);
    const GridShape grid{launch->blocks, found.kernel.threads, found.kernel.dynamic_smem};
    interpret(found.kernel, grid, &launch->params, forward_extents(request, *launch, plan.combine.blocks > 0));
  }
}

}  // namespace flash_attn_jit
