// Kernels for the interpreter: the source that NVRTC is given, as shared objects that the host compiler makes.
// Thread-safe.
#pragma once

#include <memory>
#include <utility>

#include "generator/kernel_spec.h"
#include "generator/render.h"
#include "runtime/cache/kernel_cache.h"
#include "runtime/compile/compiled_kernel.h"
#include "runtime/compile/host_compiler.h"

namespace flash_attn_jit {

class HostKernels {
 public:
  HostKernels(std::shared_ptr<KernelCache> cache, TemplateSet templates, HostCompiler compiler)
      : cache_(std::move(cache)), templates_(std::move(templates)), compiler_(std::move(compiler)) {}

  // From the cache, else compiled. Throws CompileError, UnsupportedError (check()'s reason).
  FoundKernel find_or_compile(const KernelSpec& spec);

 private:
  CompiledKernel compile(const KernelSpec& spec, const KernelId& id, const RenderedKernel& rendered);

  std::shared_ptr<KernelCache> cache_;
  TemplateSet templates_;
  HostCompiler compiler_;
};

}  // namespace flash_attn_jit
