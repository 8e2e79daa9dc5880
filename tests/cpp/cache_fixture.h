// Kernels made up for tests of the cache.
#pragma once

#include <atomic>
#include <string>

#include "runtime/cache/cache_folder.h"
#include "runtime/cache/kernel_cache.h"

namespace flash_attn_jit::testing {

inline KernelId made_up_id(const std::string& name) {
  return {make_key({{"source", name}}), "flash_fwd_" + name + "_sm75", "fwd " + name, "sm_75"};
}

inline CompiledKernel made_up_kernel(const std::string& image) {
  CompiledKernel kernel;
  kernel.image = image;
  kernel.entry = "entry";
  kernel.built_by = "nobody";
  return kernel;
}

inline KernelCacheSettings settings_for(const std::filesystem::path& dir) {
  return {.dir = dir, .max_bytes = 1 << 20, .prebuilt = std::nullopt, .use = FolderUse::kCache};
}

// What a fresh process would find.
inline std::optional<FoundKernel> found_anew(const std::filesystem::path& dir, const KernelId& id) {
  return KernelCache(settings_for(dir)).find(id);
}

// Counts its calls.
struct CountedBuild {
  std::string image = "image";
  std::atomic<int> calls = 0;
  KernelCache::Build function() {
    return [this] {
      ++calls;
      return made_up_kernel(image);
    };
  }
};

}  // namespace flash_attn_jit::testing
