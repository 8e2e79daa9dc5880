// What the commands of the program share: how they are added to it, and how a wrong call is reported.
#pragma once

#include <functional>

#include <CLI/CLI.hpp>

#include "generator/errors.h"

namespace flash_attn_jit::program {

enum ExitCode : int { kSuccess = 0, kFailure = 1, kUsage = 2 };

// A flag that cannot be taken: names it, what came and what is accepted.
struct UsageError : Error {
  using Error::Error;
};

// What the parsed command line asks for; returns the exit code.
using Action = std::function<int()>;

// Each adds its command to `app`; when the command is parsed it puts its work into `chosen`.
void add_devices(CLI::App& app, Action& chosen);
void add_inspect(CLI::App& app, Action& chosen);
void add_prebuild(CLI::App& app, Action& chosen);
void add_cache(CLI::App& app, Action& chosen);

}  // namespace flash_attn_jit::program
