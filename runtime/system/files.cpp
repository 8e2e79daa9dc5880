#include "runtime/system/files.h"

#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <set>
#include <thread>

#include "runtime/system/fork.h"
#include "runtime/system/interrupt.h"
#include "runtime/system/log.h"

namespace flash_attn_jit {
namespace {

namespace fs = std::filesystem;

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
  struct stat opened{}, named{};
  return ::fstat(fd, &opened) == 0 && ::stat(path.c_str(), &named) == 0 && opened.st_ino == named.st_ino &&
         opened.st_dev == named.st_dev;
}

// The descriptors of the locks that this process holds.
struct HeldLocks {
  ForkSafeMutex mutex;
  std::set<int> files;
};

HeldLocks& held_locks();

// A forked child shares the descriptors, and with them locks that no thread of its own would free.
void close_inherited_locks() {
  for (const int file : held_locks().files) ::close(file);
  held_locks().files.clear();
}

HeldLocks& held_locks() {
  static HeldLocks& process_locks = *[] {
    auto* made = new HeldLocks;
    if (::pthread_atfork(nullptr, nullptr, close_inherited_locks) != 0) throw std::bad_alloc();
    return made;
  }();
  return process_locks;
}

// Made while the library is loaded: a fork must not fall into its making.
[[maybe_unused]] const HeldLocks& locks_made_early = held_locks();

// Writes into a lock's file who holds it, for those who wait. Where that fails they are told less.
void sign(int lock) {
  char host[256] = "";
  if (::gethostname(host, sizeof host - 1) != 0) host[0] = '\0';
  const std::string holder = "process " + std::to_string(::getpid()) + " on " + host;
  if (::ftruncate(lock, 0) == 0) write_all(lock, holder);
}

// The wait for a lock that somebody else holds.
class LockWait {
 public:
  explicit LockWait(const fs::path& path) : path_(path) {}

  // Longer from time to time. Throws Interrupted.
  void a_moment() {
    throw_if_interrupted();
    std::this_thread::sleep_for(moment_);
    moment_ = std::min(moment_ * 2, std::chrono::milliseconds(20));
    if (told_ || Clock::now() < tell_at_) return;
    told_ = true;
    log(LogLevel::kWarning, "waiting for " + holder() + ", which holds the lock " + path_.string() +
                                ". If it does not go on, end it; if it is gone, remove that file");
  }

 private:
  using Clock = std::chrono::steady_clock;

  std::string holder() const {
    try {
      if (const auto signature = read_file(path_); signature && !signature->empty()) return *signature;
    } catch (const FileError&) {
      // The lock's name is all that is known.
    }
    return "another process";
  }

  const fs::path& path_;
  std::chrono::milliseconds moment_{1};
  const Clock::time_point tell_at_ = Clock::now() + std::chrono::seconds(3);
  bool told_ = false;
};

}  // namespace

void fail_on_file(const std::string& what, const fs::path& path, int error) {
  throw FileError("cannot " + what + " " + path.string() + ": " + std::strerror(error));
}

std::string read_whole(const Descriptor& file, const fs::path& path, std::uint64_t most_bytes) {
  struct stat status{};
  if (::fstat(file.get(), &status) != 0) fail_on_file("read", path, errno);
  if (!S_ISREG(status.st_mode)) fail_on_file("read", path, S_ISDIR(status.st_mode) ? EISDIR : EINVAL);
  if (static_cast<std::uint64_t>(status.st_size) > most_bytes) fail_on_file("read", path, EFBIG);
  std::string bytes(static_cast<std::size_t>(status.st_size), '\0');
  std::size_t filled = 0;
  while (filled < bytes.size()) {
    const ssize_t got = ::read(file.get(), bytes.data() + filled, bytes.size() - filled);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) fail_on_file("read", path, errno);
    if (got == 0) break;  // it shrank
    filled += static_cast<std::size_t>(got);
  }
  bytes.resize(filled);
  return bytes;
}

std::optional<std::string> read_file(const fs::path& path, std::uint64_t most_bytes) {
  // Not blocking, so that a pipe which somebody put there is met with an error instead of a wait.
  const Descriptor file(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  if (file.get() < 0) {
    if (errno == ENOENT || errno == ENOTDIR) return std::nullopt;
    fail_on_file("open", path, errno);
  }
  return read_whole(file, path, most_bytes);
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
    fail_on_file("write", temporary, error);
  }
  sync_folder(path.parent_path());
}

void create_folders(const fs::path& path, mode_t mode) {
  if (path.has_parent_path() && path.parent_path() != path) {
    struct stat status{};
    if (::stat(path.parent_path().c_str(), &status) != 0) create_folders(path.parent_path(), mode);
  }
  if (::mkdir(path.c_str(), mode) == 0) return;
  const int error = errno;
  struct stat status{};
  if (::stat(path.c_str(), &status) == 0 && S_ISDIR(status.st_mode)) return;
  fail_on_file("create the folder", path, error);
}

// Nothing where somebody else has it.
std::optional<FileLock> FileLock::try_once(const fs::path& path) {
  const std::lock_guard guard(held_locks().mutex);  // a fork must not fall between taking and noting it
  Descriptor file(::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600));
  if (file.get() < 0) fail_on_file("open the lock", path, errno);
  if (::flock(file.get(), LOCK_EX | LOCK_NB) != 0) {
    const int error = errno;
    if (error == EWOULDBLOCK || error == EINTR) return std::nullopt;
    ::unlink(path.c_str());  // nobody can hold it
    throw LockError("cannot lock " + path.string() + ": " + std::strerror(error));
  }
  // The last holder may have removed the file in between: a lock on it excludes nobody.
  if (!is_still_at(path, file.get())) return std::nullopt;
  held_locks().files.insert(file.get());
  return FileLock(path, file.release());
}

std::optional<FileLock> FileLock::acquire(const fs::path& path, Wait wait) {
  LockWait waiting(path);
  while (true) {
    if (auto lock = try_once(path)) {
      sign(lock->fd_);
      return lock;
    }
    if (wait == Wait::kNot) return std::nullopt;
    waiting.a_moment();
  }
}

FileLock::FileLock(FileLock&& other) noexcept
    : path_(std::move(other.path_)), fd_(std::exchange(other.fd_, -1)), process_(other.process_) {}

FileLock::~FileLock() {
  if (fd_ < 0 || process_ != ::getpid()) return;
  if (is_still_at(path_, fd_)) ::unlink(path_.c_str());
  const std::lock_guard guard(held_locks().mutex);
  held_locks().files.erase(fd_);
  ::flock(fd_, LOCK_UN);  // a compiler that was just started may share the descriptor for a moment
  ::close(fd_);
}

ScratchFolder::ScratchFolder(const std::string& name) {
  std::error_code error;
  fs::path parent = fs::temp_directory_path(error);
  if (error) parent = std::getenv("TMPDIR") ? std::getenv("TMPDIR") : "/tmp";
  std::string pattern = (parent / (name + "-XXXXXX")).string();
  if (error || ::mkdtemp(pattern.data()) == nullptr)
    throw Error("no temporary folder can be made in " + parent.string() +
                "; set TMPDIR to a folder that can be written");
  path_ = pattern;
}

ScratchFolder::~ScratchFolder() {
  std::error_code ignored;
  fs::remove_all(path_, ignored);
}

}  // namespace flash_attn_jit
