#include "runtime/launch/forward_launch.h"

#include <array>

#include "generator/legality.h"
#include "runtime/interpreter/interpreter.h"
#include "runtime/launch/autotune.h"
#include "runtime/launch/interpreted_tensors.h"
#include "runtime/launch/process.h"

namespace flash_attn_jit {

void launch_forward(Device& device, const ForwardRequest& request, StreamHandle stream) {
  device.launch(std::array{plan_forward(request, device.plan_target())}, stream);
}

void forward_on_device(const ForwardRequest& request, int device_ordinal, StreamHandle stream) {
  Device& device = process_devices().device(device_ordinal);
  if (Autotuner* autotuner = process_autotuner_if_on()) autotuner->meet(device, request, stream);
  launch_forward(device, request, stream);
}

void forward_in_interpreter(const ForwardRequest& request) {
  if (Autotuner* autotuner = process_autotuner_if_on()) autotuner->meet_interpreted();
  const LaunchPlan plan = plan_forward(request, {arch_limits(75), kInterpretedMultiprocessors, process_tile_chooser()});
  require_cu_seqlens(request.options, request.q, request.k);
  if (plan.blocks == 0) return;
  const FoundKernel found = process_host_kernels().find_or_compile(plan.spec);
  std::vector<TensorExtent> tensors = {
      fp16_extent("q", request.q, TensorUse::kRead),
      fp16_extent("k", request.k, TensorUse::kRead),
      fp16_extent("v", request.v, TensorUse::kRead),
      fp16_extent("out", request.out, TensorUse::kWrite),
      row_extent("softmax_lse", request.softmax_lse, request.q, TensorUse::kWrite),
  };
  append_option_extents(request.options, request.q, request.k, tensors);
  const GridShape grid{plan.blocks, found.kernel.threads, found.kernel.dynamic_smem};
  interpret(found.kernel, grid, &plan.params, tensors);
}

}  // namespace flash_attn_jit
