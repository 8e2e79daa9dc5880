// Reading kernels, and the records that choose among them, from a folder, and only those that nobody else can have put
// there: they run with the rights of this process.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "runtime/system/files.h"

namespace flash_attn_jit {

enum class FolderUse {
  kCache,  // a user's own: 0700, nobody else may write it, and where it cannot be written memory serves
  kPack,   // a pack: 0755, of whatever owner; where one that is being made cannot be written, it is a FileError
};

// What a symbolic link in a folder is worth: packagers make folders of links, and so do those who want a file read that
// is not theirs.
enum class Links { kFollowed, kRefused };

// Who may write a file or folder.
struct Writers {
  uid_t owner = 0;
  gid_t group = 0;
  bool group_writes = false, others_write = false;

  bool only_owner() const { return !group_writes && !others_write; }
};

// Of an open file or folder. Throws FileError.
Writers writers_of(const Descriptor& file, const std::filesystem::path& path);

// This process's user, or root, whose files are trusted as the system's libraries are.
bool is_us_or_root(uid_t user);

// An open folder. What is read is read from this one, whatever its path comes to name meanwhile.
class TrustedFolder {
 public:
  // Nothing where there is none. Throws FileError.
  static std::optional<TrustedFolder> open(const std::filesystem::path& path, FolderUse use,
                                           Links links = Links::kFollowed);

  // Why nothing in it may be run. A cache must belong to this process's user or to root; a pack, which somebody chose,
  // may belong to anybody. Nobody but the owner may write either.
  std::optional<std::string> distrust() const;

  // The whole file; nothing where there is none. Throws FileError, also where somebody else than the folder's owner,
  // root or this process's user may have written it, and where it has more than `most_bytes`.
  std::optional<std::string> read(const std::string& name, std::uint64_t most_bytes = kAnyBytes) const;

  // A folder in it, under the conditions of a file. Nothing where there is none.
  std::optional<TrustedFolder> folder(const std::string& name) const;

  const Writers& writers() const { return writers_; }

  struct Entry {
    std::string name;
    bool is_folder = false;
  };
  // What is in it, sorted by name; a link that is refused is no folder. Throws FileError, also for more than `most`.
  std::vector<Entry> entries(std::size_t most) const;

 private:
  TrustedFolder(std::filesystem::path path, FolderUse use, Links links, Descriptor folder, const Writers& writers)
      : path_(std::move(path)), use_(use), links_(links), folder_(std::move(folder)), writers_(writers) {}

  std::optional<Descriptor> open_within(const std::string& name, int flags) const;

  std::filesystem::path path_;
  FolderUse use_;
  Links links_;
  Descriptor folder_;
  Writers writers_;
};

}  // namespace flash_attn_jit
