// A user's functions of scores and pairs: read from flash_attn_jit.flex's UserFunctions.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>

#include "python/bindings_arguments.h"
#include "runtime/request/attention_options.h"

namespace flash_attn_jit::bindings {

// Of a UserFunctions or None. Throws ArgumentError for tensors that lie elsewhere than q or are no lists of a block
// mask.
std::shared_ptr<const UserFunctions> read_user_functions(pybind11::handle functions, const Argument& q);

}  // namespace flash_attn_jit::bindings
