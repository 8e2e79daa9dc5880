#include "runtime/compile/slow_compile.h"

#include <cstdio>

#include "runtime/system/log.h"

namespace flash_attn_jit {

CompiledKernel tell_if_slow(const std::string& name, CompiledKernel kernel) {
  constexpr double kSlowSeconds = 0.5;
  if (kernel.seconds > kSlowSeconds) {
    char seconds[32];
    std::snprintf(seconds, sizeof seconds, "%.2f", kernel.seconds);
    log(LogLevel::kInfo, "compiled " + name + " in " + seconds + " s (" + kernel.built_by + ")");
  }
  return kernel;
}

}  // namespace flash_attn_jit
