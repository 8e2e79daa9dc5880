#include "runtime/files.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <utility>

namespace flash_attn_jit {
namespace {

namespace fs = std::filesystem;

[[noreturn]] void fail(const std::string& what, const fs::path& path, int error) {
  throw FileError("cannot " + what + " " + path.string() + ": " + std::strerror(error));
}

// Closes on every way out; the writer closes earlier, to see the error.
class Descriptor {
 public:
  explicit Descriptor(int fd) : fd_(fd) {}
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  ~Descriptor() {
    if (fd_ >= 0) ::close(fd_);
  }
  int get() const { return fd_; }
  int close() { return ::close(std::exchange(fd_, -1)); }

 private:
  int fd_;
};

// While it lives, a write beyond the file-size limit is an error and not the process's death.
class FileSizeSignalHeld {
 public:
  FileSizeSignalHeld() {
    sigemptyset(&signal_);
    sigaddset(&signal_, SIGXFSZ);
    sigset_t pending;
    sigpending(&pending);
    was_pending_ = sigismember(&pending, SIGXFSZ) == 1;
    pthread_sigmask(SIG_BLOCK, &signal_, &previous_);
  }
  ~FileSizeSignalHeld() {
    const timespec at_once{};
    if (!was_pending_) sigtimedwait(&signal_, nullptr, &at_once);
    pthread_sigmask(SIG_SETMASK, &previous_, nullptr);
  }
  FileSizeSignalHeld(const FileSizeSignalHeld&) = delete;
  FileSizeSignalHeld& operator=(const FileSizeSignalHeld&) = delete;

 private:
  sigset_t signal_, previous_;
  bool was_pending_;
};

// 0, or the error's number.
int write_all(int fd, std::string_view bytes) {
  while (!bytes.empty()) {
    const ssize_t written = ::write(fd, bytes.data(), bytes.size());
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) return errno;
    bytes.remove_prefix(static_cast<std::size_t>(written));
  }
  return 0;
}

int write_and_sync(const fs::path& path, std::string_view bytes, mode_t mode) {
  Descriptor file(::open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, mode));
  if (file.get() < 0) return errno;
  if (const int error = write_all(file.get(), bytes)) return error;
  if (::fsync(file.get()) != 0) return errno;
  return file.close() == 0 ? 0 : errno;
}

// So that the rename itself survives a power cut. Some file systems cannot; the reader verifies what it
// finds.
void sync_folder(const fs::path& path) {
  const Descriptor folder(::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (folder.get() >= 0) ::fsync(folder.get());
}

bool is_still_at(const fs::path& path, int fd) {
  struct stat opened {
  }, named{};
  return ::fstat(fd, &opened) == 0 && ::stat(path.c_str(), &named) == 0 && opened.st_ino == named.st_ino &&
         opened.st_dev == named.st_dev;
}

}  // namespace

std::optional<std::string> read_file(const fs::path& path) {
  // Not blocking, so that a pipe which somebody put there is met with an error instead of a wait.
  const Descriptor file(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  if (file.get() < 0) {
    if (errno == ENOENT || errno == ENOTDIR) return std::nullopt;
    fail("open", path, errno);
  }
  struct stat status {};
  if (::fstat(file.get(), &status) != 0) fail("read", path, errno);
  if (!S_ISREG(status.st_mode)) fail("read", path, S_ISDIR(status.st_mode) ? EISDIR : EINVAL);
  std::string bytes(static_cast<std::size_t>(status.st_size), '\0');
  std::size_t filled = 0;
  while (filled < bytes.size()) {
    const ssize_t got = ::read(file.get(), bytes.data() + filled, bytes.size() - filled);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) fail("read", path, errno);
    if (got == 0) break;  // it shrank
    filled += static_cast<std::size_t>(got);
  }
  bytes.resize(filled);
  return bytes;
}

void write_file(const fs::path& path, const fs::path& temporary, std::string_view bytes, mode_t mode) {
  int error = 0;
  {
    const FileSizeSignalHeld held;
    error = write_and_sync(temporary, bytes, mode);
  }
  if (error == 0 && ::rename(temporary.c_str(), path.c_str()) != 0) error = errno;
  if (error != 0) {
    if (error != EEXIST) ::unlink(temporary.c_str());
    fail("write", temporary, error);
  }
  sync_folder(path.parent_path());
}

void create_folders(const fs::path& path, mode_t mode) {
  if (path.has_parent_path() && path.parent_path() != path) {
    struct stat status {};
    if (::stat(path.parent_path().c_str(), &status) != 0) create_folders(path.parent_path(), mode);
  }
  if (::mkdir(path.c_str(), mode) == 0) return;
  const int error = errno;
  struct stat status {};
  if (::stat(path.c_str(), &status) == 0 && S_ISDIR(status.st_mode)) return;
  fail("create the folder", path, error);
}

std::optional<FileLock> FileLock::acquire(const fs::path& path, Wait wait) {
  while (true) {
    const int fd = ::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (fd < 0) fail("open the lock", path, errno);
    FileLock lock(path, fd);
    int result = 0;
    do result = ::flock(fd, LOCK_EX | (wait == Wait::kNot ? LOCK_NB : 0));
    while (result != 0 && errno == EINTR);
    const int error = result == 0 ? 0 : errno;
    // The last holder removed the file while this one waited for it: a lock on it excludes nobody.
    const bool holds = error == 0 && is_still_at(path, fd);
    if (holds) return lock;
    ::close(std::exchange(lock.fd_, -1));
    if (error == EWOULDBLOCK) return std::nullopt;
    if (error != 0) fail("lock", path, error);
  }
}

FileLock::FileLock(FileLock&& other) noexcept
    : path_(std::move(other.path_)), fd_(std::exchange(other.fd_, -1)) {}

FileLock::~FileLock() {
  if (fd_ < 0) return;
  ::unlink(path_.c_str());
  ::flock(fd_, LOCK_UN);  // a forked child may share the descriptor, and with it the lock
  ::close(fd_);
}

fs::path make_temporary_folder(const std::string& name) {
  std::error_code error;
  fs::path parent = fs::temp_directory_path(error);
  if (error) parent = std::getenv("TMPDIR") ? std::getenv("TMPDIR") : "/tmp";
  std::string pattern = (parent / (name + "-XXXXXX")).string();
  if (error || ::mkdtemp(pattern.data()) == nullptr)
    throw Error("no temporary folder can be made in " + parent.string() +
                "; set TMPDIR to a folder that can be written");
  return pattern;
}

}  // namespace flash_attn_jit
