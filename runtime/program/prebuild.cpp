// flash-attn-jit prebuild: makes a pack, every kernel that the runtime may choose for the problems named, or those that
// tuning found best.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <filesystem>
#include <iostream>
#include <limits>
#include <memory>
#include <mutex>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include <nlohmann/json.hpp>

#include "generator/families/families.h"
#include "generator/kernel_selection.h"
#include "generator/key_splits.h"
#include "runtime/launch/process.h"
#include "runtime/library/kernel_library.h"
#include "runtime/library/pack.h"
#include "runtime/program/command.h"
#include "runtime/program/flag_values.h"
#include "runtime/program/progress.h"
#include "runtime/system/config.h"
#include "runtime/system/errors.h"
#include "runtime/system/log.h"
#include "runtime/tuner/database.h"

namespace flash_attn_jit::program {
namespace {

using Json = nlohmann::ordered_json;

constexpr int kMostJobs = 1024;

struct PrebuildFlags {
  std::string arch;
  std::string pack;
  std::vector<std::string> kinds;
  std::vector<std::string> dtypes{"fp16"};
  std::vector<std::string> head_dims;
  std::string head_dim_v;
  std::string causal;
  std::array<std::string, kFeatures.size()> features;
  bool window = false;
  std::vector<std::string> gqa;
  std::string tuned;  // a database
  std::string out;
  std::string jobs;
  std::string nvrtc;
  std::string driver;
  bool json = false;
};

struct Failure {
  std::string kernel, reason;
};

struct Outcome {
  std::size_t built = 0, skipped = 0;
  std::vector<Failure> failures;
  std::string stopped_by;  // why no kernel can be compiled; empty where they can
  double seconds = 0;
};

std::string flag_of(const FeatureInfo& info) { return "--" + std::string(info.word); }

KernelSelection parse_selection(const PrebuildFlags& flags) {
  if (flags.pack == "default") return default_pack();
  if (!flags.pack.empty()) throw UsageError("--pack is '" + flags.pack + "'; accepted: default");
  KernelSelection selection;
  selection.kinds = parse_kinds("--kinds", flags.kinds);
  selection.dtypes = parse_dtypes("--dtypes", flags.dtypes);
  selection.head_dims = parse_numbers("--head-dims", flags.head_dims, 1, kMostHeadDim);
  if (!flags.head_dim_v.empty())
    selection.head_dim_v = static_cast<int>(parse_number("--head-dim-v", flags.head_dim_v, 1, kMostHeadDim));
  const Switch causal = parse_switch("--causal", flags.causal);
  if (causal.off) selection.masks.push_back(Mask::kNone);
  if (causal.on) selection.masks.push_back(Mask::kCausal);
  if (flags.window) selection.masks.push_back(Mask::kWindow);
  for (std::size_t i = 0; i < kFeatures.size(); ++i)
    selection.features[i] = parse_switch(flag_of(kFeatures[i]), flags.features[i]);
  selection.group_sizes = parse_numbers("--gqa", flags.gqa, 1, kMostInt);
  return selection;
}

// What a pack is to hold.
struct Content {
  std::vector<KernelSpec> kernels;
  std::vector<TuningRecord> records;
};

// What is illegal about a selection that parsed is its head dims.
std::vector<KernelSpec> selected_kernels(const PrebuildFlags& flags, const ArchLimits& arch) {
  try {
    std::vector<KernelSpec> kernels = select_kernels(parse_selection(flags), arch);
    if (kernels.empty())
      throw UsageError(
          "--kinds: no kernel of these has all that is asked for; --keylens and --paged are for fwd and decode, "
          "--dropout for "
          "fwd and bwd, --onerow and --unpaired come with one of --bias16, --bias32 and --boolmask");
    return kernels;
  } catch (const UnsupportedError& error) {
    throw UsageError(std::string("--head-dims: ") + error.what());
  }
}

// Why a launch that uses the record would not find the kernel in the pack, or nothing where it would.
std::optional<std::string> no_use_in_pack(const TuningRecord& record, const ArchLimits& arch) {
  if (record.key.device.code != kNativeCode)
    return "it is of the Turing code, which each driver links for itself; packs hold machine code";
  if (record.key.device.sm != arch.sm)
    return "it is for sm_" + std::to_string(record.key.device.sm) + ", and --arch is sm_" + std::to_string(arch.sm);
  if (!process_tuning().has_templates_in_use(record.key)) return "it was made with other templates than this library's";
  return check_winner(record);
}

// What a launch of the record's class takes: the winner, and behind the decode kernel what puts its splits together.
std::vector<KernelSpec> kernels_of(const TuningRecord& record) {
  KernelSpec winner = record.key.problem.spec;
  winner.tile = record.winner;
  if (winner.kind != KernelKind::kDecode) return {winner};
  KernelSpec combine = combine_of(winner);
  combine.tile = default_tiles(combine).front();
  return {winner, combine};
}

Content tuned_content(const PrebuildFlags& flags, const ArchLimits& arch) {
  Database database = read_database(existing_file("--tuned", flags.tuned));
  for (const RefusedRecord& refused : database.refused)
    log(LogLevel::kWarning, flags.tuned + ": " + refused.what + " is passed over: " + refused.reason);
  Content content;
  for (TuningRecord& record : database.records) {
    const std::string name = "the record of '" + record.key.problem.text() + "' for " + record.key.device.text();
    if (const auto reason = no_use_in_pack(record, arch)) {
      log(LogLevel::kWarning, flags.tuned + ": " + name + " is passed over: " + *reason);
      continue;
    }
    for (const KernelSpec& spec : kernels_of(record))
      if (std::find(content.kernels.begin(), content.kernels.end(), spec) == content.kernels.end())
        content.kernels.push_back(spec);
    content.records.push_back(std::move(record));
  }
  if (content.kernels.empty())
    throw UsageError("--tuned is '" + flags.tuned + "', which has no record for sm_" + std::to_string(arch.sm) +
                     " that this library can use; accepted: a database of tune --export");
  return content;
}

// --pack or --tuned stands for all that selects kernels; without them those flags that have no default are needed.
void require_selection(const CLI::App& command) {
  std::vector<std::string> selecting{"--kinds", "--head-dims", "--causal", "--gqa"};
  const bool tuned = command.count("--tuned") > 0, named = command.count("--pack") > 0;
  if (!tuned && !named) {
    for (const std::string& flag : selecting)
      if (command.count(flag) == 0) throw CLI::RequiredError(flag);
    return;
  }
  selecting.emplace_back("--window");
  for (const FeatureInfo& info : kFeatures)
    if (!info.is_users) selecting.push_back(flag_of(info));
  if (tuned) selecting.emplace_back("--pack");
  const std::string reason = tuned ? " is given with --tuned, whose records say which kernels; accepted: one of them"
                                   : " is given with --pack, which names the kernels; accepted: one of them";
  selecting.emplace_back("--dtypes");
  for (const std::string& flag : selecting)
    if (command.count(flag) > 0) throw UsageError(flag + reason);
}

void write_records(const std::vector<TuningRecord>& records, const std::filesystem::path& out_dir) {
  RecordStore store(out_dir, FolderUse::kPack);
  for (const TuningRecord& record : records) store.publish(record);
}

int parse_jobs(const std::string& text) {
  if (text.empty()) return static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  return static_cast<int>(parse_number("--jobs", text, 1, kMostJobs));
}

std::string took_text(double seconds) {
  char text[32];
  std::snprintf(text, sizeof text, "%.2f s", seconds);
  return text;
}

// Hands the specs out to threads; each kernel goes the way of a first call.
class PackBuilder {
 public:
  PackBuilder(KernelLibrary& library, const std::vector<KernelSpec>& specs, const CompileTarget& target)
      : library_(library), specs_(specs), target_(target), progress_(specs.size()) {}

