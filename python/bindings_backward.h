// The backward call: torch tensors in, checked, on to the runtime.
#pragma once

#include <pybind11/pybind11.h>

#include <optional>
#include <string>

#include "python/bindings_arguments.h"

namespace flash_attn_jit::bindings {

// Computes dq, dk with dv, and dbias, those that are not None, on the tensors' device and that device's current stream,
// or in the interpreter for CPU tensors. `delta` is room for what one kernel leaves to the next, and `dlse`
// softmax_lse's gradient or None, both like softmax_lse; so is `peaks`, which bfloat16 tensors alone need; `dbias` is a
// BiasGradient. Releases the GIL. Throws what flash_attn_jit.errors and ValueError stand for.
void backward(pybind11::handle dout, pybind11::handle q, pybind11::handle k, pybind11::handle v, pybind11::handle out,
              pybind11::handle softmax_lse, pybind11::handle dlse, pybind11::handle dq, pybind11::handle dk,
              pybind11::handle dv, pybind11::handle dbias, pybind11::handle delta, pybind11::handle peaks,
              pybind11::handle options, const std::optional<std::string>& dkdv_tile,
              const std::optional<std::string>& dq_tile, const std::optional<std::string>& all_keys_tile,
              pybind11::handle user);

}  // namespace flash_attn_jit::bindings
