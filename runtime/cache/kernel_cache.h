// The disk cache of compiled kernels, in front of it read-only packs. Threads and processes may share one
// folder; what lies in it is told in cache_folder.h.
#pragma once

#include <atomic>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <future>
#include <map>
#include <mutex>
#include <optional>
#include <string>

#include "runtime/cache/kernel_file.h"
#include "runtime/cache/pack_files.h"
#include "runtime/cache/trusted_folder.h"
#include "runtime/compile/compiled_kernel.h"
#include "runtime/system/files.h"
#include "runtime/system/fork.h"

namespace flash_attn_jit {

struct KernelCacheSettings {
  std::filesystem::path dir;  // empty: there is none, and memory serves
  std::uint64_t max_bytes = std::uint64_t{1} << 30;
  std::optional<std::filesystem::path> prebuilt;  // a pack: searched first, never written
  FolderUse use = FolderUse::kCache;
  std::optional<BundledPack> bundled = {};  // searched next, never written
};

class KernelCache {
 public:
  explicit KernelCache(KernelCacheSettings settings);

  // Why a stored kernel cannot be used here (a driver too old for it), or nothing where it can.
  using Objection = std::function<std::optional<std::string>(const CompiledKernel&)>;
  using Build = std::function<CompiledKernel()>;

  // A pack's kernel, else the folder's, else nothing. `objection` may be empty.
  std::optional<FoundKernel> find(const KernelId& id, const Objection& objection = {});

  // As find(), else build().
  FoundKernel get_or_build(const KernelId& id, const Build& build, const Objection& objection = {});

  // After a find() in vain: `build()`, whose result is stored. Any number of threads and processes that ask for one key
  // build it once: the others wait. What `build` throws reaches every waiting thread, and nothing is stored. `build`
  // runs without a lock that callers of other keys need. Throws Interrupted out of a wait.
  FoundKernel build(const KernelId& id, const Build& build, const Objection& objection = {});

  // Keeps a source that was refused, for its author to look at. The path, or "nowhere: " and the reason.
  std::string keep_refused_source(const KernelId& id, std::string_view source);

  const KernelCacheSettings& settings() const { return settings_; }

  // How many times find() went through the places.
  int lookups() const { return lookups_; }

 private:
  enum class Fault { kLeave, kSetAside };

  // The right to build a kernel, and to keep it.
  struct Claim {
    std::optional<FileLock> lock;
    bool may_store = false;
  };

  // A kernel that a thread of `process` is building: after a fork, of another process.
  struct Building {
    pid_t process;
    std::shared_future<FoundKernel> result;
  };

  std::optional<std::shared_future<FoundKernel>> join_or_start(const KernelKey& key,
                                                               std::promise<FoundKernel>& promise);
  FoundKernel build_for_all(const KernelId& id, const Build& build, const Objection& objection,
                            std::promise<FoundKernel>& promise);
  FoundKernel build_and_store(const KernelId& id, const Build& build, const Objection& objection);
  std::optional<FoundKernel> find_in_packs(const KernelId& id, const Objection& objection);
  std::optional<FoundKernel> find_in_pack(const std::filesystem::path& path, const BundledPack* bundle,
                                          const KernelId& id, const Objection& objection);
  std::optional<FoundKernel> find_in_folder(const KernelId& id, const Objection& objection, Fault fault);
  std::optional<FoundKernel> find_in_memory(const KernelId& id, const Objection& objection);
  bool store(const KernelId& id, const CompiledKernel& kernel);
  void keep_within_bounds(std::uint64_t stored);
  void keep_in_memory(const KernelId& id, const CompiledKernel& kernel);
  Claim claim(const KernelId& id);
  std::optional<TrustedFolder> open_folder() const;
  void make_folder() const;
  void fail_or_warn(const FileError& error);

  KernelCacheSettings settings_;
  std::atomic<bool> warned_about_folder_ = false;
  std::atomic<int> lookups_ = 0;
  ForkSafeMutex mutex_;  // guards what is below; never held while building, reading or writing
  std::map<KernelKey, Building> in_flight_;
  std::map<KernelKey, CompiledKernel> in_memory_;  // what could not be stored
  std::uint64_t until_reading_ = 0;  // bytes that may be stored before the folder is read for its bound again
};

}  // namespace flash_attn_jit
