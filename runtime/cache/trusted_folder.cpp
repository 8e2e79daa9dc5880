#include "runtime/cache/trusted_folder.h"

#include <fcntl.h>
#include <sys/stat.h>

#include <cerrno>

namespace flash_attn_jit {
namespace {

constexpr mode_t kOthersMayWrite = S_IWGRP | S_IWOTH;

bool is_us_or_root(uid_t user) { return user == ::geteuid() || user == 0; }

}  // namespace

std::optional<TrustedFolder> TrustedFolder::open(const std::filesystem::path& path, FolderUse use) {
  Descriptor folder(::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (folder.get() < 0) {
    if (errno == ENOENT || errno == ENOTDIR) return std::nullopt;
    fail_on_file("open the folder", path, errno);
  }
  struct stat status{};
  if (::fstat(folder.get(), &status) != 0) fail_on_file("read the folder", path, errno);
  return TrustedFolder(path, use, std::move(folder), status.st_uid, status.st_mode);
}

std::optional<std::string> TrustedFolder::distrust() const {
  if (use_ == FolderUse::kCache && !is_us_or_root(owner_))
    return "the folder " + path_.string() + " belongs to user " + std::to_string(owner_) + ", this process to " +
           std::to_string(::geteuid());
  if ((mode_ & kOthersMayWrite) == 0) return std::nullopt;
  const std::string reason = "other users may write into the folder " + path_.string();
  if (use_ == FolderUse::kCache) return reason + " and may have put kernels there; remove it, and it is made anew";
  return reason + ", so that its kernels may be anybody's; make the pack in a folder that its owner alone may write";
}

std::optional<std::string> TrustedFolder::read(const std::string& name, std::uint64_t most_bytes) const {
  const std::filesystem::path path = path_ / name;
  // Not blocking, so that a pipe which somebody put there is met with an error instead of a wait.
  const Descriptor file(::openat(folder_.get(), name.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  if (file.get() < 0) {
    if (errno == ENOENT) return std::nullopt;
    fail_on_file("open", path, errno);
  }
  struct stat status{};
  if (::fstat(file.get(), &status) != 0) fail_on_file("read", path, errno);
  if (!is_us_or_root(status.st_uid) && status.st_uid != owner_)
    throw FileError("it belongs to user " + std::to_string(status.st_uid) + ", this process to " +
                    std::to_string(::geteuid()));
  if ((status.st_mode & kOthersMayWrite) != 0) throw FileError("others may write it");
  return read_whole(file, path, most_bytes);
}

}  // namespace flash_attn_jit
