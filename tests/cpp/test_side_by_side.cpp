// Work shared out among threads: all of it done, errors in order, fewer threads than wanted.
#include <doctest/doctest.h>

#include <pthread.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "runtime/system/interrupt.h"
#include "runtime/system/side_by_side.h"

using namespace flash_attn_jit;

TEST_CASE("side by side: every piece once, at the same time") {
  std::vector<std::atomic<int>> calls(5);
  std::atomic<int> here = 0;
  run_side_by_side(calls.size(), [&](std::size_t i) {
    ++calls[i];
    ++here;
    for (int waited = 0; here < 5 && waited < 10000; ++waited)
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
  });
  CHECK(here == 5);
  for (const auto& each : calls) CHECK(each == 1);
  run_side_by_side(0, [](std::size_t) { FAIL("there is no work"); });
}

TEST_CASE("side by side: the first error in order is thrown, once all have ended") {
  std::atomic<int> ended = 0;
  const auto work = [&](std::size_t i) {
    if (i == 3) throw std::runtime_error("3");
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    ++ended;
    if (i == 1) throw std::runtime_error("1");
  };
  CHECK_THROWS_WITH_AS(run_side_by_side(4, work), "1", std::runtime_error);
  CHECK(ended == 3);
}

TEST_CASE("side by side: who waits for the others notices that the user has asked to stop, and so do they") {
  const std::thread::id caller = std::this_thread::get_id();
  std::atomic<bool> begun = false;
  set_interrupt_check([&] { return std::this_thread::get_id() == caller && begun; });
  std::atomic<int> stopped = 0;
  const auto work = [&](std::size_t) {
    if (std::this_thread::get_id() == caller) {
      while (!begun) std::this_thread::yield();
      return;
    }
    begun = true;
    for (int waited = 0; waited < 10000; ++waited) try {
        throw_if_interrupted();
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
      } catch (const Interrupted&) {
        ++stopped;
        throw;
      }
  };
  CHECK_THROWS_AS(run_side_by_side(2, work), Interrupted);
  set_interrupt_check({});
  CHECK(stopped == 1);
}

TEST_CASE("side by side: threads that cannot be had are not needed") {
  const pid_t child = fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    // A stack that no address space has room for: every new thread is refused.
    pthread_attr_t attributes;
    pthread_getattr_default_np(&attributes);
    pthread_attr_setstacksize(&attributes, std::size_t{1} << 47);
    if (pthread_setattr_default_np(&attributes) != 0) _exit(3);
    try {
      std::thread([] {}).join();
      _exit(4);
    } catch (const std::system_error&) {
    }
    int done = 0;
    run_side_by_side(3, [&](std::size_t) { ++done; });
    _exit(done == 3 ? 0 : 1);
  }
  int status = 0;
  waitpid(child, &status, 0);
  REQUIRE(WIFEXITED(status));
  CHECK(WEXITSTATUS(status) == 0);
}
