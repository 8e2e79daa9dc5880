#include "runtime/cache/kernel_cache.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>

#include "runtime/cache/cache_folder.h"
#include "runtime/system/interrupt.h"
#include "runtime/system/log.h"

namespace flash_attn_jit {
namespace {

namespace fs = std::filesystem;

// A kernel file as read: the kernel, or the fault, or neither where there is no file.
struct Reading {
  std::optional<CompiledKernel> kernel;
  std::string fault;
};

// `folder` is a TrustedFolder or PackFiles.
template <class Folder>
Reading read_kernel(const Folder& folder, const KernelId& id) {
  std::optional<std::string> bytes;
  try {
    bytes = folder.read(id.file_name());
  } catch (const FileError& error) {
    return {std::nullopt, error.what()};
  }
  if (!bytes) return {};
  auto parsed = parse_kernel_file(*bytes);
  if (const auto* fault = std::get_if<KernelFileFault>(&parsed)) return {std::nullopt, fault->reason};
  KernelFile& file = std::get<KernelFile>(parsed);
  if (file.id.key != id.key) return {std::nullopt, "it holds the kernel of another key"};
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
  ++lookups_;
  if (auto found = find_in_packs(id, objection)) return found;
  if (auto found = find_in_folder(id, objection, Fault::kLeave)) return found;
  return find_in_memory(id, objection);
}

FoundKernel KernelCache::get_or_build(const KernelId& id, const Build& build, const Objection& objection) {
  if (auto found = find(id, objection)) return *std::move(found);
  return this->build(id, build, objection);
}

FoundKernel KernelCache::build(const KernelId& id, const Build& build, const Objection& objection) {
  while (true) {
    std::promise<FoundKernel> promise;
    const auto built_elsewhere = join_or_start(id.key, promise);
    if (!built_elsewhere) return build_for_all(id, build, objection, promise);
    while (built_elsewhere->wait_for(std::chrono::milliseconds(50)) != std::future_status::ready)
      throw_if_interrupted();
    try {
      return built_elsewhere->get();
    } catch (const Interrupted&) {
      // That thread was; this one goes on.
    }
  }
}

// What another thread of this process is going to have, or nothing where this one is to build and to keep `promise`.
std::optional<std::shared_future<FoundKernel>> KernelCache::join_or_start(const KernelKey& key,
                                                                          std::promise<FoundKernel>& promise) {
  const std::lock_guard guard(mutex_);
  const auto entry = in_flight_.find(key);
  if (entry != in_flight_.end() && entry->second.process == ::getpid()) return entry->second.result;
  in_flight_.insert_or_assign(key, Building{::getpid(), promise.get_future().share()});
  return std::nullopt;
}

FoundKernel KernelCache::build_for_all(const KernelId& id, const Build& build, const Objection& objection,
                                       std::promise<FoundKernel>& promise) {
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
  const Claim claimed = claim(id);
  // Whoever held the lock before may have built it.
  if (auto found = find_in_folder(id, objection, claimed.may_store ? Fault::kSetAside : Fault::kLeave))
    return *std::move(found);
  if (auto found = find_in_memory(id, objection)) return *std::move(found);
  FoundKernel found{build(), KernelOrigin::kCompiled};
  if (!claimed.may_store || !store(id, found.kernel)) keep_in_memory(id, found.kernel);
  return found;
}

std::optional<FoundKernel> KernelCache::find_in_packs(const KernelId& id, const Objection& objection) {
  if (id.is_host_code) return std::nullopt;
  if (settings_.prebuilt)
    if (auto found = find_in_pack(*settings_.prebuilt, nullptr, id, objection)) return found;
  if (settings_.bundled) return find_in_pack(settings_.bundled->pack, &*settings_.bundled, id, objection);
  return std::nullopt;
}

// `bundle`: the pack is this one.
std::optional<FoundKernel> KernelCache::find_in_pack(const fs::path& path, const BundledPack* bundle,
                                                     const KernelId& id, const Objection& objection) {
  const std::string passed_over = "the pack " + path.string() + " is passed over: ";
  try {
    const std::unique_ptr<PackFiles> pack = PackFiles::open(path);
    if (!pack) return std::nullopt;
    if (const auto reason = bundle != nullptr ? distrust_of_bundle(*pack, *bundle) : pack->distrust()) {
      warn_once(passed_over + *reason);
      return std::nullopt;
    }
    Reading reading = read_kernel(*pack, id);
    if (reading.kernel) return accept(id, *std::move(reading.kernel), KernelOrigin::kPrebuilt, objection);
    if (!reading.fault.empty())
      warn_once("prebuilt kernel " + (path / id.file_name()).string() + " is passed over: " + reading.fault);
  } catch (const FileError& error) {
    warn_once(passed_over + error.what());
  }
  return std::nullopt;
}

std::optional<FoundKernel> KernelCache::find_in_folder(const KernelId& id, const Objection& objection, Fault fault) {
  std::optional<TrustedFolder> folder;
  try {
    folder = open_folder();
  } catch (const FileError& error) {
    fail_or_warn(error);
  }
  if (!folder) return std::nullopt;
  const fs::path path = settings_.dir / id.file_name();
  Reading reading = read_kernel(*folder, id);
  if (reading.kernel) {
    mark_used(path);
    return accept(id, *std::move(reading.kernel), KernelOrigin::kDiskCache, objection);
  }
  // Only by who may build it: what is set aside by others might be what somebody has just rebuilt.
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

KernelCache::Claim KernelCache::claim(const KernelId& id) {
  try {
    make_folder();
    return {lock_if_there_are_locks(settings_.dir, id.key), true};
  } catch (const FileError& error) {
    fail_or_warn(error);
    return {};
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
    write_file(settings_.dir / id.file_name(), settings_.dir / temporary_name(id.key), bytes, file_mode(settings_.use));
  } catch (const FileError& error) {
    fail_or_warn(error);
    return false;
  }
  keep_within_bounds(bytes.size());
  return true;
}

// Reads the folder, which may be large, only once an eighth of the room that was left is used: others store too. Where
// there is too much, a tenth goes, so that the next store has room again.
void KernelCache::keep_within_bounds(std::uint64_t stored) {
  {
    const std::lock_guard guard(mutex_);
    const bool room = stored < until_reading_;
    until_reading_ = room ? until_reading_ - stored : 0;
    if (room) return;
  }
  const std::uint64_t max_bytes = settings_.max_bytes;
  std::string fault;
  try {
    const CacheRemoval removal = evict(settings_.dir, max_bytes, max_bytes - max_bytes / 10);
    fault = removal.fault;
    const std::lock_guard guard(mutex_);
    until_reading_ = (max_bytes - std::min(removal.bytes_left, max_bytes)) / 8;
  } catch (const FileError& error) {
    fault = error.what();
  }
  if (!fault.empty()) warn_once("the cache cannot be kept within its bounds: " + fault);
}

void KernelCache::keep_in_memory(const KernelId& id, const CompiledKernel& kernel) {
  const std::lock_guard guard(mutex_);
  in_memory_.insert_or_assign(id.key, kernel);
}

std::string KernelCache::keep_refused_source(const KernelId& id, std::string_view source) {
  // A key of its own: the kernel's lock may be held by the caller, or by nobody.
  const KernelKey key = make_key({{"refused source of", to_hex(id.key)}});
  const fs::path path = settings_.dir / source_name(id);
  try {
    make_folder();
    const std::optional<FileLock> lock = lock_if_there_are_locks(settings_.dir, key);
    write_file(path, settings_.dir / temporary_name(key), source, file_mode(settings_.use));
  } catch (const FileError& error) {
    return std::string("nowhere: ") + error.what();
  }
  keep_within_bounds(source.size());
  return path.string();
}

// Nothing where there is none. Throws FileError where its kernels must not be run.
std::optional<TrustedFolder> KernelCache::open_folder() const {
  if (settings_.dir.empty())
    throw FileError(
        "there is no folder for them: HOME is not set, and this process's user has no entry in the system's "
        "list of users");
  auto folder = TrustedFolder::open(settings_.dir, settings_.use);
  if (folder)
    if (const auto reason = folder->distrust()) throw FileError(*reason);
  return folder;
}

// Throws FileError also where there is one that is not trusted.
void KernelCache::make_folder() const {
  if (!open_folder()) create_folders(settings_.dir, folder_mode(settings_.use));
}

// Without its folder a cache serves from memory, which is said once; a pack that is being made is nothing without it.
void KernelCache::fail_or_warn(const FileError& error) {
  if (settings_.use == FolderUse::kPack) throw error;
  if (warned_about_folder_.exchange(true)) return;
  log(LogLevel::kWarning,
      std::string("compiled kernels are kept in memory only: ") + error.what() +
          ". Set FLASH_ATTN_JIT_CACHE_DIR to a folder of your own; kernels that are built ahead, into an image say, "
          "belong in a pack, which flash-attn-jit prebuild makes and FLASH_ATTN_JIT_PREBUILT names");
}

}  // namespace flash_attn_jit
