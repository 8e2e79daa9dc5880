// Files as the cache needs them: every call checked, writes that are whole or not there, locks that outlive
// no process.
#pragma once

#include <sys/types.h>

#include <filesystem>
#include <optional>
#include <string>
#include <string_view>

#include "generator/errors.h"

namespace flash_attn_jit {

// Names the path and the system's reason.
struct FileError : Error {
  using Error::Error;
};

// The whole file; nothing where there is none. Throws FileError.
std::optional<std::string> read_file(const std::filesystem::path& path);

// Writes `temporary`, a name that nobody else uses, then renames it to `path`: a reader finds the old file or
// the whole new one, also after a crash. On failure removes `temporary` and throws FileError.
void write_file(const std::filesystem::path& path, const std::filesystem::path& temporary,
                std::string_view bytes, mode_t mode);

// Creates a folder and those above it, with `mode` (less the umask). Throws FileError.
void create_folders(const std::filesystem::path& path, mode_t mode);

// A lock between processes and between threads. The system frees it when its process ends, however it ends.
class FileLock {
 public:
  enum class Wait { kUntilFree, kNot };

  // Creates the file where it is missing. Nothing where Wait::kNot finds it taken; throws FileError.
  static std::optional<FileLock> acquire(const std::filesystem::path& path, Wait wait);

  FileLock(FileLock&& other) noexcept;
  FileLock& operator=(FileLock&&) = delete;
  ~FileLock();  // removes the file and frees the lock

 private:
  FileLock(std::filesystem::path path, int fd) : path_(std::move(path)), fd_(fd) {}

  std::filesystem::path path_;
  int fd_;
};

// A new folder of a unique name that begins with `name`, in $TMPDIR or /tmp. Throws Error, which says to set TMPDIR,
// where none can be made.
std::filesystem::path make_temporary_folder(const std::string& name);

}  // namespace flash_attn_jit
