// Processes that tests start.
#pragma once

#include <doctest/doctest.h>

#include <sys/wait.h>
#include <unistd.h>

#include <functional>

namespace flash_attn_jit::testing {

inline pid_t start_process(const std::function<int()>& work) {
  const pid_t child = ::fork();
  REQUIRE(child >= 0);
  if (child != 0) return child;
  int code = 99;
  try {
    code = work();
  } catch (...) {
  }
  ::_exit(code);
}

inline int status_of(pid_t child) {
  int status = 0;
  REQUIRE(::waitpid(child, &status, 0) == child);
  return status;
}

// The exit code of a process that does `work` and is killed where that takes a minute; -1 where a signal ended it.
inline int code_of_process(const std::function<int()>& work) {
  const int status = status_of(start_process([&] {
    ::alarm(60);
    return work();
  }));
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

// As code_of_process(), as another user. For tests that run as root.
inline int code_as_user(uid_t user, const std::function<int()>& work) {
  return code_of_process([&] { return ::setgid(user) == 0 && ::setuid(user) == 0 ? work() : 98; });
}

}  // namespace flash_attn_jit::testing
