// Reading kernels, and the records that choose among them, from a folder, and only those that nobody else can have put
// there: they run with the rights of this process.
#pragma once

#include <sys/types.h>

#include <filesystem>
#include <optional>
#include <string>

#include "runtime/system/files.h"

namespace flash_attn_jit {

enum class FolderUse {
  kCache,  // a user's own: 0700, nobody else may write it, and where it cannot be written memory serves
  kPack,   // a pack: 0755, of whatever owner; where one that is being made cannot be written, it is a FileError
};

// An open folder. What is read is read from this one, whatever its path comes to name meanwhile.
class TrustedFolder {
 public:
  // Nothing where there is none. Throws FileError.
  static std::optional<TrustedFolder> open(const std::filesystem::path& path, FolderUse use);

  // Why nothing in it may be run. A cache must belong to this process's user or to root, whose files are trusted as the
  // system's libraries are; a pack, which somebody chose, may belong to anybody. Nobody but the owner may write either.
  std::optional<std::string> distrust() const;

  // The whole file; nothing where there is none. Throws FileError, also where somebody else than the folder's owner, root
  // or this process's user may have written it, and where it has more than `most_bytes`.
  std::optional<std::string> read(const std::string& name, std::uint64_t most_bytes = kAnyBytes) const;

 private:
  TrustedFolder(std::filesystem::path path, FolderUse use, Descriptor folder, uid_t owner, mode_t mode)
      : path_(std::move(path)), use_(use), folder_(std::move(folder)), owner_(owner), mode_(mode) {}

  std::filesystem::path path_;
  FolderUse use_;
  Descriptor folder_;
  uid_t owner_;
  mode_t mode_;
};

}  // namespace flash_attn_jit
