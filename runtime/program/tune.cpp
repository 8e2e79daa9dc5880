// flash-attn-jit tune: finds the fastest tiles of this machine's device for the problems named; moves what was found
// between machines.
#include <algorithm>
#include <csignal>
#include <cstdio>
#include <filesystem>
#include <iostream>
#include <limits>
#include <memory>

#include "generator/families/families.h"
#include "generator/legality.h"
#include "runtime/cuda/nvrtc_choice.h"
#include "runtime/launch/process.h"
#include "runtime/launch/tune_session.h"
#include "runtime/launch/tune_worker.h"
#include "runtime/launch/tuned_problem.h"
#include "runtime/program/command.h"
#include "runtime/program/flag_values.h"
#include "runtime/program/progress.h"
#include "runtime/program/tune_database.h"
#include "runtime/system/errors.h"
#include "runtime/system/interrupt.h"
#include "runtime/tuner/presets.h"

namespace flash_attn_jit::program {
namespace {

using Json = nlohmann::ordered_json;

constexpr int kMostDays = 30;
constexpr int kInterruptedCode = 130;  // as a shell gives for a program that SIGINT ended

struct TuneFlags {
  std::string preset;
  std::vector<std::string> kinds, head_dims, gqa, seqlens, batches;
  std::string causal = "no", heads = "16";
  std::string budget = "600", device = "0";
  bool afresh = false, json = false;

  bool names_problems() const { return !preset.empty() || !head_dims.empty(); }
};

std::string flag_name(std::string_view name) {
  std::string flag = "--" + std::string(name);
  std::replace(flag.begin(), flag.end(), '_', '-');
  return flag;
}

std::vector<AttentionCase> cases_of(const TuneFlags& flags) {
  ProblemChoice choice;
  choice.preset = flags.preset;
  choice.head_dims = parse_numbers("--head-dims", flags.head_dims, 1, kMostNarrowHeadDim);
  if (!flags.gqa.empty()) choice.group_sizes = parse_numbers("--gqa", flags.gqa, 1, kMostInt);
  const Switch causal = parse_switch("--causal", flags.causal);
  choice.full = causal.off;
  choice.causal = causal.on;
  choice.num_heads = static_cast<int>(parse_number("--heads", flags.heads, 1, kMostTunedHeads));
  choice.seqlens = parse_numbers("--seqlens", flags.seqlens, 1, kMostTunedSeqlen);
  choice.batches = parse_numbers("--batch", flags.batches, 1, kMostTunedBatch);
  if (!flags.kinds.empty()) choice.kinds = flags.kinds;
  try {
    return problems_of(choice, flag_name);
  } catch (const ArgumentError& error) {
    throw UsageError(error.what());
  }
}

std::string formatted(const char* format, double value) {
  char text[48];
  std::snprintf(text, sizeof text, format, value);
  return text;
}

// What is being tried and what leads, on the bar of all problems.
class TuneProgress final : public SearchWatcher {
 public:
  explicit TuneProgress(std::size_t problems) : progress_(problems) {}

  SearchWatcher* begin(const AttentionCase& attention) {
    name_ = problem_text(attention);
    return this;
  }

  void show(const SearchProgress& now) override {
    std::string leader;
    if (now.leader) {
      leader = "; leads " + now.leader->text();
      if (now.leader_seconds > 0 && now.default_seconds > 0)
        leader += formatted(", %.1f %% below the default", 100 * (1 - now.leader_seconds / now.default_seconds));
    }
    progress_.show(std::to_string(now.decided) + "/" + std::to_string(now.candidates) + " " + now.doing + " " +
                   now.tile.text() + leader + formatted("; %.0f s", now.seconds) +
                   formatted(" of %.0f; ", now.budget_seconds) + name_);
  }

  void step(const std::string& what) { progress_.step(what); }
  void finish() { progress_.finish(); }

