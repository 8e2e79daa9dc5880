// The C++ compiler of this machine, which makes the interpreter's shared objects.
#pragma once

#include <filesystem>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "generator/errors.h"
#include "generator/render.h"
#include "runtime/compile/compiled_kernel.h"

namespace flash_attn_jit {

struct HostCompiler {
  std::filesystem::path path;
  std::string version;  // the first line of what --version prints; names the compiler
};

// The compiler that `choice` names (FLASH_ATTN_JIT_CXX; a path or a name on PATH), else the first of c++, g++
// and clang++ that runs. Throws ConfigError, which names the variable and the package to install.
HostCompiler find_host_compiler(const std::optional<std::string>& choice);

// Everything on the command line that decides what comes out, the paths of the files not counted.
std::vector<std::string> host_compiler_flags(const HostCompiler& compiler);

// What a failed run of the compiler printed.
struct HostCompileFailure : Error {
  HostCompileFailure(const std::string& message, std::string printed) : Error(message), log(std::move(printed)) {}
  std::string log;
};

// A shared object of a source that templates/primitives_host.cuh is part of. Throws HostCompileFailure; Error
// where no temporary folder can be had.
CompiledKernel compile_for_host(const RenderedKernel& kernel, const HostCompiler& compiler);

}  // namespace flash_attn_jit
