#include "runtime/cache/cache_folder.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <random>

namespace flash_attn_jit {
namespace {

namespace fs = std::filesystem;

enum class FileKind { kKernel, kBroken, kSource, kTemporary, kLock };

struct OwnFile {
  fs::path path;
  FileKind kind;
  std::string key;  // in hex
  std::uint64_t bytes;
  fs::file_time_type last_used;
};

bool is_key(std::string_view text) {
  return text.size() == 64 && text.find_first_not_of("0123456789abcdef") == std::string_view::npos;
}

bool remove_suffix(std::string_view& text, std::string_view suffix) {
  if (!text.ends_with(suffix)) return false;
  text.remove_suffix(suffix.size());
  return true;
}

// What a name of ours tells; nothing for the files of others.
std::optional<std::pair<FileKind, std::string>> classify(std::string_view name) {
  const auto when_key = [](FileKind kind, std::string_view key) -> std::optional<std::pair<FileKind, std::string>> {
    if (!is_key(key)) return std::nullopt;
    return std::pair{kind, std::string(key)};
  };
  if (remove_suffix(name, ".lock")) return when_key(FileKind::kLock, name);
  if (remove_suffix(name, ".tmp")) return when_key(FileKind::kTemporary, name.substr(0, name.find('.')));
  const bool broken = remove_suffix(name, kBrokenSuffix);
  const bool source = !broken && remove_suffix(name, ".cu");
  if (!source && !remove_suffix(name, ".kernel")) return std::nullopt;
  const std::size_t dot = name.rfind('.');
  if (dot == std::string_view::npos) return std::nullopt;
  return when_key(broken ? FileKind::kBroken : source ? FileKind::kSource : FileKind::kKernel, name.substr(dot + 1));
}

// Least recently used first. Files may vanish while the folder is read.
std::vector<OwnFile> own_files(const fs::path& dir) {
  std::vector<OwnFile> files;
  std::error_code error;
  for (fs::directory_iterator entry(dir, error), end; !error && entry != end; entry.increment(error)) {
    const auto what = classify(entry->path().filename().string());
    std::error_code vanished;
    const std::uint64_t bytes = what ? fs::file_size(entry->path(), vanished) : 0;
    if (!what || vanished) continue;
    const fs::file_time_type last_used = fs::last_write_time(entry->path(), vanished);
    if (!vanished) files.push_back({entry->path(), what->first, what->second, bytes, last_used});
  }
  if (error && error != std::errc::no_such_file_or_directory)
    throw FileError("cannot read the folder " + dir.string() + ": " + error.message());
  std::sort(files.begin(), files.end(), [](const OwnFile& a, const OwnFile& b) {
    return std::tie(a.last_used, a.path) < std::tie(b.last_used, b.path);
  });
  return files;
}

// Whether it is gone now.
bool remove(const OwnFile& file, CacheRemoval& removal) {
  if (::unlink(file.path.c_str()) == 0) {
    removal.files += 1;
    removal.bytes += file.bytes;
    return true;
  }
  if (errno == ENOENT) return true;  // somebody else was faster
  if (removal.fault.empty()) removal.fault = file.path.string() + " cannot be removed: " + std::strerror(errno);
  return false;
}

bool is_old(const OwnFile& file) { return fs::file_time_type::clock::now() - file.last_used > std::chrono::hours(1); }

// What belongs to a process that builds: removed only where nobody holds the key's lock, which frees the
// lock's file too. Without locks, where it is old.
void remove_unless_in_use(const OwnFile& file, CacheRemoval& removal) {
  const bool is_temporary = file.kind == FileKind::kTemporary;
  try {
    const auto lock = FileLock::acquire(file.path.parent_path() / (file.key + ".lock"), FileLock::Wait::kNot);
    if (lock && is_temporary) remove(file, removal);
  } catch (const LockError&) {
    if (is_temporary && is_old(file)) remove(file, removal);
  } catch (const FileError& error) {
    if (removal.fault.empty()) removal.fault = error.what();
  }
}

bool belongs_to_a_builder(const OwnFile& file) {
  return file.kind == FileKind::kTemporary || file.kind == FileKind::kLock;
}

}  // namespace

std::string lock_name(const KernelKey& key) { return to_hex(key) + ".lock"; }

std::string temporary_name(const KernelKey& key) {
  // By chance: process numbers come again, in containers soon.
  static std::atomic<unsigned> count = 0;
  std::random_device chance;
  char number[32];
  std::snprintf(number, sizeof number, "%08x%08x-%u", chance(), chance(), count++);
  return to_hex(key) + "." + number + ".tmp";
}

std::optional<FileLock> lock_if_there_are_locks(const fs::path& dir, const KernelKey& key) {
  try {
    return FileLock::acquire(dir / lock_name(key), FileLock::Wait::kUntilFree);
  } catch (const LockError&) {
    return std::nullopt;
  }
}

std::string source_name(const KernelId& id) { return id.name + "." + to_hex(id.key) + ".cu"; }

void mark_used(const fs::path& path) { ::utimensat(AT_FDCWD, path.c_str(), nullptr, 0); }

namespace {

// Nothing where the file has vanished.
std::optional<CacheEntry> entry_of(const TrustedFolder& folder, const OwnFile& own) {
  CacheEntry entry{own.path, own.bytes, own.last_used, std::nullopt, ""};
  try {
    const auto bytes = folder.read(own.path.filename().string());
    if (!bytes) return std::nullopt;
    auto parsed = parse_kernel_file(*bytes);
    if (const auto* fault = std::get_if<KernelFileFault>(&parsed))
      entry.fault = fault->reason;
    else if (to_hex(std::get<KernelFile>(parsed).id.key) != own.key)
      entry.fault = "it holds the kernel of another key";
    else
      entry.file = std::get<KernelFile>(std::move(parsed));
    if (entry.file) entry.file->kernel.image.clear();
  } catch (const FileError& error) {
    entry.fault = error.what();
  }
  return entry;
}

}  // namespace

std::vector<CacheEntry> list_cache(const fs::path& dir, FolderUse use) {
  std::vector<CacheEntry> entries;
  const auto folder = TrustedFolder::open(dir, use);
  if (!folder) return entries;
  const auto distrust = folder->distrust();
  for (const OwnFile& own : own_files(dir)) {
    if (own.kind != FileKind::kKernel && own.kind != FileKind::kBroken) continue;
    auto entry =
        distrust ? CacheEntry{own.path, own.bytes, own.last_used, std::nullopt, *distrust} : entry_of(*folder, own);
    if (entry) entries.push_back(*std::move(entry));
  }
  std::reverse(entries.begin(), entries.end());
  return entries;
}

CacheRemoval evict(const fs::path& dir, std::uint64_t max_bytes, std::uint64_t down_to) {
  std::vector<OwnFile> kept;
  CacheRemoval removal;
  for (OwnFile& file : own_files(dir)) {
    if (belongs_to_a_builder(file)) {
      remove_unless_in_use(file, removal);
      continue;
    }
    removal.bytes_left += file.bytes;
    kept.push_back(std::move(file));
  }
  if (removal.bytes_left <= max_bytes) return removal;
  for (const OwnFile& file : kept) {
    const bool is_last = &file == &kept.back();
    if (removal.bytes_left <= (is_last ? max_bytes : down_to)) break;
    if (remove(file, removal)) removal.bytes_left -= file.bytes;
  }
  return removal;
}

CacheRemoval prune_cache(const fs::path& dir, std::uint64_t max_bytes) {
  CacheRemoval removal;
  for (const OwnFile& file : own_files(dir))
    if (file.kind == FileKind::kBroken || file.kind == FileKind::kSource) remove(file, removal);
  const CacheRemoval evicted = evict(dir, max_bytes, max_bytes);
  return {removal.files + evicted.files, removal.bytes + evicted.bytes, evicted.bytes_left,
          removal.fault.empty() ? evicted.fault : removal.fault};
}

CacheRemoval clear_cache(const fs::path& dir) { return prune_cache(dir, 0); }

CacheRemoval clear_built_by(const fs::path& dir, std::string_view compiler) {
  CacheRemoval removal;
  for (const CacheEntry& entry : list_cache(dir)) {
    if (!entry.file) continue;
    const std::string& built_by = entry.file->kernel.built_by;
    // "nvrtc 12.9, linked by driver 12.4" is by "nvrtc 12.9", and not by "nvrtc 12".
    if (!built_by.starts_with(compiler) || (built_by.size() > compiler.size() && built_by[compiler.size()] != ','))
      continue;
    remove({entry.path, FileKind::kKernel, "", entry.bytes, entry.last_used}, removal);
  }
  return removal;
}

}  // namespace flash_attn_jit
