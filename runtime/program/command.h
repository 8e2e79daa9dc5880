// What the commands of the program share: how they are added to it, and how a wrong call is reported.
#pragma once

#include <functional>
#include <string>

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include "generator/errors.h"

namespace flash_attn_jit::program {

enum ExitCode : int { kSuccess = 0, kFailure = 1, kUsage = 2 };

// A flag that cannot be taken: names it, what came and what is accepted.
struct UsageError : Error {
  using Error::Error;
};

// What the parsed command line asks for; returns the exit code.
using Action = std::function<int()>;

// What --json prints. Bytes that are no UTF-8, which a path may hold, come out as U+FFFD.
inline std::string json_text(const nlohmann::ordered_json& json) {
  return json.dump(2, ' ', false, nlohmann::ordered_json::error_handler_t::replace);
}

// Each adds its command to `app`; when the command is parsed it puts its work into `chosen`.
void add_devices(CLI::App& app, Action& chosen);
void add_inspect(CLI::App& app, Action& chosen);
void add_model(CLI::App& app, Action& chosen);
void add_prebuild(CLI::App& app, Action& chosen);
void add_tune(CLI::App& app, Action& chosen);
void add_tune_worker(CLI::App& app, Action& chosen);
void add_report(CLI::App& app, Action& chosen);
void add_cache(CLI::App& app, Action& chosen);
void add_pack(CLI::App& app, Action& chosen);

}  // namespace flash_attn_jit::program
