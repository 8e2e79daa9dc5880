// The forward call: torch tensors in, checked, on to the runtime.
#pragma once

#include <pybind11/pybind11.h>

#include <optional>
#include <string>

#include "python/bindings_arguments.h"

namespace flash_attn_jit::bindings {

// Computes attention into `out` and `softmax_lse`, which may be None, `user` being a UserFunctions or None, on the
// tensors' device and that device's current stream, or in the interpreter for CPU tensors. Releases the GIL. Throws
// what flash_attn_jit.errors and ValueError stand for.
void forward(pybind11::handle q, pybind11::handle k, pybind11::handle v, pybind11::handle out,
             pybind11::handle softmax_lse, pybind11::handle options, const std::optional<std::string>& tile,
             pybind11::handle user);

}  // namespace flash_attn_jit::bindings
