// C++ errors as the Python classes of flash_attn_jit.errors.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

namespace flash_attn_jit::bindings {

// For people to read: a path or a compiler's words may hold bytes that are no UTF-8, which come out as U+FFFD.
pybind11::str readable(const std::string& text);

void register_error_translator();

}  // namespace flash_attn_jit::bindings