 private:
  Progress progress_;
  std::string name_;
};

volatile std::sig_atomic_t asked_to_stop = 0;

// The first Ctrl-C ends the search, which keeps what it has; a second one ends the program.
void stop_on_signals() {
  const auto handler = [](int signal) {
    asked_to_stop = 1;
    std::signal(signal, SIG_DFL);
  };
  std::signal(SIGINT, handler);
  std::signal(SIGTERM, handler);
  set_interrupt_check([] { return asked_to_stop != 0; });
}

int run_tune(const TuneFlags& flags) {
  const std::vector<AttentionCase> asked = cases_of(flags);
  refuse_offline(config());
  const auto budget = parse_number("--budget", flags.budget, 1, std::int64_t{kMostDays} * 86400);
  const int ordinal = static_cast<int>(parse_number("--device", flags.device, 0, kMostInt));
  Device& device = process_devices().device(ordinal);
  const std::vector<AttentionCase> cases = one_of_each_class(asked, device.info().multiprocessors);

  stop_on_signals();
  TuneSettings settings;
  settings.worker_command = {std::filesystem::read_symlink("/proc/self/exe").string(), "tune-worker"};
  settings.driver = driver_version_text(process_driver()->version());
  settings.budget_seconds = static_cast<double>(budget);
  settings.afresh = flags.afresh;
  TuneProgress progress(cases.size());
  settings.begin = [&](const AttentionCase& attention) { return progress.begin(attention); };
  settings.tuned = [&](const TunedProblem& tuned) { progress.step(outcome_text(tuned)); };
  const std::vector<TunedProblem> tuned = tune(device, process_tuning(), cases, settings);
  progress.finish();

  Json problems = Json::array();
  bool interrupted = false, all_found = tuned.size() == cases.size();
  for (const TunedProblem& one : tuned) {
    problems.push_back(Json::parse(outcome_json(one, false)));
    interrupted = interrupted || one.result.interrupted;
    all_found = all_found && one.result.record.has_value();
  }
  if (flags.json)
    std::cout << json_text({{"device", device.info().name},
                            {"problems", problems},
                            {"not_reached", cases.size() - tuned.size()},
                            {"interrupted", interrupted}})
              << "\n";
  else
    for (const TunedProblem& one : tuned) std::cout << outcome_text(one) << "\n";
  if (tuned.size() < cases.size())
    std::cerr << "flash-attn-jit tune: " << cases.size() - tuned.size() << " of " << cases.size()
              << " problems were not reached; the same command goes on there\n";
  return interrupted ? kInterruptedCode : all_found ? kSuccess : kFailure;
}

}  // namespace

void add_tune(CLI::App& app, Action& chosen) {
  CLI::App* const command =
      app.add_subcommand("tune", "Find the fastest tiles on this GPU; move what was found between machines");
  const auto flags = std::make_shared<TuneFlags>();
  command->add_option("--preset", flags->preset, "The problems of a model: " + preset_words());
  command->add_option("--head-dims", flags->head_dims, "Or head dims, 1 to 256: 64,128")->delimiter(',');
  command->add_option("--gqa", flags->gqa, "With --head-dims: group sizes (num_heads / num_heads_k): 1,4")
      ->delimiter(',');
  command->add_option("--causal", flags->causal, "With --head-dims: both, yes or no")->capture_default_str();
  command->add_option("--heads", flags->heads, "With --head-dims: query heads")->capture_default_str();
  command
      ->add_option(
          "--seqlens", flags->seqlens,
          "Lengths of queries and keys: 512,2048; a preset has its own; of decode of keys, against 1 and 16 queries")
      ->delimiter(',');
  command->add_option("--batch", flags->batches, "Batch sizes: 1,8; a preset has its own")->delimiter(',');
  command->add_option("--kinds", flags->kinds, "Kinds of kernels: " + tuned_group_words() + " (default: fwd)")
      ->delimiter(',');
  command->add_option("--budget", flags->budget, "Seconds for all of it, kept within a tenth")->capture_default_str();
  command->add_option("--device", flags->device, "CUDA device")->capture_default_str();
  command->add_flag("--afresh", flags->afresh, "Measure again what is known");
  command->add_flag("--json", flags->json, "Print JSON");
  const auto database = add_tune_database(*command);
  command->callback([&chosen, database, flags] {
    chosen = [database, flags] {
      if (database->asked_for() && flags->names_problems())
        throw UsageError("problems to tune and --export or --import are both given; accepted: one of them");
      if (database->asked_for()) return run_tune_database(*database, flags->json);
      if (!flags->names_problems())
        throw UsageError(
            "nothing is asked for; accepted: --preset NAME, --head-dims LIST, --export FILE, --import FILE");
      return run_tune(*flags);
    };
  });
}

// What `tune` starts: no command for people.
void add_tune_worker(CLI::App& app, Action& chosen) {
  CLI::App* const command = app.add_subcommand("tune-worker", "Measures for tune")->group("");
  command->callback([&chosen] { chosen = [] { return run_tune_worker(); }; });
}

}  // namespace flash_attn_jit::program