  Outcome run(int jobs) {
    const auto start = std::chrono::steady_clock::now();
    const int wanted = static_cast<int>(std::min<std::size_t>(jobs, specs_.size()));
    std::vector<std::thread> workers;
    workers.reserve(static_cast<std::size_t>(wanted));
    try {
      while (static_cast<int>(workers.size()) + 1 < wanted) workers.emplace_back([this] { work(); });
    } catch (const std::system_error& error) {
      log(LogLevel::kWarning, "only " + std::to_string(workers.size() + 1) + " of " + std::to_string(wanted) +
                                  " threads can be had (" + error.what() + ")");
    }
    work();
    for (std::thread& worker : workers) worker.join();
    progress_.finish();
    outcome_.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    std::sort(outcome_.failures.begin(), outcome_.failures.end(),
              [](const Failure& a, const Failure& b) { return a.kernel < b.kernel; });
    return outcome_;
  }

 private:
  void work() {
    for (std::size_t i = next_++; i < specs_.size() && !stopped_; i = next_++) build(specs_[i]);
  }

  void build(const KernelSpec& spec) {
    try {
      const FoundKernel found = library_.find_or_compile(spec, target_);
      const bool is_new = found.origin == KernelOrigin::kCompiled;
      const std::lock_guard lock(mutex_);
      ++(is_new ? outcome_.built : outcome_.skipped);
      progress_.step(is_new ? "built " + spec.name() + " in " + took_text(found.kernel.seconds)
                            : "there already: " + spec.name());
    } catch (const MissingKernelError& error) {
      // The same for every kernel that is not there yet.
      stopped_ = true;
      const std::lock_guard lock(mutex_);
      outcome_.stopped_by = error.no_compiler;
    } catch (const std::exception& error) {
      const std::lock_guard lock(mutex_);
      outcome_.failures.push_back({spec.name(), error.what()});
      progress_.step("FAILED " + spec.name());
    }
  }

