// An append request's end: on a device or in the interpreter.
#pragma once

#include "runtime/cuda/driver.h"
#include "runtime/request/append.h"

namespace flash_attn_jit {

// As forward_on_device() and forward_in_interpreter().
void append_on_device(const AppendRequest& request, int device_ordinal, StreamHandle stream);
void append_in_interpreter(const AppendRequest& request);

}  // namespace flash_attn_jit
