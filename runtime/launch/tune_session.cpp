#include "runtime/launch/tune_session.h"

#include <algorithm>
#include <chrono>
#include <ctime>
#include <mutex>
#include <set>
#include <thread>

#include "generator/families/families.h"
#include "generator/tile_chooser.h"
#include "runtime/system/errors.h"
#include "runtime/system/log.h"
#include "runtime/tuner/candidates.h"
#include "runtime/tuner/card_predictions.h"
#include "runtime/tuner/isolated_device.h"
#include "runtime/tuner/thread_compiler.h"

namespace flash_attn_jit {
namespace {

class SteadyClock final : public TuningClock {
 public:
  double now() override {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
  }
  std::string utc_time() override {
    const std::time_t now = std::time(nullptr);
    std::tm utc{};
    gmtime_r(&now, &utc);
    char text[32];
    std::strftime(text, sizeof text, "%Y-%m-%dT%H:%M:%SZ", &utc);
    return text;
  }
};

// What compiled the candidates, as their threads find out.
class CompilerName {
 public:
  void set(const std::string& built_by) {
    const std::lock_guard lock(mutex_);
    name_ = built_by;
  }
  std::string get() const {
    const std::lock_guard lock(mutex_);
    return name_;
  }

 private:
  mutable std::mutex mutex_;
  std::string name_;
};

// Publishes records with what is known of the environment by then.
class PublishedRecords final : public RecordSink {
 public:
  PublishedRecords(Tuning& tuning, const CompilerName& compiler, TuningEnvironment& environment,
                   const IsolatedDevice& measuring)
      : tuning_(tuning), compiler_(compiler), environment_(environment), measuring_(measuring) {}

  void publish(const TuningRecord& record) override {
    TuningRecord complete = record;
    complete.environment = environment();
    tuning_.publish(complete);
  }

  const TuningEnvironment& environment() {
    environment_.nvrtc = compiler_.get();
    environment_.power_limit_watts = measuring_.figures().power_limit_watts;
    if (measuring_.figures().gigabytes) environment_.peak_gigabytes = measuring_.figures().gigabytes;
    if (measuring_.figures().tflops) environment_.peak_tflops = measuring_.figures().tflops;
    return environment_;
  }

 private:
  Tuning& tuning_;
  const CompilerName& compiler_;
  TuningEnvironment& environment_;
  const IsolatedDevice& measuring_;
};

// One core is left for the process that launches.
int compile_threads() { return std::max(1, static_cast<int>(std::thread::hardware_concurrency()) - 1); }

class TuneSession {
 public:
  TuneSession(Device& device, Tuning& tuning, const TuneSettings& settings)
      : device_(device),
        tuning_(tuning),
        settings_(settings),
        compiler_(compile_threads(), [this](const KernelSpec& spec) { return compile(spec); }) {
    environment_.library = FLASH_ATTN_JIT_VERSION;
    environment_.driver = settings.driver;
    if (const auto card = card_of(device.tuned_as())) model_.emplace(*card);
  }

  std::vector<TunedProblem> run(const std::vector<AttentionCase>& cases) {
    std::vector<TunedProblem> tuned;
    const double end = clock_.now() + settings_.budget_seconds;
    for (std::size_t i = 0; i < cases.size(); ++i) {
      // What one does not use is the others'.
      const double share = (end - clock_.now()) / static_cast<double>(cases.size() - i);
      if (share <= 0) break;
      tuned.push_back({cases[i], tune(cases[i], share, settings_.begin ? settings_.begin(cases[i]) : nullptr)});
      if (settings_.tuned) settings_.tuned(tuned.back());
      if (tuned.back().result.interrupted) break;
    }
    return tuned;
  }

 private:
  SearchResult tune(const AttentionCase& attention, double budget_seconds, SearchWatcher* watcher) {
    const double begin = clock_.now();
    const SearchTask task = task_of(attention);
    WorkerSetup setup{attention,
                      device_.info().ordinal,
                      earlier_kernels(attention),
                      !environment_.peak_gigabytes,
                      environment_.peak_tflops ? std::nullopt : tensor_kernel(),
                      combine_kernel(attention)};
    IsolatedDevice measuring(settings_.worker_command, std::move(setup));
    SearchSettings search;
    search.budget_seconds = std::max(budget_seconds - (clock_.now() - begin), 0.0);
    PublishedRecords records(tuning_, compiler_name_, environment_, measuring);
    const SearchParts parts{clock_, compiler_, measuring, model_ ? &*model_ : nullptr, &records, watcher};
    SearchResult result = search_tiles(task, parts, search);
    compiler_.forget();
    if (!measuring.figures().unknown_state.empty())
      warn_once("clock, power, temperature and throttling are not recorded: " + measuring.figures().unknown_state);
    if (result.newly_measured > 0) result.record->environment = records.environment();
    return result;
  }

