#include "runtime/cache/pack_files.h"

#include <fcntl.h>

#include <algorithm>
#include <cerrno>
#include <utility>

#include "runtime/cache/stored_zip.h"

namespace flash_attn_jit {
namespace {

namespace fs = std::filesystem;

constexpr std::size_t kMostPackedFiles = 0xfffe;  // as many as a zip holds
constexpr std::size_t kKeyLetters = 64;
constexpr std::string_view kKernelSuffix = ".kernel";

class PackFolder final : public PackFiles {
 public:
  explicit PackFolder(TrustedFolder folder) : folder_(std::move(folder)) {}

  std::optional<std::string> distrust() const override { return folder_.distrust(); }

  std::vector<std::string> names() const override {
    std::vector<std::string> names;
    for (const TrustedFolder::Entry& entry : folder_.entries(kMostPackedFiles))
      if (entry.is_folder && entry.name == kRecordFolder)
        append_records(folder_, entry.name, "", names);
      else
        names.push_back(entry.name + (entry.is_folder ? "/" : ""));
    return names;
  }

  std::optional<std::string> read(const std::string& name) const override { return read_from(folder_, name); }
  Writers writers() const override { return folder_.writers(); }
  bool is_zip() const override { return false; }

 private:
  static void append_records(const TrustedFolder& parent, const std::string& name, const std::string& prefix,
                             std::vector<std::string>& names) {
    const auto folder = parent.folder(name);
    if (!folder) return;
    const std::string path = prefix + name + "/";
    for (const TrustedFolder::Entry& entry : folder->entries(kMostPackedFiles))
      if (!entry.is_folder)
        names.push_back(path + entry.name);
      else if (is_plain_path(path + entry.name))  // no deeper than a path may be long
        append_records(*folder, entry.name, path, names);
      else
        names.push_back(path + entry.name + "/");
  }

  static std::optional<std::string> read_from(const TrustedFolder& folder, const std::string& name) {
    const std::size_t slash = name.find('/');
    if (slash == std::string::npos) return folder.read(name, kMostPackedFileBytes);
    const auto within = folder.folder(name.substr(0, slash));
    if (!within) return std::nullopt;
    return read_from(*within, name.substr(slash + 1));
  }

  TrustedFolder folder_;
};

class PackZip final : public PackFiles {
 public:
  PackZip(const fs::path& path, const Writers& writers, Descriptor file)
      : path_(path), writers_(writers), zip_(std::move(file), path) {}

  std::optional<std::string> distrust() const override {
    if (writers_.only_owner()) return std::nullopt;
    return "other users may write the file " + path_.string() +
           ", so that its kernels may be anybody's; make the pack a file that its owner alone may write";
  }

  std::vector<std::string> names() const override {
    std::vector<std::string> names;
    for (const ZippedFile& file : zip_.files()) names.push_back(file.name);
    return names;
  }

  std::optional<std::string> read(const std::string& name) const override {
    return zip_.read(name, kMostPackedFileBytes);
  }
  Writers writers() const override { return writers_; }
  bool is_zip() const override { return true; }

 private:
  fs::path path_;
  Writers writers_;
  StoredZip zip_;
};

}  // namespace

PackedFileKind packed_file_kind(std::string_view name) {
  if (!is_plain_path(name)) return PackedFileKind::kOther;
  if (name == kManifestName) return PackedFileKind::kManifest;
  if (name.starts_with(std::string(kRecordFolder) + "/") && name.ends_with(".json")) return PackedFileKind::kRecord;
  if (name.find('/') != std::string_view::npos || !name.ends_with(kKernelSuffix)) return PackedFileKind::kOther;
  const std::string_view key = key_in_name(name);
  return key.size() == kKeyLetters && key.find_first_not_of("0123456789abcdef") == std::string_view::npos
             ? PackedFileKind::kKernel
             : PackedFileKind::kOther;
}

std::string_view key_in_name(std::string_view kernel_file) {
  kernel_file.remove_suffix(std::min(kKernelSuffix.size(), kernel_file.size()));
  return kernel_file.substr(kernel_file.rfind('.') + 1);
}

std::unique_ptr<PackFiles> PackFiles::open(const fs::path& path, Links links) {
  if (auto folder = TrustedFolder::open(path, FolderUse::kPack, links))
    return std::make_unique<PackFolder>(*std::move(folder));
  Descriptor file(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  if (file.get() < 0) {
    if (errno == ENOENT || errno == ENOTDIR) return nullptr;
    fail_on_file("open", path, errno);
  }
  const Writers writers = writers_of(file, path);
  return std::make_unique<PackZip>(path, writers, std::move(file));
}

std::optional<std::string> distrust_of_bundle(const PackFiles& pack, const BundledPack& bundle) {
  const Descriptor file(::open(bundle.module.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  if (file.get() < 0) fail_on_file("open", bundle.module, errno);
  const Writers of_pack = pack.writers(), of_module = writers_of(file, bundle.module);
  if (!is_us_or_root(of_pack.owner) && of_pack.owner != of_module.owner)
    return "it belongs to user " + std::to_string(of_pack.owner) + ", and " + bundle.module.string() +
           ", which it came with, to " + std::to_string(of_module.owner);
  const bool group_is_one = of_module.group_writes && of_module.group == of_pack.group;
  if ((of_pack.others_write && !of_module.others_write) || (of_pack.group_writes && !group_is_one))
    return "users may write it who may not write " + bundle.module.string() + ", which it came with";
  return std::nullopt;
}

}  // namespace flash_attn_jit
