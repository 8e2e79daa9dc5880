// The one line that a slow compile is worth.
#pragma once

#include <string>

#include "runtime/compile/compiled_kernel.h"

namespace flash_attn_jit {

// Logs `name`, the time and the compiler where it took more than half a second. Returns `kernel`.
CompiledKernel tell_if_slow(const std::string& name, CompiledKernel kernel);

}  // namespace flash_attn_jit