  KernelLibrary& library_;
  const std::vector<KernelSpec>& specs_;
  const CompileTarget target_;
  std::atomic<std::size_t> next_ = 0;
  std::atomic<bool> stopped_ = false;
  std::mutex mutex_;  // guards outcome_
  Outcome outcome_;
  Progress progress_;
};

void print_failures(const Outcome& outcome) {
  if (!outcome.stopped_by.empty())
    std::cerr << "flash-attn-jit prebuild: kernels cannot be compiled: " << outcome.stopped_by << "\n";
  for (const Failure& failure : outcome.failures)
    std::cerr << "flash-attn-jit prebuild: " << failure.kernel << " failed: " << failure.reason << "\n";
}

Json outcome_json(const Outcome& outcome, const std::string& out, const CompileTarget& target) {
  Json failures = Json::array();
  for (const Failure& failure : outcome.failures)
    failures.push_back({{"kernel", failure.kernel}, {"reason", failure.reason}});
  return {{"out", out},
          {"arch", target.text()},
          {"built", outcome.built},
          {"skipped", outcome.skipped},
          {"failures", failures},
          {"stopped_by", outcome.stopped_by.empty() ? Json() : Json(outcome.stopped_by)},
          {"seconds", outcome.seconds}};
}

int run_prebuild(const PrebuildFlags& flags) {
  const ArchLimits arch = parse_arch_flag("--arch", flags.arch);
  const Content content = flags.tuned.empty() ? Content{selected_kernels(flags, arch), {}} : tuned_content(flags, arch);
  const int jobs = parse_jobs(flags.jobs);
  const CompileTarget target{.sm = arch.sm, .code = CodeKind::kCubin};

  const Config settings = config_with_nvrtc("--nvrtc", flags.nvrtc);
  const auto driver = flags.driver.empty() ? std::nullopt : std::optional(parse_driver("--driver", flags.driver));
  PackWriter pack(settings, flags.out, driver);
  const Outcome outcome = PackBuilder(pack.library(), content.kernels, target).run(jobs);
  if (outcome.built + outcome.skipped > 0) {  // nothing is no pack
    write_records(content.records, pack.folder());
    pack.finish();
  }

  print_failures(outcome);
  if (flags.json)
    std::cout << json_text(outcome_json(outcome, flags.out, target)) << "\n";
  else
    std::cout << flags.out << ": " << outcome.built << " built, " << outcome.skipped << " there already, "
              << outcome.failures.size() << " failed, "
              << content.kernels.size() - outcome.built - outcome.skipped - outcome.failures.size() << " not begun, "
              << took_text(outcome.seconds) << "\n";
  return outcome.failures.empty() && outcome.stopped_by.empty() ? kSuccess : kFailure;
}

}  // namespace

void add_prebuild(CLI::App& app, Action& chosen) {
  CLI::App* const command = app.add_subcommand("prebuild", "Build a pack of kernels; needs no GPU");
  const auto flags = std::make_shared<PrebuildFlags>();
  command->add_option("--arch", flags->arch, "Architecture to build for: sm_75 or newer")->required();
  command->add_option(
      "--pack", flags->pack,
      "default: forward, backward and decode, head dims 64 and 128, causal or not, groups of 1, 2, 4 and 8; in "
      "place of --kinds, --head-dims, --causal and --gqa");
  command->add_option("--kinds", flags->kinds, "Kinds of kernels: " + pack_group_words())->delimiter(',');
  command->add_option("--dtypes", flags->dtypes, "Of q, k, v and out: fp16,bf16")
      ->delimiter(',')
      ->capture_default_str();
  command->add_option("--head-dims", flags->head_dims, "Head dims, 1 to 512: 64,128")->delimiter(',');
  command->add_option("--head-dim-v", flags->head_dim_v, "v's, where it is another one");
  command->add_option("--causal", flags->causal, "both, yes or no");
  command->add_flag("--window", flags->window, "Besides those of --causal, the kernels of sliding windows");
  flags->features.fill("no");
  for (std::size_t i = 0; i < kFeatures.size(); ++i)
    if (!kFeatures[i].is_users)
      command
          ->add_option(flag_of(kFeatures[i]), flags->features[i],
                       "Kernels " + std::string(kFeatures[i].phrase) + ": both, yes or no")
          ->capture_default_str();
  command->add_option("--gqa", flags->gqa, "Group sizes (num_heads / num_heads_k): 1,2,4,8")->delimiter(',');
  command->add_option("--tuned", flags->tuned,
                      "In the place of all those: the winners of this database of tune --export, which the pack keeps");
  command->add_option("--out", flags->out, "The pack: a folder, or a zip file (FILE.zip); what is there is added to")
      ->required();
  command->add_option("--jobs", flags->jobs, "Kernels to compile at once; default: one a core");
  command->add_option("--nvrtc", flags->nvrtc, "The libnvrtc to compile with; default: the newest 12.x found");
  command->add_option("--driver", flags->driver,
                      "The oldest CUDA driver that has to load the pack, such as 12.0: an NVRTC too new for it is not "
                      "taken");
  command->add_flag("--json", flags->json, "Print JSON");
  command->callback([&chosen, flags, command] {
    require_selection(*command);
    chosen = [flags] { return run_prebuild(*flags); };
  });
}

}  // namespace flash_attn_jit::program
