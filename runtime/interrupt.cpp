#include "runtime/interrupt.h"

#include <atomic>
#include <chrono>

namespace flash_attn_jit {
namespace {

// A check is never destroyed, since a thread may be in it while it is replaced.
std::atomic<const InterruptCheck*> process_check = nullptr;

thread_local const std::atomic<bool>* stopped_by = nullptr;

}  // namespace

void set_interrupt_check(InterruptCheck check) {
  process_check = check ? new InterruptCheck(std::move(check)) : nullptr;
}

InterruptedBy::InterruptedBy(const std::atomic<bool>& stop) { stopped_by = &stop; }

InterruptedBy::~InterruptedBy() { stopped_by = nullptr; }

void throw_if_interrupted() {
  if (stopped_by != nullptr) {
    if (*stopped_by) throw Interrupted();
    return;
  }
  using Clock = std::chrono::steady_clock;
  const InterruptCheck* check = process_check;
  if (check == nullptr) return;
  thread_local Clock::time_point next{};
  const Clock::time_point now = Clock::now();
  if (now < next) return;
  next = now + std::chrono::milliseconds(50);
  if ((*check)()) throw Interrupted();
}

}  // namespace flash_attn_jit
