// Fibers: stacks that one system thread switches between. A switch is a few instructions on x86-64 and
// aarch64.
#pragma once

#include <cstddef>
#include <memory>

#if !defined(__x86_64__) && !defined(__aarch64__) && !defined(FLASH_ATTN_JIT_UCONTEXT_FIBERS)
#define FLASH_ATTN_JIT_UCONTEXT_FIBERS 1
#endif
#ifdef FLASH_ATTN_JIT_UCONTEXT_FIBERS
#include <ucontext.h>
#endif

namespace flash_attn_jit {

// The stacks of a pool of fibers, with an unreadable page below each.
class FiberStacks {
 public:
  explicit FiberStacks(int count);
  ~FiberStacks();
  FiberStacks(const FiberStacks&) = delete;
  FiberStacks& operator=(const FiberStacks&) = delete;

  std::byte* bottom(int index) const;
  static constexpr std::size_t kBytes = 256 * 1024;  // of each stack, the unreadable page not counted

 private:
  std::byte* memory_;
  std::size_t mapped_bytes_;
};

// Where a fiber, or the thread that started them, stands while it does not run.
class Fiber {
 public:
  Fiber() = default;  // the running thread itself: leave it with switch_to()

  // Places the fiber at the start of `entry`, which must never return. `stagger` moves its frames by some
  // cache lines, so that the fibers of a warp do not all use the same cache sets.
  void prepare(std::byte* stack_bottom, std::size_t stack_bytes, std::size_t stagger, void (*entry)());

  // Leaves the running fiber, which is *this, and continues `next`. Returns when something switches back.
  void switch_to(Fiber& next);

  // The same for a fiber that will not be continued.
  [[noreturn]] void leave_to(Fiber& next);

  // First thing to do at the entry of a fiber; `from` is what switched to it.
  static void entered(Fiber& from);

 private:
  void transfer(Fiber& next);

#ifdef FLASH_ATTN_JIT_UCONTEXT_FIBERS
  ucontext_t context_{};
#else
  void* stack_pointer_ = nullptr;
#endif
  // For AddressSanitizer: the stack, and what it keeps of a fiber that is not running.
  const void* stack_bottom_ = nullptr;
  std::size_t stack_bytes_ = 0;
  void* fake_stack_ = nullptr;
};

}  // namespace flash_attn_jit
