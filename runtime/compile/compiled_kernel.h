// A kernel as the compiler leaves it and the cache keeps it.
#pragma once

#include <optional>
#include <string>

#include "generator/render.h"

namespace flash_attn_jit {

// What one kernel needs of the machine, for people to read: nothing where the compiler's log does not tell (PTX, host
// objects, words that are not ptxas's).
struct KernelResources {
  std::optional<int> registers;     // per thread
  int static_smem = 0;              // bytes per block
  std::optional<int> spill_stores;  // bytes
  std::optional<int> spill_loads;   // bytes
};

struct CompiledKernel {
  std::string image;     // ELF cubin, PTX text or host shared object
  std::string entry;     // extern "C" name inside it
  int threads = 0;       // per block
  int dynamic_smem = 0;  // bytes per block
  KernelResources resources;
  std::string built_by;  // "nvrtc 12.9", "g++ 12.2.0 ..."
  // The oldest driver that loads it, counted as cuDriverGetVersion does (12090 is 12.9): for a cubin the first of its
  // NVRTC's major, for PTX its NVRTC's own version; 0 for host objects.
  int min_driver = 0;
  // Of Turing code that a newer GPU runs because no NVRTC knew it: the newest of those, counted in the same way; else
  // 0.
  int stands_in_for_nvrtc = 0;
  std::string log;     // the compiler's log
  double seconds = 0;  // it took to compile
};

// How a kernel is launched is the generator's knowledge, not the compiler's or a file's.
inline void set_launch_shape(CompiledKernel& kernel, const RenderedKernel& rendered) {
  kernel.entry = rendered.entry;
  kernel.threads = rendered.threads;
  kernel.dynamic_smem = rendered.dynamic_smem;
}

// Where a kernel came from, for reports and tests.
enum class KernelOrigin { kPrebuilt, kDiskCache, kCompiled };

struct FoundKernel {
  CompiledKernel kernel;
  KernelOrigin origin;
};

}  // namespace flash_attn_jit
