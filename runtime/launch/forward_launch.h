// A forward request's end: on a device or in the interpreter.
#pragma once

#include "runtime/cuda/driver.h"
#include "runtime/launch/loaded_kernels.h"
#include "runtime/request/forward.h"

namespace flash_attn_jit {

// Launches on `stream` of CUDA device `device_ordinal`; loads and compiles the kernel first where needed.
void launch_forward(Device& device, const ForwardRequest& request, StreamHandle stream);

// The same on a device of this process.
void forward_on_device(const ForwardRequest& request, int device_ordinal, StreamHandle stream);

// Runs the same kernel in the interpreter, on host memory. Throws InterpreterError where a check fails.
void forward_in_interpreter(const ForwardRequest& request);

}  // namespace flash_attn_jit
