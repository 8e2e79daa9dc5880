// The files of a pack, which is a folder, or that folder as a zip file:
//
//   manifest.json             what is in it, for people and for `pack verify`; looking a kernel up does not read it
//   <name>.<key>.kernel       a kernel, under the name that it would have in a cache
//   tuning/<...>.json         tuning records, in folders or not
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "runtime/cache/trusted_folder.h"

namespace flash_attn_jit {

inline constexpr const char* kManifestName = "manifest.json";
inline constexpr const char* kRecordFolder = "tuning";

// No file of a pack has more. A kernel has some 100 KB.
inline constexpr std::uint64_t kMostPackedFileBytes = 64 << 20;

enum class PackedFileKind { kKernel, kManifest, kRecord, kOther };

// What a name within a pack says.
PackedFileKind packed_file_kind(std::string_view name);

// The kernel's key in hex, out of the name of a kernel file.
std::string_view key_in_name(std::string_view kernel_file);

// Thread-safe.
class PackFiles {
 public:
  // An open pack; nothing where there is neither a folder nor a file at `path`. Throws FileError, also for a file that
  // is no stored zip.
  static std::unique_ptr<PackFiles> open(const std::filesystem::path& path, Links links = Links::kFollowed);

  virtual ~PackFiles() = default;

  // Why nothing in it may be run: a pack, which somebody chose, may belong to anybody, but nobody else may write it.
  virtual std::optional<std::string> distrust() const = 0;

  // The names of its files, sorted: those of folders within it with their paths. Throws FileError.
  virtual std::vector<std::string> names() const = 0;

  // The whole file; nothing where there is none. Throws FileError, also where it has more than kMostPackedFileBytes.
  virtual std::optional<std::string> read(const std::string& name) const = 0;

  virtual Writers writers() const = 0;
  virtual bool is_zip() const = 0;
};

// A pack that was installed with this library, beside a file of it that this process has loaded.
struct BundledPack {
  std::filesystem::path pack, module;
};

// Why nothing of a bundled pack may be run. It is trusted as its module is: whoever may have written the one may have
// written the other, whose code this process runs already. Throws FileError.
std::optional<std::string> distrust_of_bundle(const PackFiles& pack, const BundledPack& bundle);

}  // namespace flash_attn_jit
