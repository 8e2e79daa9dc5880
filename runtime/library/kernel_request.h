// A kernel that is wanted, before anything is known of where it comes from.
#pragma once

#include <string>

#include "generator/kernel_spec.h"
#include "generator/render.h"

namespace flash_attn_jit {

// Rendered once, for whichever targets are then asked for it.
struct KernelRequest {
  KernelSpec spec;
  RenderedKernel rendered;
  std::string label = "";  // of a kernel that no spec describes

  std::string text() const { return label.empty() ? spec.text() : label; }
};

}  // namespace flash_attn_jit
