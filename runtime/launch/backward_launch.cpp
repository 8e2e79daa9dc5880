#include "runtime/launch/backward_launch.h"

#include <array>
#include <optional>
#include <tuple>

#include "generator/families/families.h"
#include "generator/legality.h"
#include "runtime/interpreter/interpreter.h"
#include "runtime/launch/autotune.h"
#include "runtime/launch/interpreted_tensors.h"
#include "runtime/launch/process.h"
#include "runtime/system/side_by_side.h"

namespace flash_attn_jit {
namespace {

// The tensors that the kernel `launch` may touch.
std::vector<TensorExtent> extents_of(const BackwardRequest& request, const BackwardLaunch& launch) {
  const KernelResults& made = family_of(launch.spec.kind).results;
  const TensorUse delta = made.delta && made.dq ? TensorUse::kPassOn
                          : made.delta          ? TensorUse::kWrite
                                                : TensorUse::kRead;
  std::vector<TensorExtent> tensors = {
      fp16_extent("q", request.q, TensorUse::kRead),
      fp16_extent("k", request.k, TensorUse::kRead),
      fp16_extent("v", request.v, TensorUse::kRead),
      fp16_extent("out", request.out, TensorUse::kRead),
      fp16_extent("dout", request.dout, TensorUse::kRead),
      row_extent("softmax_lse", request.softmax_lse, request.q, TensorUse::kRead),
      row_extent("delta", request.delta, request.q, delta),
  };
  if (request.peaks != nullptr) tensors.push_back(row_extent("peaks", request.peaks, request.q, delta));
  if (request.dlse != nullptr) tensors.push_back(row_extent("dlse", request.dlse, request.q, TensorUse::kRead));
  if (request.dq) tensors.push_back(fp16_extent("dq", *request.dq, TensorUse::kWrite));
  if (request.dkdv) {
    tensors.push_back(fp16_extent("dk", request.dkdv->dk, TensorUse::kWrite));
    tensors.push_back(fp16_extent("dv", request.dkdv->dv, TensorUse::kWrite));
  }
  if (request.dbias) tensors.push_back(bias_gradient_extent(*request.dbias));
  append_option_extents(request.options, request.q, request.k, tensors);
  return tensors;
}

}  // namespace

void launch_backward(Device& device, const BackwardRequest& request, StreamHandle stream) {
  device.launch(plan_backward(request, device.plan_target()), stream);
}

void backward_on_device(const BackwardRequest& request, int device_ordinal, StreamHandle stream) {
  Device& device = process_devices().device(device_ordinal);
  if (Autotuner* autotuner = process_autotuner_if_on()) autotuner->meet(device, request, stream);
  launch_backward(device, request, stream);
}

void backward_in_interpreter(const BackwardRequest& request) {
  if (Autotuner* autotuner = process_autotuner_if_on()) autotuner->meet_interpreted();
  const BackwardPlan plan =
      plan_backward(request, {arch_limits(75), kInterpretedMultiprocessors, process_tile_chooser()});
  require_lengths(request.options, request.q, request.k);
  std::array<std::optional<CompiledKernel>, std::tuple_size_v<BackwardPlan>> kernels;
  run_side_by_side(plan.size(), [&](std::size_t i) {
    if (plan[i].blocks > 0) kernels[i] = process_host_kernels().find_or_compile(plan[i].spec).kernel;
  });
  for (std::size_t i = 0; i < plan.size(); ++i) {
    if (!kernels[i]) continue;
    const GridShape grid{plan[i].blocks, kernels[i]->threads, kernels[i]->dynamic_smem};
    interpret(*kernels[i], grid, &plan[i].params, extents_of(request, plan[i]));
  }
}

}  // namespace flash_attn_jit
