// A forward request laid out for a launch.
#pragma once

#include "runtime/request/forward.h"

namespace flash_attn_jit {

// plan_forward() without check(): whoever loads the kernel checks its spec, once for each kernel and not at
// each call.
LaunchPlan lay_out_forward(const ForwardRequest& request, const ArchLimits& arch, int multiprocessors);

}  // namespace flash_attn_jit
