#include "runtime/library/pack.h"

#include <limits>
#include <map>
#include <system_error>
#include <utility>
#include <variant>
#include <vector>

#include "runtime/cache/cache_folder.h"
#include "runtime/cache/pack_files.h"
#include "runtime/cache/stored_zip.h"
#include "runtime/library/pack_manifest.h"

namespace flash_attn_jit {
namespace {

namespace fs = std::filesystem;

// By name.
using Files = std::map<std::string, std::string>;

// Nothing where it is no kernel that could be found under its name.
std::optional<nlohmann::ordered_json> entry_of(const std::string& name, const std::string& bytes) {
  const auto parsed = parse_kernel_file(bytes);
  const auto* file = std::get_if<KernelFile>(&parsed);
  if (file == nullptr || to_hex(file->id.key) != key_in_name(name)) return std::nullopt;
  return manifest_entry(name, bytes, *file);
}

// The kernels and records of a pack; what cannot be read is no part of it.
void add_files(const PackFiles& pack, Files& files) {
  for (const std::string& name : pack.names()) {
    const PackedFileKind kind = packed_file_kind(name);
    if (kind != PackedFileKind::kKernel && kind != PackedFileKind::kRecord) continue;
    try {
      if (auto bytes = pack.read(name)) files.insert_or_assign(name, *std::move(bytes));
    } catch (const FileError&) {
      // Of another user, say: the next reader would refuse it too.
    }
  }
}

// Of the kernels among `files`, which are sorted by name; those that do not verify are left out, and of `files` too.
std::string manifest_of(Files& files) {
  std::vector<nlohmann::ordered_json> kernels;
  for (auto file = files.begin(); file != files.end();) {
    const bool is_kernel = packed_file_kind(file->first) == PackedFileKind::kKernel;
    auto entry = is_kernel ? entry_of(file->first, file->second) : std::nullopt;
    file = is_kernel && !entry ? files.erase(file) : std::next(file);
    if (entry) kernels.push_back(*std::move(entry));
  }
  return manifest_text(kernels);
}

// The open pack, to be added to; null where there is none. Throws FileError where its kernels may be anybody's.
std::unique_ptr<PackFiles> open_own(const fs::path& path) {
  std::unique_ptr<PackFiles> pack = PackFiles::open(path);
  if (pack != nullptr)
    if (const auto reason = pack->distrust()) throw FileError(*reason);
  return pack;
}

bool is_zip_name(const fs::path& out) {
  std::error_code ignored;
  return out.extension() == ".zip" && !fs::is_directory(out, ignored);
}

fs::path with_suffix(const fs::path& path, const char* suffix) { return path.string() + suffix; }

std::unique_ptr<KernelLibrary> library_into(const fs::path& folder, const Config& config,
                                            std::optional<int> driver_version, std::optional<fs::path> prebuilt) {
  create_folders(folder, 0755);
  open_own(folder);
  KernelCacheSettings settings{.dir = folder,
                               .max_bytes = std::numeric_limits<std::uint64_t>::max(),
                               .prebuilt = std::move(prebuilt),
                               .use = FolderUse::kPack};
  return std::make_unique<KernelLibrary>(config, std::make_shared<KernelCache>(std::move(settings)), driver_version,
                                         std::make_shared<KernelCache>(cache_settings(config)));
}

}  // namespace

std::unique_ptr<KernelLibrary> open_pack_for_writing(const Config& config, const fs::path& out_dir,
                                                     std::optional<int> driver_version) {
  return library_into(out_dir, config, driver_version, std::nullopt);
}

void write_manifest(const fs::path& out_dir) {
  // Listed under the lock: of several processes that build into one folder, the last to write saw what all had built.
  const KernelKey key = make_key({{"file", kManifestName}});
  const std::optional<FileLock> lock = lock_if_there_are_locks(out_dir, key);
  Files files;
  if (const auto pack = PackFiles::open(out_dir)) add_files(*pack, files);
  write_file(out_dir / kManifestName, out_dir / temporary_name(key), manifest_of(files), 0644);
}

PackWriter::PackWriter(const Config& config, const fs::path& out, std::optional<int> driver_version)
    : out_(out), folder_(out), is_zip_(is_zip_name(out)) {
  if (!is_zip_) {
    library_ = open_pack_for_writing(config, out, driver_version);
    return;
  }
  if (out.has_parent_path()) create_folders(out.parent_path(), 0755);
  try {
    if (auto lock = FileLock::acquire(with_suffix(out, ".lock"), FileLock::Wait::kUntilFree))
      lock_.emplace(*std::move(lock));
  } catch (const LockError&) {
    // Without locks the last of several that write has its kernels in the file.
  }
  folder_ = with_suffix(out, ".parts");
  library_ = library_into(folder_, config, driver_version, open_own(out) ? std::optional(out) : std::nullopt);
}

void PackWriter::finish() {
  if (is_zip_)
    write_zip();
  else
    write_manifest(folder_);
}

void PackWriter::write_zip() {
  Files files;
  if (const auto before = open_own(out_)) add_files(*before, files);
  if (const auto parts = open_own(folder_)) add_files(*parts, files);
  std::string manifest = manifest_of(files);
  files.insert_or_assign(kManifestName, std::move(manifest));
  const fs::path temporary = with_suffix(out_, ("." + temporary_name(make_key({{"pack", out_.string()}}))).c_str());
  write_file(out_, temporary, stored_zip(files), 0644);
  std::error_code ignored;
  fs::remove_all(folder_, ignored);
}

}  // namespace flash_attn_jit
