#include "runtime/cache/trusted_folder.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <memory>

namespace flash_attn_jit {

Writers writers_of(const Descriptor& file, const std::filesystem::path& path) {
  struct stat status{};
  if (::fstat(file.get(), &status) != 0) fail_on_file("read", path, errno);
  return {status.st_uid, status.st_gid, (status.st_mode & S_IWGRP) != 0, (status.st_mode & S_IWOTH) != 0};
}

bool is_us_or_root(uid_t user) { return user == ::geteuid() || user == 0; }

std::optional<TrustedFolder> TrustedFolder::open(const std::filesystem::path& path, FolderUse use, Links links) {
  Descriptor folder(::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (folder.get() < 0) {
    if (errno == ENOENT || errno == ENOTDIR) return std::nullopt;
    fail_on_file("open the folder", path, errno);
  }
  const Writers writers = writers_of(folder, path);
  return TrustedFolder(path, use, links, std::move(folder), writers);
}

std::optional<std::string> TrustedFolder::distrust() const {
  if (use_ == FolderUse::kCache && !is_us_or_root(writers_.owner))
    return "the folder " + path_.string() + " belongs to user " + std::to_string(writers_.owner) +
           ", this process to " + std::to_string(::geteuid());
  if (writers_.only_owner()) return std::nullopt;
  const std::string reason = "other users may write into the folder " + path_.string();
  if (use_ == FolderUse::kCache) return reason + " and may have put kernels there; remove it, and it is made anew";
  return reason + ", so that its kernels may be anybody's; make the pack in a folder that its owner alone may write";
}

// Nothing where there is nothing of the name. Throws FileError, also where it is not to be trusted.
std::optional<Descriptor> TrustedFolder::open_within(const std::string& name, int flags) const {
  const std::filesystem::path path = path_ / name;
  const int no_links = links_ == Links::kRefused ? O_NOFOLLOW : 0;
  // Not blocking, so that a pipe which somebody put there is met with an error instead of a wait.
  Descriptor opened(::openat(folder_.get(), name.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK | no_links | flags));
  if (opened.get() < 0) {
    if (errno == ENOENT) return std::nullopt;
    // Of a link to a folder Linux says that it is no folder.
    if (no_links != 0 && (errno == ELOOP || errno == ENOTDIR))
      throw FileError("it is a link, or not what its name says");
    fail_on_file("open", path, errno);
  }
  const Writers writers = writers_of(opened, path);
  if (!is_us_or_root(writers.owner) && writers.owner != writers_.owner)
    throw FileError("it belongs to user " + std::to_string(writers.owner) + ", this process to " +
                    std::to_string(::geteuid()));
  if (!writers.only_owner()) throw FileError("others may write it");
  return opened;
}

std::optional<std::string> TrustedFolder::read(const std::string& name, std::uint64_t most_bytes) const {
  const auto file = open_within(name, 0);
  if (!file) return std::nullopt;
  return read_whole(*file, path_ / name, most_bytes);
}

std::optional<TrustedFolder> TrustedFolder::folder(const std::string& name) const {
  auto opened = open_within(name, O_DIRECTORY);
  if (!opened) return std::nullopt;
  const Writers writers = writers_of(*opened, path_ / name);
  return TrustedFolder(path_ / name, use_, links_, *std::move(opened), writers);
}

std::vector<TrustedFolder::Entry> TrustedFolder::entries(std::size_t most) const {
  // Opened anew, because a descriptor has one place where its reading stands.
  const int own = ::openat(folder_.get(), ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  const auto close_folder = [](DIR* folder) { ::closedir(folder); };
  const std::unique_ptr<DIR, decltype(close_folder)> stream(own < 0 ? nullptr : ::fdopendir(own), close_folder);
  if (stream == nullptr) fail_on_file("read the folder", path_, errno);
  std::vector<Entry> entries;
  for (errno = 0; const dirent* found = ::readdir(stream.get()); errno = 0) {
    const std::string name = found->d_name;
    if (name == "." || name == "..") continue;
    if (entries.size() == most)
      throw FileError("the folder " + path_.string() + " holds too much; accepted: at most " + std::to_string(most) +
                      " files");
    struct stat status{};
    const bool is_known =
        ::fstatat(own, name.c_str(), &status, links_ == Links::kRefused ? AT_SYMLINK_NOFOLLOW : 0) == 0;
    entries.push_back({name, is_known && S_ISDIR(status.st_mode)});
  }
  if (errno != 0) fail_on_file("read the folder", path_, errno);
  std::sort(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) { return a.name < b.name; });
  return entries;
}

}  // namespace flash_attn_jit
