// The errors of the runtime, beside those of generator/errors.h.
#pragma once

#include <string>
#include <utility>

#include "generator/errors.h"
#include "generator/kernel_spec.h"

namespace flash_attn_jit {

// The compiler refused a generated source. `source_path` is where the source was kept.
struct CompileError : Error {
  CompileError(const std::string& message, std::string log, std::string options, std::string source_path)
      : Error(message), log(std::move(log)), options(std::move(options)), source_path(std::move(source_path)) {}
  std::string log, options, source_path;
};

// No cache or pack holds the kernel, and it may not be compiled or no compiler can be had; names the prebuild command
// that would make it. `no_compiler` is why it cannot be compiled: the same for every kernel.
struct MissingKernelError : Error {
  MissingKernelError(const std::string& message, const KernelSpec& spec, std::string prebuild_command,
                     std::string no_compiler)
      : Error(message),
        spec(spec),
        prebuild_command(std::move(prebuild_command)),
        no_compiler(std::move(no_compiler)) {}
  KernelSpec spec;
  std::string prebuild_command, no_compiler;
};

// A driver call failed: names the call, the driver's own words and the code.
struct DriverError : Error {
  using Error::Error;
};

// A check of the interpreter failed: names the kernel, source file and line, block, warp, lane, and what happened.
struct InterpreterError : Error {
  using Error::Error;
};

}  // namespace flash_attn_jit
