#include "generator/legality.h"
#include "runtime/interpreter/interpreter.h"
#include "runtime/launch/tensor_extents.h"
#include "runtime/library/kernel_library.h"
#include "runtime/request/forward.h"

namespace flash_attn_jit {

void forward_in_interpreter(const ForwardRequest& request) {
  const LaunchPlan plan = plan_forward(request, arch_limits(75), kInterpretedMultiprocessors);
  require_cu_seqlens(request.options, request.q, request.k);
  if (plan.blocks == 0) return;
  const FoundKernel found = find_or_compile_for_host(plan.spec);
  std::vector<TensorExtent> tensors = {
      fp16_extent("q", request.q, TensorUse::kRead),
      fp16_extent("k", request.k, TensorUse::kRead),
      fp16_extent("v", request.v, TensorUse::kRead),
      fp16_extent("out", request.out, TensorUse::kWrite),
      row_extent("softmax_lse", request.softmax_lse, request.q, TensorUse::kWrite),
  };
  append_option_extents(request.options, request.q, tensors);
  const GridShape grid{plan.blocks, found.kernel.threads, found.kernel.dynamic_smem};
  interpret(found.kernel, grid, &plan.params, tensors);
}

}  // namespace flash_attn_jit
