// The tensors of a call: read from torch, and what every kernel family checks of them.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <optional>

#include "python/bindings_tensors.h"
#include "runtime/tensor_view.h"

namespace flash_attn_jit::bindings {

// One argument: its name, the Python object (for error texts only) and what was read of it.
struct Argument {
  const char* name;
  pybind11::handle object;
  TensorInfo info;

  Argument(const char* name, pybind11::handle object)
      : name(name), object(object), info(read_tensor(object, name)) {}
};

// An fp16 tensor (batch, seqlen, heads, head_dim) on q's device, `layout` in words for the error. A CPU tensor is accepted
// where the interpreter is on.
void check_input(const Argument& argument, const Argument& q, const char* layout);

// The package's own allocations, so these name a bug rather than a user's mistake: a tensor of q's shape, and a
// contiguous float32 one for its rows.
void check_like_q(const Argument& argument, const Argument& q);
void check_rows(const Argument& argument, const Argument& q);

TensorView view(const Argument& argument);
float scale_of(std::optional<double> softmax_scale, std::int64_t head_dim);

}  // namespace flash_attn_jit::bindings
