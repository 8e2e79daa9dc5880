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

// No compiler can be had and no cache or pack holds the kernel; names the prebuild command that would make
// it.
struct MissingKernelError : Error {
  MissingKernelError(const std::string& message, const KernelSpec& spec, std::string prebuild_command)
      : Error(message), spec(spec), prebuild_command(std::move(prebuild_command)) {}
  KernelSpec spec;
  std::string prebuild_command;
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
