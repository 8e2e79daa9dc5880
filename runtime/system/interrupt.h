// Ctrl-C in the middle of something long: a wait for another process, a kernel that is interpreted.
#pragma once

#include <atomic>
#include <exception>
#include <functional>

namespace flash_attn_jit {

// The user has asked to stop. No Error: nothing failed, and whoever can go on without the caller does.
struct Interrupted : std::exception {
  const char* what() const noexcept override { return "interrupted"; }
};

// Whether the calling thread shall stop. It is called on whatever thread does something long, and like a log sink may
// take a lock that the caller of the library has released.
using InterruptCheck = std::function<bool()>;

// Replaces the process's check; an empty one restores the default: signals do what the process has set for them.
void set_interrupt_check(InterruptCheck check);

// For the loops of long work: throws Interrupted where the check tells to stop. It asks twenty times a second at most,
// so that it may be called as often as is convenient.
void throw_if_interrupted();

// While it lives, throw_if_interrupted() on this thread asks no check and throws where `stop` is set: for a thread that
// works for another one, which asks.
class InterruptedBy {
 public:
  explicit InterruptedBy(const std::atomic<bool>& stop);
  ~InterruptedBy();
  InterruptedBy(const InterruptedBy&) = delete;
  InterruptedBy& operator=(const InterruptedBy&) = delete;
};

}  // namespace flash_attn_jit
