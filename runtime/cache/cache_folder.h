// The cache's folder: names, recency, bounds, housekeeping.
//
//   <name>.<key>.kernel          a kernel; its modification time is its last use, kept by us
//   <name>.<key>.kernel.broken   set aside because it did not verify
//   <name>.<key>.cu              a source that its compiler refused
//   <key>.lock                   held while the kernel of that key is built
//   <key>.<number>.tmp           being written, under that lock
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "runtime/cache/kernel_file.h"
#include "runtime/cache/trusted_folder.h"

namespace flash_attn_jit {

inline constexpr std::string_view kBrokenSuffix = ".broken";

std::string lock_name(const KernelKey& key);
std::string temporary_name(const KernelKey& key);  // another one at every call, in every process
std::string source_name(const KernelId& id);

// The lock of `key`; nothing where the file system has no locks: files are then still whole or not there, but two
// processes may build the same. Throws FileError and Interrupted.
std::optional<FileLock> lock_if_there_are_locks(const std::filesystem::path& dir, const KernelKey& key);

// Makes a kernel the most recently used. A folder that cannot be written keeps its order.
void mark_used(const std::filesystem::path& path);

struct CacheEntry {
  std::filesystem::path path;
  std::uint64_t bytes = 0;
  std::filesystem::file_time_type last_used;
  std::optional<KernelFile> file;  // without its image; nothing where it does not verify
  std::string fault;               // why it does not, or why it is not trusted
};

// Every kernel file of a folder, most recently used first, those set aside included. A folder that is not
// there is empty. Reads and verifies each. Throws FileError where the folder cannot be read.
std::vector<CacheEntry> list_cache(const std::filesystem::path& dir, FolderUse use = FolderUse::kCache);

struct CacheRemoval {
  std::size_t files = 0;
  std::uint64_t bytes = 0;
  std::uint64_t bytes_left = 0;  // of kernels, broken files and refused sources
  std::string fault;             // why one that should have gone is still there; empty where all went
};

// Removes what dead processes left, then, where there are more than `max_bytes`, the least recently used kernels,
// broken files and refused sources until no more than `down_to` are left. What was used last stays where `max_bytes`
// allow it.
CacheRemoval evict(const std::filesystem::path& dir, std::uint64_t max_bytes, std::uint64_t down_to);

// Removes what was set aside and refused sources, then evicts.
CacheRemoval prune_cache(const std::filesystem::path& dir, std::uint64_t max_bytes);

// Removes every file that is the cache's own and not in use; others stay.
CacheRemoval clear_cache(const std::filesystem::path& dir);

// Removes the kernels that `compiler`, as "nvrtc 12.9", had a part in: a kernel's key does not tell who made it.
CacheRemoval clear_built_by(const std::filesystem::path& dir, std::string_view compiler);

}  // namespace flash_attn_jit
