// tune --export and --import: the records of this machine in one file, to and fro.
#pragma once

#include <memory>
#include <string>

#include <CLI/CLI.hpp>

namespace flash_attn_jit::program {

struct TuneDatabaseFlags {
  std::string export_to, import_from;  // empty: not given
  bool any_device = false;

  bool asked_for() const { return !export_to.empty() || !import_from.empty() || any_device; }
};

// Adds the options to `tune`.
std::shared_ptr<TuneDatabaseFlags> add_tune_database(CLI::App& tune);

// Where they are asked for. Returns the exit code; throws UsageError.
int run_tune_database(const TuneDatabaseFlags& flags, bool as_json);

}  // namespace flash_attn_jit::program
