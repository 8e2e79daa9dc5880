// A kernel compiled afresh, for a look at it.
#pragma once

#include "generator/kernel_spec.h"
#include "generator/render.h"
#include "runtime/compile/compiled_kernel.h"
#include "runtime/cuda/compile_target.h"
#include "runtime/system/config.h"

namespace flash_attn_jit::program {

struct FreshKernel {
  RenderedKernel rendered;
  CompiledKernel kernel;
};

// `spec` is legal. Whatever the caches hold: that may come from another NVRTC than the one that the flags or variables
// name.
FreshKernel compile_afresh(const KernelSpec& spec, const CompileTarget& target, const Config& settings);

}  // namespace flash_attn_jit::program
