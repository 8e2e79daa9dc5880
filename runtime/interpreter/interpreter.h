// Runs a kernel's grid on the CPU, every CUDA thread a fiber, and checks what a GPU would let pass.
#pragma once

#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "generator/errors.h"
#include "runtime/compile/compiled_kernel.h"

namespace flash_attn_jit {

// A failed check: names the kernel, source file and line, block, warp, lane, and what happened.
struct InterpreterError : Error {
  using Error::Error;
};

// What a kernel may do with a tensor: one of the two.
enum class TensorUse { kRead, kWrite };

// A tensor that the kernel may touch; every global access is checked against it, gaps between rows included.
struct TensorExtent {
  std::string name;  // "q", "softmax_lse"
  void* data = nullptr;
  int element_bytes = 2;
  std::vector<std::int64_t> shape;
  std::vector<std::int64_t> strides;  // in elements
  TensorUse use = TensorUse::kRead;
};

struct GridShape {
  std::int64_t blocks = 0;
  int threads = 0;
  int dynamic_smem = 0;  // bytes
};

// Shared-memory traffic of one access kind ("ldmatrix_x4", "store_shared_16B", ...), one count a warp-wide
// access.
struct AccessCount {
  std::int64_t accesses = 0;
  std::int64_t cycles = 0;        // that the 32 banks need
  std::int64_t ideal_cycles = 0;  // that they would need without conflicts
  double factor() const { return ideal_cycles ? double(cycles) / double(ideal_cycles) : 1.0; }
};

struct InterpreterReport {
  std::string kernel;
  std::int64_t blocks = 0;
  std::map<std::string, AccessCount> shared;  // by access kind
  std::string text() const;                   // a few lines to print
  std::string json() const;
};

// Runs every block of `grid`; `params` is the kernel's argument struct. `kernel.image` is a host shared
// object. Throws InterpreterError at the first race, out-of-bounds or unwritten read, Interrupted where the user has asked
// to stop.
InterpreterReport interpret(const CompiledKernel& kernel, const GridShape& grid, const void* params,
                            std::span<const TensorExtent> tensors);

// The report of the last interpret() of this process, empty before the first.
InterpreterReport last_interpreter_report();

}  // namespace flash_attn_jit
