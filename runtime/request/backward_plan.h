// A backward request laid out for its launches.
#pragma once

#include "runtime/request/backward.h"

namespace flash_attn_jit {

// plan_backward() without check(): whoever loads a kernel checks its spec, once for each kernel and not at each call.
BackwardPlan lay_out_backward(const BackwardRequest& request, const ArchLimits& arch, int multiprocessors);

}  // namespace flash_attn_jit
