// A kernel that is wanted, before anything is known of where it comes from.
#pragma once

#include "generator/kernel_spec.h"
#include "generator/render.h"

namespace flash_attn_jit {

// Rendered once, for whichever targets are then asked for it.
struct KernelRequest {
  KernelSpec spec;
  RenderedKernel rendered;
};

}  // namespace flash_attn_jit
