// Making a pack (runtime/cache/pack_files.h says what one is).
#pragma once

#include <filesystem>
#include <memory>
#include <optional>

#include "runtime/library/kernel_library.h"
#include "runtime/system/config.h"
#include "runtime/system/files.h"

namespace flash_attn_jit {

// A library that writes into `out_dir` instead of the cache, takes no pack, and compiles for `driver_version`, or where
// there is none for any driver (the newest NVRTC 12.x unless `config.nvrtc` names one). find_or_compile() of what is
// there and valid gives origin kDiskCache. Sources that are refused are kept in the cache.
std::unique_ptr<KernelLibrary> open_pack_for_writing(const Config& config, const std::filesystem::path& out_dir,
                                                     std::optional<int> driver_version = std::nullopt);

// Writes `out_dir`/manifest.json from the pack's own verified files, in the order of their names.
void write_manifest(const std::filesystem::path& out_dir);

// A pack that is being made, or added to. Where its path ends in .zip and is no folder, it is a zip file: kernels are
// kept beside it, in <path>.parts, until finish() puts them in; should that never come, the next one finds them there.
// One at a time: a second waits.
class PackWriter {
 public:
  // Throws FileError, and Interrupted out of a wait.
  PackWriter(const Config& config, const std::filesystem::path& out, std::optional<int> driver_version);

  // Of what find_or_compile() gives, all that is kCompiled was not in the pack.
  KernelLibrary& library() { return *library_; }

  // The folder that becomes the pack, for tuning records to be put in.
  const std::filesystem::path& folder() const { return folder_; }

  // Writes the manifest, and the zip file where it is one.
  void finish();

 private:
  void write_zip();

  std::filesystem::path out_, folder_;
  bool is_zip_;
  std::optional<FileLock> lock_;
  std::unique_ptr<KernelLibrary> library_;
};

}  // namespace flash_attn_jit
