// A prebuilt pack: a folder of `.kernel` files and a manifest.json that says what is in it.
#pragma once

#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "generator/kernel_spec.h"
#include "runtime/compile/compiled_kernel.h"
#include "runtime/cuda/compile_target.h"
#include "runtime/library/kernel_library.h"
#include "runtime/system/config.h"

namespace flash_attn_jit {

// A library that writes into `out_dir` instead of the cache, takes no pack, and compiles for any driver (the
// newest NVRTC 12.x unless `config.nvrtc` names one). find_or_compile() of what is there and valid gives
// origin kDiskCache.
std::unique_ptr<KernelLibrary> open_pack_for_writing(const Config& config, const std::filesystem::path& out_dir);

// Writes `out_dir`/manifest.json from the pack's own verified files, in the order of their names.
void write_manifest(const std::filesystem::path& out_dir);

}  // namespace flash_attn_jit
