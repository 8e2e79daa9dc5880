// Source -> compiled kernel, through NVRTC.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "generator/errors.h"
#include "generator/render.h"
#include "runtime/compile_target.h"
#include "runtime/compiled_kernel.h"
#include "runtime/nvrtc.h"

namespace flash_attn_jit {

// What NVRTC is told: canonical, part of the cache's key.
std::vector<std::string> compile_options(const CompileTarget& target);
std::string joined(const std::vector<std::string>& options);

// What ptxas said about a kernel (--ptxas-options=-v). Throws Error where the log does not tell.
KernelResources parse_ptxas_log(std::string_view log);

// NVRTC refused the source.
struct NvrtcFailure : Error {
  NvrtcFailure(const std::string& status, std::string log) : Error(status), log(std::move(log)) {}
  std::string log;
};

// Throws NvrtcFailure; Error where NVRTC itself does not work.
CompiledKernel compile_with(const Nvrtc& nvrtc, const RenderedKernel& rendered, const CompileTarget& target);

}  // namespace flash_attn_jit
