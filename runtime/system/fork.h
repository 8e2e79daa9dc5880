// fork() copies a process with one thread of it alone: what another thread was about to release or to finish stays as
// it was for good in the child. What is here is whole in the child too.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>

namespace flash_attn_jit {

// A mutex that is free in a forked child. For a few lines in which no other mutex is taken or made: a fork waits for
// it.
class ForkSafeMutex {
 public:
  ForkSafeMutex();
  ~ForkSafeMutex();
  ForkSafeMutex(const ForkSafeMutex&) = delete;
  ForkSafeMutex& operator=(const ForkSafeMutex&) = delete;

  void lock() { mutex_.lock(); }
  void unlock() { mutex_.unlock(); }

 private:
  std::mutex mutex_;
};

// One object of the process, made at the first call and never destroyed: threads may still use it while the process
// ends. Where several threads ask at once, several may be made, and one is kept: a static variable would make a forked
// child wait for a thread that it does not have.
template <class T>
class ProcessOwn {
 public:
  constexpr ProcessOwn() = default;

  // `make()` returns a T. What it throws reaches the caller, and the next call tries again.
  template <class Make>
  T& get(const Make& make) {
    if (T* made = made_.load(std::memory_order_acquire)) return *made;
    std::unique_ptr<T> mine(new T(make()));
    T* expected = nullptr;
    return made_.compare_exchange_strong(expected, mine.get(), std::memory_order_acq_rel) ? *mine.release() : *expected;
  }

  // Null before the first get().
  T* get_if_made() const { return made_.load(std::memory_order_acquire); }

 private:
  std::atomic<T*> made_ = nullptr;
};

}  // namespace flash_attn_jit
