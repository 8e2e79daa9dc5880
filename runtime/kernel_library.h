// Spec + target -> compiled kernel: prebuilt packs first, then the disk cache, then the compiler. Thread-safe.
#pragma once

#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "generator/errors.h"
#include "generator/kernel_spec.h"
#include "generator/render.h"
#include "runtime/compile_target.h"
#include "runtime/compiled_kernel.h"

namespace flash_attn_jit {

// The compiler refused a generated source. `source_path` is where the source was kept.
struct CompileError : Error {
  CompileError(const std::string& message, std::string log, std::string options, std::string source_path);
  std::string log, options, source_path;
};

// No compiler can be had and no cache or pack holds the kernel; names the prebuild command that would make it.
struct MissingKernelError : Error {
  MissingKernelError(const std::string& message, KernelSpec spec, std::string prebuild_command);
  KernelSpec spec;
  std::string prebuild_command;
};

// A driver call failed: names the call, the driver's own words and the code.
struct DriverError : Error {
  using Error::Error;
};

// Where a kernel came from, for reports and tests.
enum class KernelOrigin { kPrebuilt, kDiskCache, kCompiled };

struct FoundKernel {
  CompiledKernel kernel;
  KernelOrigin origin;
};

// The templates in force: FLASH_ATTN_JIT_TEMPLATES's folder where set, else those embedded.
const TemplateSet& active_templates();

// A kernel for a GPU. Several threads or processes that ask for one kernel compile it once.
// Throws CompileError, MissingKernelError, UnsupportedError (check()'s reason).
FoundKernel find_or_compile(const KernelSpec& spec, const CompileTarget& target);

// A kernel for the interpreter: the same source, compiled by the host compiler into a shared object; same cache.
FoundKernel find_or_compile_for_host(const KernelSpec& spec);

}  // namespace flash_attn_jit
