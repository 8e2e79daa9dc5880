// flash-attn-jit: shows what is there, shows one kernel, predicts its speed, builds packs, shows and moves tuning
// records, looks after the cache.
#include <cstdlib>
#include <exception>
#include <iostream>
#include <string>

#include "runtime/program/command.h"
#include "runtime/system/log.h"

namespace flash_attn_jit::program {
namespace {

// Every flag and command that `app` takes, for the error about one that it does not.
std::string accepted_by(const CLI::App& app) {
  std::string names;
  const auto add = [&names](const std::string& name) { names += (names.empty() ? "" : ", ") + name; };
  for (const CLI::App* command : app.get_subcommands([](const CLI::App* c) { return !c->get_group().empty(); }))
    add(command->get_name());
  for (const CLI::Option* option : app.get_options()) add(option->get_name());
  return names;
}

const CLI::App& innermost_command(const CLI::App& app) {
  const auto commands = app.get_subcommands();
  return commands.empty() ? app : innermost_command(*commands.back());
}

std::string full_name(const CLI::App& app) {
  return (app.get_parent() ? full_name(*app.get_parent()) + " " : "") + app.get_name();
}

int report_usage(const CLI::App& app, const std::string& message) {
  const CLI::App& command = innermost_command(app);
  std::cerr << full_name(command) << ": " << message << "\n";
  std::cerr << "Accepted here: " << accepted_by(command) << ". More: " << full_name(command) << " --help\n";
  return kUsage;
}

// What it does the commands tell themselves; only warnings are left.
void print_warnings(LogLevel level, const std::string& message) {
  if (level == LogLevel::kWarning) std::cerr << "flash-attn-jit: warning: " + message + "\n";
}

int run(int argc, char** argv) {
  set_log_sink(print_warnings);
  CLI::App app(
      "FlashAttention kernels for Turing GPUs: what this machine has, one kernel, packs, tuning records, the cache.",
      "flash-attn-jit");
  app.set_version_flag("--version", FLASH_ATTN_JIT_VERSION);
  app.require_subcommand(1);
  app.option_defaults()->multi_option_policy(CLI::MultiOptionPolicy::Throw);

  Action chosen;
  add_devices(app, chosen);
  add_inspect(app, chosen);
  add_model(app, chosen);
  add_prebuild(app, chosen);
  add_pack(app, chosen);
  add_tune(app, chosen);
  add_tune_worker(app, chosen);
  add_report(app, chosen);
  add_cache(app, chosen);

  try {
    app.parse(argc, argv);
    const int code = chosen();
    std::cout.flush();
    if (!std::cout) throw Error("standard output could not be written");
    return code;
  } catch (const CLI::Success& asked) {  // --help, --version
    return app.exit(asked);
  } catch (const CLI::RequiredError& error) {
    // The first word that nothing took, if there was one, is what was meant for a flag or a command.
    const auto left = innermost_command(app).remaining();
    if (left.empty()) return report_usage(app, error.what());
    return report_usage(app, "'" + left.front() + "' is not a " + (left.front()[0] == '-' ? "flag" : "command"));
  } catch (const CLI::ParseError& error) {
    return report_usage(app, error.what());
  } catch (const UsageError& error) {
    std::cerr << full_name(innermost_command(app)) << ": " << error.what() << "\n";
    return kUsage;
  } catch (const ConfigError& error) {
    std::cerr << "flash-attn-jit: " << error.what() << "\n";
    return kUsage;
  } catch (const std::exception& error) {
    std::cerr << "flash-attn-jit: " << error.what() << "\n";
    return kFailure;
  }
}

}  // namespace
}  // namespace flash_attn_jit::program

int main(int argc, char** argv) { return flash_attn_jit::program::run(argc, argv); }
