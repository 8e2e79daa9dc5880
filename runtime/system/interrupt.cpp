#include "runtime/system/interrupt.h"

#include <chrono>
#include <memory>
#include <mutex>

#include "runtime/system/fork.h"

namespace flash_attn_jit {
namespace {

struct State {
  ForkSafeMutex mutex;
  std::shared_ptr<const InterruptCheck> check;
};

State& state() {
  static constinit ProcessOwn<State> process_state;
  return process_state.get([] { return State(); });
}

thread_local const std::atomic<bool>* stopped_by = nullptr;

}  // namespace

void set_interrupt_check(InterruptCheck check) {
  auto shared = check ? std::make_shared<const InterruptCheck>(std::move(check)) : nullptr;
  const std::lock_guard lock(state().mutex);
  state().check.swap(shared);
}

InterruptedBy::InterruptedBy(const std::atomic<bool>& stop) { stopped_by = &stop; }

InterruptedBy::~InterruptedBy() { stopped_by = nullptr; }

void throw_if_interrupted() {
  if (stopped_by != nullptr) {
    if (*stopped_by) throw Interrupted();
    return;
  }
  using Clock = std::chrono::steady_clock;
  thread_local Clock::time_point next{};
  const Clock::time_point now = Clock::now();
  if (now < next) return;
  next = now + std::chrono::milliseconds(50);
  std::shared_ptr<const InterruptCheck> check;
  {
    const std::lock_guard lock(state().mutex);
    check = state().check;
  }
  if (check && (*check)()) throw Interrupted();
}

}  // namespace flash_attn_jit
