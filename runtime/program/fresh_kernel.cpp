#include "runtime/program/fresh_kernel.h"

#include <utility>

#include "runtime/library/kernel_library.h"

namespace flash_attn_jit::program {

FreshKernel compile_afresh(const KernelSpec& spec, const CompileTarget& target, const Config& settings) {
  KernelLibrary library({.config = settings, .cache = cache_settings(settings), .driver_version = {}});
  KernelRequest kernel = library.request(spec);
  CompiledKernel made = library.compile_afresh(library.request(kernel, target));
  return {std::move(kernel.rendered), std::move(made)};
}

}  // namespace flash_attn_jit::program
