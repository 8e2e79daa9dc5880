// The real forward kernel with a fault put in: whichever barrier is taken out, the interpreter has to say so.
// (It also tells when a barrier is not needed.)
#include <doctest/doctest.h>

#include <algorithm>
#include <string>
#include <vector>

#include "containing.h"
#include "forward_case.h"
#include "generator/legality.h"
#include "generator/render.h"
#include "runtime/host_compiler.h"
#include "runtime/interpreter/interpreter.h"

using namespace flash_attn_jit;
using namespace flash_attn_jit::testing;

namespace {

TensorExtent extent(const char* name, const TensorView& view, TensorUse use) {
  return {
      name, view.data, 2, {view.shape.begin(), view.shape.end()}, {view.strides.begin(), view.strides.end()},
      use};
}

// What the interpreter says of the kernel of `templates`, "" where it finds nothing.
std::string error_of(const TemplateSet& templates, const ForwardCase& c) {
  ForwardTensors t(c);
  const ForwardRequest request = t.request();
  const LaunchPlan plan = plan_forward(request, arch_limits(75), 40);
  const CompiledKernel kernel = compile_for_host(render(plan.spec, templates), host_compiler());
  const std::int64_t rows = static_cast<std::int64_t>(t.lse.size());
  const TensorExtent tensors[] = {
      extent("q", request.q, TensorUse::kRead), extent("k", request.k, TensorUse::kRead),
      extent("v", request.v, TensorUse::kRead), extent("out", request.out, TensorUse::kWrite),
      TensorExtent{"softmax_lse", t.lse.data(), 4, {rows}, {1}, TensorUse::kWrite}};
  try {
    interpret(kernel, {plan.blocks, kernel.threads, kernel.dynamic_smem}, &plan.params, tensors);
  } catch (const InterpreterError& error) {
    return error.what();
  }
  return "";
}

// The line of a template that character `at` stands in.
std::string place(const std::string& name, const std::string& text, std::size_t at) {
  return name + ":" +
         std::to_string(1 + std::count(text.begin(), text.begin() + static_cast<std::ptrdiff_t>(at), '\n'));
}

// Long enough for the ring to come round, with Q partly in shared memory and rows and keys beyond the ends.
std::vector<ForwardCase> cases() {
  ForwardCase c = ForwardCase::parse("hdim32 causal sq150 sk230");
  for (const TileConfig& tile : tiles_of(c.head_dim))
    if (tile.block_m == 64 && tile.block_n == 16 && tile.register_dims < 32) c.tile = tile;
  ForwardCase other = ForwardCase::parse("hdim64 full rowgaps sq70 sk150");
  return {c, other};
}

}  // namespace

TEST_CASE("without any one of its barriers, the forward kernel is caught") {
  int mutants = 0;
  for (const auto& file : embedded_templates()) {
    const std::string name = file.first, text = file.second;
    if (name.starts_with("primitives") || name.starts_with("flash_bwd")) continue;
    for (const std::string barrier : {"block_barrier();", "warp_barrier();"})
      for (std::size_t at = text.find(barrier); at != std::string::npos; at = text.find(barrier, at + 1)) {
        TemplateSet templates = embedded_templates();
        templates[name].replace(at, barrier.size(), std::string(barrier.size() - 1, ' ') + ";");
        std::string error;
        for (const ForwardCase& c : cases())
          if (error.empty()) error = error_of(templates, c);
        CHECK_MESSAGE(error != "", place(name, text, at) << ": nothing is missed without this barrier");
        ++mutants;
      }
  }
  CHECK(mutants >= 5);
}
