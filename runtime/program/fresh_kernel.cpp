#include "runtime/program/fresh_kernel.h"

#include <utility>

#include "runtime/library/kernel_library.h"
#include "runtime/system/errors.h"
#include "runtime/system/files.h"

namespace flash_attn_jit::program {

FreshKernel compile_afresh(const KernelSpec& spec, const CompileTarget& target, const Config& settings) {
  ScratchFolder scratch("flash-attn-jit");
  KernelLibrary library({.config = settings, .cache = {.dir = scratch.path(), .prebuilt = {}}, .driver_version = {}});
  KernelRequest kernel = library.request(spec);
  try {
    FoundKernel made = library.make(library.request(kernel, target));
    return {std::move(kernel.rendered), std::move(made.kernel)};
  } catch (const CompileError&) {
    scratch.keep();  // it holds the source that the error names
    throw;
  }
}

}  // namespace flash_attn_jit::program
