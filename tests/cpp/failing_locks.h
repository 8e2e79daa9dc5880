// A file system without locks.
#pragma once

namespace flash_attn_jit::testing {

// While it lives, every flock() of this process fails with `error`.
class FailingLocks {
 public:
  explicit FailingLocks(int error);
  ~FailingLocks();
  FailingLocks(const FailingLocks&) = delete;
  FailingLocks& operator=(const FailingLocks&) = delete;
};

}  // namespace flash_attn_jit::testing
