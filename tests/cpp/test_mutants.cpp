// The real kernels with a fault put in: whichever barrier is taken out, the interpreter has to say so.
// (It also tells when a barrier is not needed.)
#include <doctest/doctest.h>

#include <algorithm>
#include <span>
#include <string>
#include <vector>

#include "backward_case.h"
#include "case_grid.h"
#include "containing.h"
#include "forward_case.h"
#include "generator/legality.h"
#include "generator/render.h"
#include "runtime/compile/host_compiler.h"
#include "runtime/interpreter/interpreter.h"
#include "runtime/launch/backward_launch.h"
#include "runtime/launch/interpreted_tensors.h"
#include "runtime/launch/process.h"
#include "runtime/system/errors.h"
#include "runtime/system/sanitizers.h"

using namespace flash_attn_jit;
using namespace flash_attn_jit::testing;

namespace {

// Whether the launch's kernel has what these templates lack.
template <class Launch>
bool is_mutant(const TemplateSet& templates, const Launch& launch) {
  return render(launch.spec, templates).source != render(launch.spec, embedded_templates()).source;
}

// What the interpreter says of a launch with the kernel of `templates`, "" where it finds nothing.
template <class Launch>
std::string error_of(const TemplateSet& templates, const Launch& launch, std::span<const TensorExtent> tensors) {
  const CompiledKernel kernel = compile_for_host(render(launch.spec, templates), host_compiler());
  try {
    interpret(kernel, {launch.blocks, kernel.threads, kernel.dynamic_smem}, &launch.params, tensors);
  } catch (const InterpreterError& error) {
    return error.what();
  }
  return "";
}

std::string forward_error(const TemplateSet& templates, const ForwardCase& c) {
  ForwardTensors t(c);
  const ForwardRequest request = t.request();
  const TensorExtent tensors[] = {
      fp16_extent("q", request.q, TensorUse::kRead), fp16_extent("k", request.k, TensorUse::kRead),
      fp16_extent("v", request.v, TensorUse::kRead), fp16_extent("out", request.out, TensorUse::kWrite),
      row_extent("softmax_lse", t.lse.data(), request.q, TensorUse::kWrite)};
  const ForwardLaunch launch = plan_forward(request, {arch_limits(75), 40, default_tile_chooser()});
  return is_mutant(templates, launch) ? error_of(templates, launch, tensors) : "";
}

std::string backward_error(const TemplateSet& templates, const BackwardCase& c) {
  BackwardTensors t(c);
  const BackwardRequest request = t.request();
  std::vector<BackwardLaunch> launches;
  for (const BackwardLaunch& launch : plan_backward(request, {arch_limits(75), 40, default_tile_chooser()}))
    if (launch.blocks > 0 && launch.spec.kind != KernelKind::kBackwardPreprocess && is_mutant(templates, launch))
      launches.push_back(launch);
  if (launches.empty()) return "";
  backward_in_interpreter(request);  // for delta
  std::vector<TensorExtent> tensors = {
      fp16_extent("q", request.q, TensorUse::kRead),
      fp16_extent("k", request.k, TensorUse::kRead),
      fp16_extent("v", request.v, TensorUse::kRead),
      fp16_extent("dout", request.dout, TensorUse::kRead),
      fp16_extent("dq", *request.dq, TensorUse::kWrite),
      fp16_extent("dk", request.dkdv->dk, TensorUse::kWrite),
      fp16_extent("dv", request.dkdv->dv, TensorUse::kWrite),
      row_extent("softmax_lse", request.softmax_lse, request.q, TensorUse::kRead),
      fp16_extent("out", request.out, TensorUse::kRead),
      row_extent("delta", request.delta, request.q, c.all_keys_tile ? TensorUse::kPassOn : TensorUse::kRead)};
  if (request.peaks)
    tensors.push_back(
        row_extent("peaks", request.peaks, request.q, c.all_keys_tile ? TensorUse::kPassOn : TensorUse::kRead));
  append_option_extents(request.options, request.q, request.k, tensors);
  if (request.dbias) tensors.push_back(bias_gradient_extent(*request.dbias));
  std::string error;
  for (const BackwardLaunch& launch : launches)
    if (error.empty()) error = error_of(templates, launch, tensors);
  return error;
}

// The line of a template that character `at` stands in.
std::string place(const std::string& name, const std::string& text, std::size_t at) {
  return name + ":" +
         std::to_string(1 + std::count(text.begin(), text.begin() + static_cast<std::ptrdiff_t>(at), '\n'));
}

// Long enough for the slots to come round, with Q partly in shared memory and rows and keys beyond the ends; and with 8
// dims alone.
std::vector<ForwardCase> forward_cases() {
  ForwardCase c = ForwardCase::parse("hdim32 causal sq150 sk230");
  for (const TileConfig& tile : tiles_of(c.head_dim))
    if (tile.block_m == 64 && tile.block_n == 16 && tile.register_dims < 32) c.tile = tile;
  const ForwardCase other = ForwardCase::parse("hdim64 full rowgaps sq70 sk150 m64n16w4q64l2b4k7");
  return {c,
          other,
          ForwardCase::parse("hdim64 full bf16 sq70 sk150 m64n16w4q64l2b8k8"),
          ForwardCase::parse("hdim40 full sq70 sk50 m64n16w2q40l2b4k7"),
          ForwardCase::parse("hdim320 full sq70 sk50 m64n8w8q80l4b4k8"),
          ForwardCase::parse("hdim96 sq3 gqa2 sk300 splits1 m16n16w4q64l0b0k0")};
}

std::vector<BackwardCase> backward_cases() {
  return {BackwardCase::parse("hdim32 causal gqa2 sq150 sk230 dkdv:m64n16w4q16l0b4k8 dq:m64n16w4q16l0b4k8"),
          BackwardCase::parse("hdim64 full rowgaps sq70 sk150"),
          BackwardCase::parse("hdim40 full sq70 sk50 dkdv:m64n16w2q40l0b4k8 dq:m64n16w2q40l0b4k8"),
          BackwardCase::parse("hdim64 causal gqa2 sq96 sk100 allkeys:m128n16w8q64l0b4k8"),
          BackwardCase::parse("hdim64 full bf16 gqa2 sq70 sk150"),
          BackwardCase::parse("hdim64 causal bf16 gqa2 sq96 sk100 allkeys:m128n16w8q64l0b4k8"),
          BackwardCase::parse("hdim96 full sq40 sk60 allkeys:m64n16w4q96l0b8k8"),
          BackwardCase::parse("hdim96 full sq56 sk60 allkeys:m64n16w4q96l0b8k8"),
          BackwardCase::parse("hdim32 full headsk2 sq20 sk40 bias32keys dbias:m64n16w4q16l0b0k0")};
}

// Takes out each barrier of the templates that `of_family` accepts; `error` says what is found without it.
template <class OfFamily, class Error>
int check_mutants(OfFamily of_family, Error error) {
  int mutants = 0;
  for (const auto& file : embedded_templates()) {
    const std::string name = file.first, text = file.second;
    if (!of_family(name)) continue;
    for (const std::string barrier : {"block_barrier();", "warp_barrier();"})
      for (std::size_t at = text.find(barrier); at != std::string::npos; at = text.find(barrier, at + 1)) {
        TemplateSet templates = embedded_templates();
        templates[name].replace(at, barrier.size(), std::string(barrier.size() - 1, ' ') + ";");
        CHECK_MESSAGE(error(templates) != "", place(name, text, at) << ": nothing is missed without this barrier");
        ++mutants;
      }
  }
  return mutants;
}

// Under sanitizers the same cases would find the same.
bool runs_here() { return !kAddressSanitizer || tests_all(); }

}  // namespace

TEST_CASE("without any one of its barriers, the forward kernel is caught") {
  if (!runs_here()) return;
  const auto of_family = [](const std::string& name) {
    return !name.starts_with("primitives") && !name.starts_with("flash_bwd") && !name.starts_with("gradient_");
  };
  const int mutants = check_mutants(of_family, [](const TemplateSet& templates) {
    std::string error;
    for (const ForwardCase& c : forward_cases())
      if (error.empty()) error = forward_error(templates, c);
    return error;
  });
  CHECK(mutants >= 5);
}

TEST_CASE("without any one of their barriers, the backward kernels are caught") {
  if (!runs_here()) return;
  const auto of_family = [](const std::string& name) {
    return name.starts_with("flash_bwd") || name.starts_with("row_") || name.starts_with("gradient_");
  };
  const int mutants = check_mutants(of_family, [](const TemplateSet& templates) {
    std::string error;
    for (const BackwardCase& c : backward_cases())
      if (error.empty()) error = backward_error(templates, c);
    return error;
  });
  CHECK(mutants >= 5);
}
