// Source -> compiled kernel, through NVRTC.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "generator/errors.h"
#include "generator/render.h"
#include "runtime/compile/compiled_kernel.h"
#include "runtime/cuda/compile_target.h"
#include "runtime/cuda/nvrtc.h"

namespace flash_attn_jit {

// What decides the code: canonical, part of the cache's key.
std::vector<std::string> compile_options(const CompileTarget& target);

// What an NVRTC of this version is told: compile_options() and what changes no code.
std::vector<std::string> nvrtc_options(const CompileTarget& target, const NvrtcVersion& version);

std::string joined(const std::vector<std::string>& options);

// What ptxas said about a kernel (--ptxas-options=-v), as far as its log tells.
KernelResources parse_ptxas_log(std::string_view log);

// NVRTC refused the source.
struct NvrtcFailure : Error {
  NvrtcFailure(const std::string& status, std::string log) : Error(status), log(std::move(log)) {}
  std::string log;
};

// Throws NvrtcFailure; Error where NVRTC itself does not work.
CompiledKernel compile_with(const Nvrtc& nvrtc, const RenderedKernel& rendered, const CompileTarget& target);

}  // namespace flash_attn_jit
