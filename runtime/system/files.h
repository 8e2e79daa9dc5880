// Files as the cache needs them: every call checked, writes that are whole or not there, locks that outlive
// no process.
#pragma once

#include <sys/types.h>
#include <unistd.h>

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

#include "generator/errors.h"

namespace flash_attn_jit {

// Names the path and the system's reason.
struct FileError : Error {
  using Error::Error;
};

inline constexpr std::uint64_t kAnyBytes = UINT64_MAX;

// The whole file; nothing where there is none. Throws FileError, also where it has more than `most_bytes`.
std::optional<std::string> read_file(const std::filesystem::path& path, std::uint64_t most_bytes = kAnyBytes);

// A descriptor that closes on every way out; a writer closes earlier, to see the error.
class Descriptor {
 public:
  explicit Descriptor(int fd) : fd_(fd) {}
  Descriptor(Descriptor&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  Descriptor& operator=(Descriptor&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  ~Descriptor() {
    if (fd_ >= 0) ::close(fd_);
  }
  int get() const { return fd_; }
  int close() { return ::close(release()); }
  int release() { return std::exchange(fd_, -1); }

 private:
  int fd_;
};

// Names the path and the reason of `error`, an errno.
[[noreturn]] void fail_on_file(const std::string& what, const std::filesystem::path& path, int error);

// Everything in an open regular file of at most `most_bytes`. `path` is for the error.
std::string read_whole(const Descriptor& file, const std::filesystem::path& path, std::uint64_t most_bytes = kAnyBytes);

// Writes `temporary`, a name that nobody else uses, then renames it to `path`: a reader finds the old file or
// the whole new one, also after a crash. On failure removes `temporary` and throws FileError.
void write_file(const std::filesystem::path& path, const std::filesystem::path& temporary, std::string_view bytes,
                mode_t mode);

// Creates a folder and those above it, with `mode` (less the umask). Throws FileError.
void create_folders(const std::filesystem::path& path, mode_t mode);

// The file system has no locks, or does not give one.
struct LockError : FileError {
  using FileError::FileError;
};

// A lock between processes and between threads. The system frees it when its process ends, however it ends; a process
// that was forked off does not hold it.
class FileLock {
 public:
  enum class Wait { kUntilFree, kNot };

  // Creates the file where it is missing. Nothing where Wait::kNot finds it taken. A wait of some seconds is told, with
  // who is waited for. Throws FileError, LockError, and Interrupted out of a wait.
  static std::optional<FileLock> acquire(const std::filesystem::path& path, Wait wait);

  FileLock(FileLock&& other) noexcept;
  FileLock& operator=(FileLock&&) = delete;
  ~FileLock();  // removes the file and frees the lock

 private:
  FileLock(std::filesystem::path path, int fd) : path_(std::move(path)), fd_(fd) {}
  static std::optional<FileLock> try_once(const std::filesystem::path& path);

  std::filesystem::path path_;
  int fd_;
  pid_t process_ = ::getpid();
};

// A new folder of a unique name that begins with `name`, in $TMPDIR or /tmp, removed with its content at the end.
class ScratchFolder {
 public:
  // Throws Error, which says to set TMPDIR, where none can be made.
  explicit ScratchFolder(const std::string& name);
  ~ScratchFolder();
  ScratchFolder(const ScratchFolder&) = delete;
  ScratchFolder& operator=(const ScratchFolder&) = delete;

  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
};

}  // namespace flash_attn_jit
