// Runs a kernel's grid on the CPU, every CUDA thread a fiber, and checks what a GPU would let pass.
#pragma once

#include <cstdint>
#include <span>

#include "runtime/compile/compiled_kernel.h"
#include "runtime/interpreter/report.h"
#include "runtime/interpreter/tensor_extent.h"

namespace flash_attn_jit {

struct GridShape {
  std::int64_t blocks = 0;
  int threads = 0;
  int dynamic_smem = 0;  // bytes
};

// Runs every block of `grid`; `params` is the kernel's argument struct. `kernel.image` is a host shared
// object. Throws InterpreterError at the first race, out-of-bounds or unwritten read, Interrupted where the user has
// asked to stop.
InterpreterReport interpret(const CompiledKernel& kernel, const GridShape& grid, const void* params,
                            std::span<const TensorExtent> tensors);

// The report of the last interpret() of this process, empty before the first.
InterpreterReport last_interpreter_report();

}  // namespace flash_attn_jit
