// Kernels of a few lines, written in the tests, compiled for the host and run in the interpreter.
#pragma once

#include <span>
#include <string>

#include "runtime/interpreter/interpreter.h"

namespace flash_attn_jit::testing {

// Compiles `declarations` (which sees templates/primitives.cuh) and a kernel whose body is `body`; in it,
// `params` is what run_small_kernel() is given, a `const Params&`. Lines are counted from 1 within the body,
// in a file "body.cu".
CompiledKernel compile_small_kernel(const std::string& declarations, const std::string& body);

// Runs one block of `threads` threads over 4096 bytes of shared memory.
InterpreterReport run_small_kernel(const CompiledKernel& kernel, int threads, const void* params,
                                   std::span<const TensorExtent> tensors);

// Compiles and runs one whose Params are empty. The error's message, or "" where no check fails.
std::string error_of_small_kernel(const std::string& body, int threads = 64);

}  // namespace flash_attn_jit::testing
