#include "generator/legality.h"
#include "runtime/backward.h"
#include "runtime/interpreter/interpreter.h"
#include "runtime/interpreter/tensor_extents.h"
#include "runtime/kernel_library.h"

namespace flash_attn_jit {

void backward_in_interpreter(const BackwardRequest& request) {
  for (const BackwardLaunch& launch : plan_backward(request, arch_limits(75), kInterpretedMultiprocessors)) {
    if (launch.blocks == 0) continue;
    const bool makes_delta = launch.spec.kind == KernelKind::kBackwardPreprocess;
    const FoundKernel found = find_or_compile_for_host(launch.spec);
    const TensorExtent tensors[] = {
        fp16_extent("q", request.q, TensorUse::kRead),
        fp16_extent("k", request.k, TensorUse::kRead),
        fp16_extent("v", request.v, TensorUse::kRead),
        fp16_extent("out", request.out, TensorUse::kRead),
        fp16_extent("dout", request.dout, TensorUse::kRead),
        fp16_extent("dq", request.dq, TensorUse::kWrite),
        fp16_extent("dk", request.dk, TensorUse::kWrite),
        fp16_extent("dv", request.dv, TensorUse::kWrite),
        row_extent("softmax_lse", request.softmax_lse, request.q, TensorUse::kRead),
        row_extent("delta", request.delta, request.q, makes_delta ? TensorUse::kWrite : TensorUse::kRead),
    };
    const GridShape grid{launch.blocks, found.kernel.threads, found.kernel.dynamic_smem};
    interpret(found.kernel, grid, &launch.params, tensors);
  }
}

}  // namespace flash_attn_jit
