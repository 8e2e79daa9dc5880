#include "generator/legality.h"
#include "runtime/forward.h"
#include "runtime/interpreter/interpreter.h"
#include "runtime/kernel_library.h"

namespace flash_attn_jit {
namespace {

// A Tesla T4's, NVIDIA T4 data sheet: the tile is the one that a T4 would be given.
constexpr int kMultiprocessors = 40;

TensorExtent extent(const char* name, const TensorView& view, TensorUse use) {
  return {.name = name,
          .data = view.data,
          .element_bytes = 2,
          .shape = {view.shape.begin(), view.shape.end()},
          .strides = {view.strides.begin(), view.strides.end()},
          .use = use};
}

TensorExtent lse_extent(const ForwardRequest& request) {
  const std::int64_t batch = request.q.shape[0], seqlen_q = request.q.shape[1], heads = request.q.shape[2];
  return {.name = "softmax_lse",
          .data = request.softmax_lse,
          .element_bytes = 4,
          .shape = {batch, heads, seqlen_q},
          .strides = {heads * seqlen_q, seqlen_q, 1},
          .use = TensorUse::kWrite};
}

}  // namespace

void forward_in_interpreter(const ForwardRequest& request) {
  const LaunchPlan plan = plan_forward(request, arch_limits(75), kMultiprocessors);
  if (plan.blocks == 0) return;
  const FoundKernel found = find_or_compile_for_host(plan.spec);
  const TensorExtent tensors[] = {
      extent("q", request.q, TensorUse::kRead),
      extent("k", request.k, TensorUse::kRead),
      extent("v", request.v, TensorUse::kRead),
      extent("out", request.out, TensorUse::kWrite),
      lse_extent(request),
  };
  const GridShape grid{plan.blocks, found.kernel.threads, found.kernel.dynamic_smem};
  interpret(found.kernel, grid, &plan.params, tensors);
}

}  // namespace flash_attn_jit