  // Nothing where it cannot be had: the peak is then not known, and that is all.
  std::optional<CompiledKernel> tensor_kernel() {
    try {
      return device_.find_or_compile_tensor_peak().kernel;
    } catch (const Error& error) {
      log(LogLevel::kInfo, std::string("the peak of the tensor instructions is not measured: ") + error.what());
      return std::nullopt;
    }
  }

  CompiledKernel compile(const KernelSpec& spec) {
    CompiledKernel kernel = device_.find_or_compile(spec).kernel;
    compiler_name_.set(kernel.built_by);
    return kernel;
  }

  SearchTask task_of(const AttentionCase& attention) {
    SearchTask task;
    TuningRecord& record = task.record;
    const Problem problem = problem_of(attention, device_.info().multiprocessors);
    record.key = {device_.tuned_as(), tuning_.templates_of(attention.spec.kind), class_of(attention.spec, problem), {}};
    record.environment = environment_;  // the rest of it when it is published
    record.batch = attention.batch;
    record.num_heads = attention.num_heads;
    record.num_heads_k = attention.num_heads_k;
    record.seqlen_q = attention.seqlen_q;
    record.seqlen_k = attention.seqlen_k;
    record.window_left = attention.window().left;
    record.window_right = attention.window().right;
    record.default_tile = tuning_.otherwise().choose(attention.spec, problem);
    task.tiles = tiles_to_try(record.key.problem, problem, record.default_tile, device_.plan_target().arch);
    task.multiprocessors = device_.info().multiprocessors;
    if (!settings_.afresh) task.known = known(record.key);
    return task;
  }

  std::optional<TuningRecord> known(const RecordKey& key) const {
    for (TuningRecord& record : tuning_.store().read(key.device))
      if (record.key == key) return std::move(record);
    return std::nullopt;
  }

  EarlierKernels earlier_kernels(const AttentionCase& attention) {
    EarlierKernels earlier;
    if (!attention.is_backward()) return earlier;
    earlier.forward = default_kernel(attention, KernelKind::kForward);
    if (family_of(attention.spec.kind).products > 0)
      earlier.preprocess = default_kernel(attention, KernelKind::kBackwardPreprocess);
    return earlier;
  }

  std::optional<CompiledCandidate> combine_kernel(const AttentionCase& attention) {
    if (attention.spec.kind != KernelKind::kDecode) return std::nullopt;
    return default_kernel(attention, KernelKind::kDecodeCombine);
  }

  CompiledCandidate default_kernel(const AttentionCase& attention, KernelKind kind) {
    KernelSpec spec = attention.spec;
    spec.kind = kind;
    spec = normalized(spec);
    spec.tile = tuning_.otherwise().choose(spec, problem_of(attention, device_.info().multiprocessors));
    return {spec.tile, device_.find_or_compile(spec).kernel, ""};
  }

  Device& device_;
  Tuning& tuning_;
  const TuneSettings& settings_;
  SteadyClock clock_;
  TuningEnvironment environment_;
  CompilerName compiler_name_;
  ThreadCompiler compiler_;
  std::optional<CardPredictions> model_;  // of a Turing card
};

}  // namespace

std::vector<AttentionCase> one_of_each_class(const std::vector<AttentionCase>& cases, int multiprocessors) {
  std::set<ProblemClass> seen;
  std::vector<AttentionCase> firsts;
  for (const AttentionCase& attention : cases) {
    const ProblemClass problem = class_of(attention.spec, problem_of(attention, multiprocessors));
    if (has_default_tile(attention.spec, problem.seqlen_k) && seen.insert(problem).second) firsts.push_back(attention);
  }
  return firsts;
}

void refuse_offline(const Config& settings) {
  if (settings.offline)
    throw ConfigError("FLASH_ATTN_JIT_OFFLINE is '1', and tuning compiles what it tries; accepted: 0, or no tuning");
}

std::vector<TunedProblem> tune(Device& device, Tuning& tuning, const std::vector<AttentionCase>& cases,
                               const TuneSettings& settings) {
  return TuneSession(device, tuning, settings).run(cases);
}

}  // namespace flash_attn_jit
