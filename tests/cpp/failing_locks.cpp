#include "tests/cpp/failing_locks.h"

#include <sys/file.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>

namespace {

std::atomic<int> flock_error = 0;

}  // namespace

// Stands before the C library's.
extern "C" int flock(int fd, int operation) noexcept {
  if (const int error = flock_error) {
    errno = error;
    return -1;
  }
  return static_cast<int>(::syscall(SYS_flock, fd, operation));
}

namespace flash_attn_jit::testing {

FailingLocks::FailingLocks(int error) { flock_error = error; }
FailingLocks::~FailingLocks() { flock_error = 0; }

}  // namespace flash_attn_jit::testing
