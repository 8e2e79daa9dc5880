// The disk cache of compiled kernels, in front of it a read-only pack. Threads and processes may share one folder.
//
//   <dir>/<name>.<key>.kernel          a kernel; its modification time is its last use
//   <dir>/<name>.<key>.kernel.broken   set aside because it did not verify
//   <dir>/<name>.<key>.cu              a source that its compiler refused
//   <dir>/<key>.lock                   held while the kernel of that key is built
//   <dir>/<key>.<process>-<n>.tmp      being written
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <future>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "runtime/compiled_kernel.h"
#include "runtime/kernel_file.h"

namespace flash_attn_jit {

// Who may read a folder that the cache creates.
enum class FolderAccess {
  kPrivate,  // a user's cache: 0700
  kShared,   // a pack that is being made: 0755
};

struct KernelCacheSettings {
  std::filesystem::path dir;
  std::uint64_t max_bytes = std::uint64_t{1} << 30;
  std::optional<std::filesystem::path> prebuilt;  // searched first, never written
  FolderAccess access = FolderAccess::kPrivate;
};

class KernelCache {
 public:
  explicit KernelCache(KernelCacheSettings settings);

  // Why a stored kernel cannot be used here (a driver too old for it), or nothing where it can.
  using Objection = std::function<std::optional<std::string>(const CompiledKernel&)>;
  using Build = std::function<CompiledKernel()>;

  // The pack's kernel, else the folder's, else nothing. `objection` may be empty.
  std::optional<FoundKernel> find(const KernelId& id, const Objection& objection = {});

  // As find(), else `build()`, whose result is stored. Any number of threads and processes that ask for one key build it
  // once: the others wait. What `build` throws reaches every waiting thread, and nothing is stored. `build` runs without
  // a lock that callers of other keys need.
  FoundKernel get_or_build(const KernelId& id, const Build& build, const Objection& objection = {});

  // Keeps a source that was refused, for its author to look at. The path, or why it could not be kept.
  std::string keep_refused_source(const KernelId& id, std::string_view source);

  const KernelCacheSettings& settings() const { return settings_; }

 private:
  struct Stored;
  FoundKernel build_and_store(const KernelId& id, const Build& build, const Objection& objection);
  std::optional<FoundKernel> find_on_disk(const KernelId& id, const Objection& objection, bool set_aside);
  std::optional<FoundKernel> find_in_memory(const KernelId& id, const Objection& objection);
  bool folder_is_usable();
  bool store(const KernelId& id, const CompiledKernel& kernel);

  KernelCacheSettings settings_;
  std::mutex mutex_;  // guards the two maps; never held while building, reading or writing
  std::map<KernelKey, std::shared_future<FoundKernel>> in_flight_;
  std::map<KernelKey, CompiledKernel> in_memory_;  // what could not be stored
};

// The process's own cache, as config() says.
KernelCache& process_cache();

// ---- for the command line ----

struct CacheEntry {
  std::filesystem::path path;
  std::uint64_t bytes = 0;
  std::filesystem::file_time_type last_used;
  std::optional<KernelFile> file;  // without its image; nothing where it does not verify
  std::string fault;               // why it does not
};

// Every kernel file of a folder, most recently used first, those set aside included. A folder that is not there is empty.
// Reads and verifies each.
std::vector<CacheEntry> list_cache(const std::filesystem::path& dir);

struct CacheRemoval {
  std::size_t files = 0;
  std::uint64_t bytes = 0;
};

// Removes what was set aside, what dead processes left, refused sources, then the least recently used kernels until no
// more than `max_bytes` are left.
CacheRemoval prune_cache(const std::filesystem::path& dir, std::uint64_t max_bytes);

// Removes every file that is the cache's own; others stay.
CacheRemoval clear_cache(const std::filesystem::path& dir);

}  // namespace flash_attn_jit
