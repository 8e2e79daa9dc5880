// A backward request's end: on a device or in the interpreter.
#pragma once

#include "runtime/cuda/driver.h"
#include "runtime/launch/loaded_kernels.h"
#include "runtime/request/backward.h"

namespace flash_attn_jit {

// Launches on `stream` of CUDA device `device_ordinal`; loads and compiles the kernels first where needed.
void launch_backward(Device& device, const BackwardRequest& request, StreamHandle stream);

// The same on a device of this process.
void backward_on_device(const BackwardRequest& request, int device_ordinal, StreamHandle stream);

// Runs the same kernels in the interpreter, on host memory. Throws InterpreterError where a check fails.
void backward_in_interpreter(const BackwardRequest& request);

}  // namespace flash_attn_jit
