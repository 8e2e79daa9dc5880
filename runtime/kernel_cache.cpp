#include "runtime/kernel_cache.h"

#include <sys/stat.h>
#include <unistd.h>

#include "runtime/cache_folder.h"
#include "runtime/config.h"
#include "runtime/log.h"

namespace flash_attn_jit {
namespace {

namespace fs = std::filesystem;

// A kernel file as read: the kernel, or the fault, or neither where there is no file.
struct Reading {
  std::optional<CompiledKernel> kernel;
  std::string fault;
};

Reading read_kernel(const fs::path& path, const KernelKey& key) {
  std::optional<std::string> bytes;
  try {
    bytes = read_file(path);
  } catch (const FileError& error) {
    return {std::nullopt, error.what()};
  }
  if (!bytes) return {};
  auto parsed = parse_kernel_file(*bytes);
  if (const auto* fault = std::get_if<KernelFileFault>(&parsed)) return {std::nullopt, fault->reason};
  KernelFile& file = std::get<KernelFile>(parsed);
  if (file.id.key != key) return {std::nullopt, "it holds the kernel of another key"};
  return {std::move(file.kernel), ""};
}

// The kernel, unless the caller cannot use it, which is said by name.
std::optional<FoundKernel> accept(const KernelId& id, CompiledKernel kernel, KernelOrigin origin,
                                  const KernelCache::Objection& objection) {
  if (objection)
    if (const auto reason = objection(kernel)) {
      warn_once("kernel " + id.name + " is there but cannot be used here: " + *reason);
      return std::nullopt;
    }
  return FoundKernel{std::move(kernel), origin};
}

mode_t folder_mode(FolderUse use) { return use == FolderUse::kCache ? 0700 : 0755; }
mode_t file_mode(FolderUse use) { return use == FolderUse::kCache ? 0600 : 0644; }

}  // namespace

KernelCache::KernelCache(KernelCacheSettings settings) : settings_(std::move(settings)) {}

std::optional<FoundKernel> KernelCache::find(const KernelId& id, const Objection& objection) {
  if (auto found = find_in_pack(id, objection)) return found;
  if (auto found = find_in_folder(id, objection, Fault::kLeave)) return found;
  return find_in_memory(id, objection);
}

FoundKernel KernelCache::get_or_build(const KernelId& id, const Build& build, const Objection& objection) {
  if (auto found = find(id, objection)) return *std::move(found);
  std::promise<FoundKernel> promise;
  std::shared_future<FoundKernel> built_elsewhere;
  {
    const std::lock_guard guard(mutex_);
    const auto [entry, is_ours] = in_flight_.try_emplace(id.key);
    if (is_ours)
      entry->second = promise.get_future().share();
    else
      built_elsewhere = entry->second;
  }
  if (built_elsewhere.valid()) return built_elsewhere.get();

  const auto leave = [&] {
    const std::lock_guard guard(mutex_);
    in_flight_.erase(id.key);
  };
  try {
    FoundKernel found = build_and_store(id, build, objection);
    promise.set_value(found);
    leave();
    return found;
  } catch (...) {
    promise.set_exception(std::current_exception());
    leave();
    throw;
  }
}

FoundKernel KernelCache::build_and_store(const KernelId& id, const Build& build, const Objection& objection) {
  const std::optional<FileLock> lock = lock_for(id);
  // Whoever held the lock before may have built it.
  if (auto found = find_in_folder(id, objection, lock ? Fault::kSetAside : Fault::kLeave))
    return *std::move(found);
  if (auto found = find_in_memory(id, objection)) return *std::move(found);
  FoundKernel found{build(), KernelOrigin::kCompiled};
  if (!lock || !store(id, found.kernel)) keep_in_memory(id, found.kernel);
  return found;
}

std::optional<FoundKernel> KernelCache::find_in_pack(const KernelId& id, const Objection& objection) {
  if (!settings_.prebuilt) return std::nullopt;
  const fs::path path = *settings_.prebuilt / id.file_name();
  Reading reading = read_kernel(path, id.key);
  if (reading.kernel) return accept(id, *std::move(reading.kernel), KernelOrigin::kPrebuilt, objection);
  if (!reading.fault.empty())
    warn_once("prebuilt kernel " + path.string() + " is passed over: " + reading.fault);
  return std::nullopt;
}

std::optional<FoundKernel> KernelCache::find_in_folder(const KernelId& id, const Objection& objection,
                                                       Fault fault) {
  if (const auto reason = distrust()) {
    warn_about_folder(*reason);
    return std::nullopt;
  }
  const fs::path path = settings_.dir / id.file_name();
  Reading reading = read_kernel(path, id.key);
  if (reading.kernel) {
    mark_used(path);
    return accept(id, *std::move(reading.kernel), KernelOrigin::kDiskCache, objection);
  }
  // Only under the lock: without it, what is set aside might be what somebody has just rebuilt.
  if (!reading.fault.empty() && fault == Fault::kSetAside) {
    const fs::path aside = path.string() + std::string(kBrokenSuffix);
    const bool moved = ::rename(path.c_str(), aside.c_str()) == 0;
    warn_once("cached kernel " + path.string() + " does not verify (" + reading.fault + "); " +
              (moved ? "it is set aside as " + aside.filename().string() : "it cannot be set aside") +
              " and built anew");
  }
  return std::nullopt;
}

std::optional<FoundKernel> KernelCache::find_in_memory(const KernelId& id, const Objection& objection) {
  std::optional<CompiledKernel> kernel;
  {
    const std::lock_guard guard(mutex_);
    if (const auto entry = in_memory_.find(id.key); entry != in_memory_.end()) kernel = entry->second;
  }
  if (!kernel) return std::nullopt;
  return accept(id, *std::move(kernel), KernelOrigin::kDiskCache, objection);
}

std::optional<FileLock> KernelCache::lock_for(const KernelId& id) {
  if (distrust()) return std::nullopt;
  try {
    create_folders(settings_.dir, folder_mode(settings_.use));
    return FileLock::acquire(settings_.dir / lock_name(id.key), FileLock::Wait::kUntilFree);
  } catch (const FileError& error) {
    if (settings_.use == FolderUse::kPack) throw;
    warn_about_folder(error.what());
    return std::nullopt;
  }
}

// Whether the kernel lies in the folder now.
bool KernelCache::store(const KernelId& id, const CompiledKernel& kernel) {
  const std::string bytes = serialize({id, kernel});
  if (bytes.size() > settings_.max_bytes) {
    warn_once("kernel " + id.name + " is kept in memory only: the cache is bounded to " +
              std::to_string(settings_.max_bytes) + " bytes and it has " + std::to_string(bytes.size()));
    return false;
  }
  try {
    write_file(settings_.dir / id.file_name(), settings_.dir / temporary_name(id.key), bytes,
               file_mode(settings_.use));
    evict(settings_.dir, settings_.max_bytes);
    return true;
  } catch (const FileError& error) {
    if (settings_.use == FolderUse::kPack) throw;
    warn_about_folder(error.what());
    return false;
  }
}

void KernelCache::keep_in_memory(const KernelId& id, const CompiledKernel& kernel) {
  const std::lock_guard guard(mutex_);
  in_memory_.insert_or_assign(id.key, kernel);
}

std::string KernelCache::keep_refused_source(const KernelId& id, std::string_view source) {
  const fs::path path = settings_.dir / source_name(id);
  try {
    if (const auto reason = distrust()) throw FileError(*reason);
    create_folders(settings_.dir, folder_mode(settings_.use));
    write_file(path, settings_.dir / temporary_name(id.key), source, file_mode(settings_.use));
  } catch (const FileError& error) {
    return std::string("nowhere: ") + error.what();
  }
  return path.string();
}

// Why kernels of this folder must not be run: somebody else could have put them there.
std::optional<std::string> KernelCache::distrust() const {
  if (settings_.use == FolderUse::kPack) return std::nullopt;
  struct stat status {};
  if (::stat(settings_.dir.c_str(), &status) != 0) return std::nullopt;
  if (status.st_uid != ::geteuid())
    return "the folder " + settings_.dir.string() + " belongs to user " + std::to_string(status.st_uid) +
           ", this process to " + std::to_string(::geteuid());
  if ((status.st_mode & 022) != 0)
    return "other users may write into the folder " + settings_.dir.string() +
           "; take that right away (chmod 700)";
  return std::nullopt;
}

void KernelCache::warn_about_folder(const std::string& reason) {
  if (warned_about_folder_.exchange(true)) return;
  log(LogLevel::kWarning, "compiled kernels are kept in memory only: " + reason +
                              ". Set FLASH_ATTN_JIT_CACHE_DIR to a folder of your own");
}

}  // namespace flash_attn_jit
