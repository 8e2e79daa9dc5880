// The tensors of a call: read from torch, and what every kernel family checks of them.
#pragma once

#include <pybind11/pybind11.h>

#include "python/bindings_tensors.h"
#include "runtime/request/tensor_view.h"

namespace flash_attn_jit::bindings {

// One argument: its name, the Python object (for error texts only) and what was read of it.
struct Argument {
  const char* name;
  pybind11::handle object;
  TensorInfo info;

  Argument(const char* name, pybind11::handle object) : name(name), object(object), info(read_tensor(object, name)) {}
};

// Dimensions before heads and head_dim: (batch, seqlen), (total) or (pages, page size).
enum class Layout { kBatch, kTotal, kPages };

void check_same_device(const Argument& argument, const Argument& q);

// A tensor of fp16, or of bf16, as q is, on q's device. A CPU tensor is accepted where the interpreter is on. Shapes
// and strides are checked where a launch is laid out.
void check_input(const Argument& argument, const Argument& q, Layout layout);

// Of a tensor that check_input() let through.
DType dtype_of(const Argument& argument);

// What check_input() says of a tensor's number of dimensions.
[[noreturn]] void refuse_rank(const char* name, pybind11::handle tensor, Layout layout);

bool is_contiguous(const TensorInfo& tensor);

// One of the package's own allocations, so this names a bug rather than a user's mistake: contiguous, float32, for q's
// rows.
void check_rows(const Argument& argument, const Argument& q);

// Varlen tensors as a batch of one.
TensorView view(const Argument& argument);

}  // namespace flash_attn_jit::bindings
