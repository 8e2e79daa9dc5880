// Runs another program and waits for it.
#pragma once

#include <string>
#include <vector>

namespace flash_attn_jit {

struct ProgramResult {
  int status = 0;      // what it exited with; 128 + n where signal n ended it
  std::string output;  // stdout and stderr, as they came
};

// `arguments[0]` is the program, searched on PATH where it has no slash. Nothing is read from stdin.
// Status 127 with the system's words as output where it cannot be started.
ProgramResult run_program(const std::vector<std::string>& arguments);

}  // namespace flash_attn_jit
