// The options of a call: read from flash_attn_jit._options.Options.
#pragma once

#include <pybind11/pybind11.h>

#include "python/bindings_arguments.h"
#include "runtime/request/attention_options.h"

namespace flash_attn_jit::bindings {

// `type` is the NamedTuple. Looks up, once, where each field lies that is read by name here; throws where a field is
// missing on one of the two sides.
void connect_options(pybind11::type type);

// What is accepted of each option that is a tensor, in words: name -> text.
pybind11::dict accepted_tensors();

// Whether q, k and v are (total, heads, head_dim). Throws ArgumentError for what is no Options.
bool is_varlen(pybind11::handle options);

AttentionOptions read_options(pybind11::handle options, const Argument& q);

}  // namespace flash_attn_jit::bindings
