// Everything a launch needs, made from a request without touching the driver.
#pragma once

#include <cstdint>

#include "generator/kernel_spec.h"

namespace flash_attn_jit {

template <class Params>
struct KernelLaunch {
  KernelSpec spec;
  Params params;
  std::int64_t blocks = 0;  // of the flat grid; 0: nothing to launch
};

// Opaque CUstream.
using StreamHandle = void*;

}  // namespace flash_attn_jit
