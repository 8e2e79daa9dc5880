// flash-attn-jit tune: what tuning found, to and from other machines.
#include <memory>

#include "runtime/program/command.h"
#include "runtime/program/tune_database.h"

namespace flash_attn_jit::program {

void add_tune(CLI::App& app, Action& chosen) {
  CLI::App* const command = app.add_subcommand("tune", "Move what tuning found between machines");
  const auto as_json = std::make_shared<bool>(false);
  const auto database = add_tune_database(*command);
  command->add_flag("--json", *as_json, "Print JSON");
  command->callback([&chosen, database, as_json] {
    chosen = [database, as_json] {
      if (!database->asked_for()) throw UsageError("nothing is asked for; accepted: --export FILE, --import FILE");
      return run_tune_database(*database, *as_json);
    };
  });
}

}  // namespace flash_attn_jit::program
