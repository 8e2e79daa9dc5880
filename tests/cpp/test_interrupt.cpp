// Ctrl-C in long work: who asks, how often, and what then.
#include <doctest/doctest.h>

#include <atomic>
#include <chrono>
#include <thread>

#include "runtime/system/interrupt.h"

using namespace flash_attn_jit;

namespace {

// Stands in for the process's check while it lives.
struct Check {
  explicit Check(InterruptCheck check) { set_interrupt_check(std::move(check)); }
  ~Check() { set_interrupt_check({}); }
};

// Long enough for the next question to be put.
void let_time_pass() { std::this_thread::sleep_for(std::chrono::milliseconds(60)); }

}  // namespace

TEST_CASE("interrupt: without a check nothing is interrupted") { CHECK_NOTHROW(throw_if_interrupted()); }

TEST_CASE("interrupt: long work stops when the check says so") {
  std::atomic<bool> stop = false;
  const Check check([&] { return stop.load(); });
  let_time_pass();
  CHECK_NOTHROW(throw_if_interrupted());
  stop = true;
  let_time_pass();
  CHECK_THROWS_AS(throw_if_interrupted(), Interrupted);
}

TEST_CASE("interrupt: a busy loop does not ask at every turn, and each thread asks for itself") {
  std::atomic<int> asked = 0;
  const Check check([&] {
    ++asked;
    return false;
  });
  let_time_pass();
  const auto loop = [] {
    for (int i = 0; i < 1000; ++i) throw_if_interrupted();
  };
  loop();
  CHECK(asked >= 1);
  CHECK(asked <= 10);
  const int before = asked;
  std::thread(loop).join();
  CHECK(asked > before);
}
