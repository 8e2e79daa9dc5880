// C++ errors as the Python classes of flash_attn_jit.errors.
#pragma once

#include "generator/errors.h"

namespace flash_attn_jit::bindings {

// What this library will do but does not do yet; NotImplementedError in Python.
struct NotBuiltError : Error {
  using Error::Error;
};

void register_error_translator();

}  // namespace flash_attn_jit::bindings
