// Runs another program and waits for it.
#pragma once

#include <optional>
#include <string>
#include <vector>

namespace flash_attn_jit {

struct ProgramResult {
  bool started = false;
  std::optional<int> status;  // what it exited with; 128 + n where signal n ended it; nothing where that is not known
  std::string output;         // stdout and stderr, as they came
  std::string fault;          // the system's words for why it was not started or its status is not known

  bool succeeded() const { return started && status == 0; }

  // It ran to its end, and what that was went to another waiter: the process ignores SIGCHLD, or another of its threads
  // waits for any child. What it wrote tells whether it did its work.
  bool status_is_unknown() const { return started && !status; }

  std::string text() const;  // "ended with status 1", "cannot be started: No such file or directory"
};

// `arguments[0]` is the program, searched on PATH where it has no slash. Nothing is read from stdin. Throws Interrupted,
// the program ended, where the user has asked to stop.
ProgramResult run_program(const std::vector<std::string>& arguments);

}  // namespace flash_attn_jit
