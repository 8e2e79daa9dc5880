// flash-attn-jit prebuild: makes a pack, every kernel that the runtime may choose for the problems named.
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
#include "runtime/library/kernel_library.h"
#include "runtime/library/pack.h"
#include "runtime/program/command.h"
#include "runtime/program/flag_values.h"
#include "runtime/program/progress.h"
#include "runtime/system/config.h"
#include "runtime/system/errors.h"
#include "runtime/system/log.h"

namespace flash_attn_jit::program {
namespace {

using Json = nlohmann::ordered_json;

constexpr int kMostJobs = 1024;
constexpr int kMostInt = std::numeric_limits<int>::max();

struct PrebuildFlags {
  std::string arch;
  std::string pack;
  std::vector<std::string> kinds;
  std::vector<std::string> head_dims;
  std::string causal;
  std::array<std::string, kFeatures.size()> features;
  bool window = false;
  std::vector<std::string> gqa;
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

// What is asked for by a name stands alone; without one, all that names the problems is needed.
KernelSelection parse_selection(const PrebuildFlags& flags) {
  const std::pair<const char*, bool> needed[] = {{"--kinds", flags.kinds.empty()},
                                                 {"--head-dims", flags.head_dims.empty()},
                                                 {"--causal", flags.causal.empty()},
                                                 {"--gqa", flags.gqa.empty()}};
  if (!flags.pack.empty()) {
    if (flags.pack != "default") throw UsageError("--pack is '" + flags.pack + "'; accepted: default");
    for (const auto& [flag, is_missing] : needed)
      if (!is_missing) throw UsageError(std::string(flag) + " is given with --pack, which names them; leave one out");
    return default_pack();
  }
  for (const auto& [flag, is_missing] : needed)
    if (is_missing)
      throw UsageError(std::string(flag) + " is required, like --kinds, --head-dims, --causal and --gqa, unless " +
                       "--pack default stands for all");
  KernelSelection selection;
  selection.kinds = parse_kinds("--kinds", flags.kinds);
  selection.head_dims = parse_numbers("--head-dims", flags.head_dims, 1, kMostHeadDim);
  const Switch causal = parse_switch("--causal", flags.causal);
  if (causal.off) selection.masks.push_back(Mask::kNone);
  if (causal.on) selection.masks.push_back(Mask::kCausal);
  if (flags.window) selection.masks.push_back(Mask::kWindow);
  for (std::size_t i = 0; i < kFeatures.size(); ++i)
    selection.features[i] = parse_switch(flag_of(kFeatures[i]), flags.features[i]);
  selection.group_sizes = parse_numbers("--gqa", flags.gqa, 1, kMostInt);
  return selection;
}

// What is illegal about a selection that parsed is its head dims.
std::vector<KernelSpec> kernels_of(const PrebuildFlags& flags, const ArchLimits& arch) {
  try {
    return select_kernels(parse_selection(flags), arch);
  } catch (const UnsupportedError& error) {
    throw UsageError(std::string("--head-dims: ") + error.what());
  }
}

int parse_jobs(const std::string& text) {
  if (text.empty()) return static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  return static_cast<int>(parse_number("--jobs", text, 1, kMostJobs));
}

std::string seconds_text(double seconds) {
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
      progress_.step(is_new ? "built " + spec.name() + " in " + seconds_text(found.kernel.seconds)
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
  const std::vector<KernelSpec> specs = kernels_of(flags, arch);
  const int jobs = parse_jobs(flags.jobs);
  const CompileTarget target{.sm = arch.sm, .code = CodeKind::kCubin};

  const Config settings = config_with_nvrtc("--nvrtc", flags.nvrtc);
  const auto driver = flags.driver.empty() ? std::nullopt : std::optional(parse_driver("--driver", flags.driver));
  PackWriter pack(settings, flags.out, driver);
  const Outcome outcome = PackBuilder(pack.library(), specs, target).run(jobs);
  pack.finish();

  print_failures(outcome);
  if (flags.json)
    std::cout << json_text(outcome_json(outcome, flags.out, target)) << "\n";
  else
    std::cout << flags.out << ": " << outcome.built << " built, " << outcome.skipped << " there already, "
              << outcome.failures.size() << " failed, " << seconds_text(outcome.seconds) << "\n";
  return outcome.failures.empty() && outcome.stopped_by.empty() ? kSuccess : kFailure;
}

}  // namespace

void add_prebuild(CLI::App& app, Action& chosen) {
  CLI::App* const command = app.add_subcommand("prebuild", "Build a pack of kernels; needs no GPU");
  const auto flags = std::make_shared<PrebuildFlags>();
  command->add_option("--arch", flags->arch, "Architecture to build for: sm_75 or newer")->required();
  command->add_option("--pack", flags->pack,
                      "default: forward and backward, head dims 64 and 128, causal or not, groups of 1, 2, 4 and 8; in "
                      "place of --kinds, --head-dims, --causal and --gqa");
  command->add_option("--kinds", flags->kinds, "Kinds of kernels: " + pack_group_words())->delimiter(',');
  command->add_option("--head-dims", flags->head_dims, "Head dims, 1 to 256: 64,128")->delimiter(',');
  command->add_option("--causal", flags->causal, "both, yes or no");
  command->add_flag("--window", flags->window, "Besides those of --causal, the kernels of sliding windows");
  flags->features.fill("no");
  for (std::size_t i = 0; i < kFeatures.size(); ++i)
    command
        ->add_option(flag_of(kFeatures[i]), flags->features[i],
                     "Kernels " + std::string(kFeatures[i].phrase) + ": both, yes or no")
        ->capture_default_str();
  command->add_option("--gqa", flags->gqa, "Group sizes (num_heads / num_heads_k): 1,2,4,8")->delimiter(',');
  command->add_option("--out", flags->out, "The pack: a folder, or a zip file (FILE.zip); what is there is added to")
      ->required();
  command->add_option("--jobs", flags->jobs, "Kernels to compile at once; default: one a core");
  command->add_option("--nvrtc", flags->nvrtc, "The libnvrtc to compile with; default: the newest 12.x found");
  command->add_option("--driver", flags->driver,
                      "The oldest CUDA driver that has to load the pack, such as 12.0: an NVRTC too new for it is not "
                      "taken");
  command->add_flag("--json", flags->json, "Print JSON");
  command->callback([&chosen, flags] { chosen = [flags] { return run_prebuild(*flags); }; });
}

}  // namespace flash_attn_jit::program
