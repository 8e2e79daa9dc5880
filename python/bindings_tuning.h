// tune() and autotune(): a choice of problems in, what was found as JSON out.
#pragma once

#include <pybind11/pybind11.h>

namespace flash_attn_jit::bindings {

void bind_tuning(pybind11::module_& module);

}  // namespace flash_attn_jit::bindings
