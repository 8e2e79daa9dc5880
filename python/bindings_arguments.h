// The tensors of a call: read from torch, and what every kernel family checks of them.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <optional>

#include "python/bindings_tensors.h"
#include "runtime/request/attention_options.h"
#include "runtime/request/tensor_view.h"

namespace flash_attn_jit::bindings {

// One argument: its name, the Python object (for error texts only) and what was read of it.
struct Argument {
  const char* name;
  pybind11::handle object;
  TensorInfo info;

  Argument(const char* name, pybind11::handle object)
      : name(name), object(object), info(read_tensor(object, name)) {}
};

// The options of a call as Python gives them. What is None is off.
struct OptionArguments {
  std::optional<double> softmax_scale;
  bool causal;
  std::int64_t window_left, window_right;  // negative: without end
  double softcap;
  pybind11::handle alibi_slopes;
  pybind11::handle cu_seqlens_q, cu_seqlens_k;  // both or neither
  std::int64_t max_seqlen_q, max_seqlen_k;      // read with cu_seqlens only

  bool is_varlen() const { return !cu_seqlens_q.is_none() || !cu_seqlens_k.is_none(); }
};

AttentionOptions read_options(const OptionArguments& arguments, const Argument& q);

enum class Lengths { kFixed, kVarlen };  // one for the whole batch, or cu_seqlens
enum class LastDim { kContiguous, kAnyStride };

// An fp16 tensor on q's device, (batch, seqlen, heads, head_dim) or, varlen, (total, heads, head_dim). A CPU tensor is
// accepted where the interpreter is on.
void check_input(const Argument& argument, const Argument& q, Lengths lengths,
                 LastDim last_dim = LastDim::kContiguous);

// The package's own allocations, so these name a bug rather than a user's mistake: a tensor of q's shape, and a
// contiguous float32 one for its rows.
void check_like_q(const Argument& argument, const Argument& q);
void check_rows(const Argument& argument, const Argument& q);

// Varlen tensors as a batch of one.
TensorView view(const Argument& argument);

}  // namespace flash_attn_jit::bindings
