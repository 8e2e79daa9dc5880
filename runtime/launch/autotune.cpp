#include "runtime/launch/autotune.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <thread>

#include "runtime/system/errors.h"
#include "runtime/system/interrupt.h"
#include "runtime/system/log.h"

namespace flash_attn_jit {
namespace {

constexpr double kLeastSeconds = 0.5;  // with less nothing is found

constexpr const char* kLeavesUsers = "autotune() leaves calls with a score_mod or a block_mask at the default tiles";
constexpr const char* kLeavesBFloat16 =
    "autotune() leaves bfloat16 calls as they are, with default tiles: it tunes float16";

// The sizes of a request's problem; the spec is each launch's own.
AttentionCase sizes_of(const TensorView& q, const TensorView& k, const AttentionOptions& options) {
  const ProblemShape shape = problem_shape(q, k, options);
  AttentionCase sizes;
  sizes.batch = shape.batch;
  sizes.num_heads = q.shape[kHeads];
  sizes.seqlen_q = shape.seqlen_q;
  sizes.seqlen_k = options.pages ? keys_of_fast_pages(shape.seqlen_k) : shape.seqlen_k;
  return sizes;
}

bool is_empty(const AttentionCase& sizes) {
  return sizes.batch < 1 || sizes.num_heads < 1 || sizes.seqlen_q < 1 || sizes.seqlen_k < 1;
}

// The tuner's problems have one head dim.
bool has_own_values(const TensorView& q, const TensorView& v) {
  if (q.shape[kHeadDim] == v.shape[kHeadDim]) return false;
  warn_once("autotune() leaves calls whose v has another head dim than q as they are");
  return true;
}

// Whatever would choose, but for which way a backward pass goes.
class OneWay final : public TileChooser {
 public:
  OneWay(const TileChooser& tiles, bool all_keys) : tiles_(tiles), all_keys_(all_keys) {}

  TileConfig choose(const KernelSpec& spec, const Problem& problem) const override {
    return tiles_.choose(spec, problem);
  }
  bool takes_all_keys(const KernelSpec& spec, const Problem& problem) const override {
    KernelSpec all_keys = spec;
    all_keys.kind = KernelKind::kBackwardAllKeys;
    return all_keys_ && has_default_tile(all_keys, problem.seqlen_k);
  }
  bool takes_decode(const KernelSpec& spec, const Problem& problem) const override {
    return tiles_.takes_decode(spec, problem);
  }

 private:
  const TileChooser& tiles_;
  const bool all_keys_;
};

}  // namespace

void Autotuner::begin(AutotuneSettings settings) {
  const std::lock_guard guard(mutex_);
  if (is_on_) throw ArgumentError("autotune() is on already; it is the whole process's, and does not nest");
  settings_ = std::move(settings);
  spent_seconds_ = 0;
  done_.clear();
  found_.clear();
  is_on_ = true;
}

std::vector<TunedProblem> Autotuner::end() {
  is_on_ = false;
  return found();
}

std::vector<TunedProblem> Autotuner::found() const {
  const std::lock_guard guard(mutex_);
  std::vector<TunedProblem> problems;
  for (const auto& [key, problem] : found_) problems.push_back(problem);
  return problems;
}

bool Autotuner::is_done(const Key& key) const {
  const std::lock_guard guard(mutex_);
  return done_.contains(key);
}

// In the place of what was said of the class before.
void Autotuner::keep(const Key& key, TunedProblem tuned) {
  const std::lock_guard guard(mutex_);
  const auto known = std::find_if(found_.begin(), found_.end(), [&](const auto& one) { return one.first == key; });
  if (known == found_.end())
    found_.emplace_back(key, std::move(tuned));
  else
    known->second = std::move(tuned);
}

void Autotuner::leave(const Key& key, const AttentionCase& attention, const std::string& reason) {
  TunedProblem left{attention, {}};
  left.result.reason = reason;
  keep(key, std::move(left));
  warn_once("autotune() leaves '" + key.second.text() + "' untuned: " + reason);
}

void Autotuner::meet(Device& device, const ForwardRequest& request, StreamHandle stream) {
  if (request.options.dtype == DType::kBFloat16) return warn_once(kLeavesBFloat16);
  if (request.options.user != nullptr) return warn_once(kLeavesUsers);
  const LaunchPlan plan = plan_forward(request, device.plan_target());
  if (!family_of(plan.spec.kind).is_tuned) return;
  if (plan.spec.kind == KernelKind::kForward && plan.spec.features.forward_only())
    return warn_once("autotune() leaves calls of many queries over a cache of keys and values as they are");
  if (has_own_values(request.q, request.v)) return;
  if (!request.tile && !request.decode_tile)
    meet(device, plan, sizes_of(request.q, request.k, request.options), stream);
}

void Autotuner::meet(Device& device, const BackwardRequest& request, StreamHandle stream) {
  if (request.options.dtype == DType::kBFloat16) return warn_once(kLeavesBFloat16);
  if (request.options.user != nullptr) return warn_once(kLeavesUsers);
  if (has_own_values(request.q, request.v)) return;
  const PlanTarget target = device.plan_target();
  const AttentionCase sizes = sizes_of(request.q, request.k, request.options);
  for (const bool all_keys : {false, true}) {  // where there are both ways, the times of both decide
    const OneWay tiles(target.tiles, all_keys);
    for (const BackwardLaunch& launch : plan_backward(request, {target.arch, target.multiprocessors, tiles}))
      if (family_of(launch.spec.kind).is_tuned && !tile_of(request, launch.spec.kind))
        meet(device, launch, sizes, stream);
  }
}

void Autotuner::meet_interpreted() {
  warn_once("autotune() meets tensors of the CPU, which the interpreter runs: there is nothing to tune");
}

template <class Params>
void Autotuner::meet(Device& device, const KernelLaunch<Params>& launch, const AttentionCase& sizes,
                     StreamHandle stream) {
  if (launch.blocks == 0 || is_empty(sizes)) return;
  AttentionCase attention = sizes;
  attention.spec = launch.spec;
  attention.spec.tile = {};
  attention.num_heads_k = sizes.num_heads / launch.spec.group_size;
  const Key key{device.tuned_as(), class_of(attention.spec, problem_of(attention, device.info().multiprocessors))};
  if (tuning_.has_measured(key.first, key.second) || is_done(key)) return;
  if (device.is_capturing(stream))
    return leave(key, attention, "its stream is being captured; call it once before the capture");
  tune_in_turn(device, key, attention, stream);
}

void Autotuner::tune_in_turn(Device& device, const Key& key, const AttentionCase& attention, StreamHandle stream) {
  std::unique_lock turn(turn_, std::defer_lock);
  while (!turn.try_lock()) {
    throw_if_interrupted();
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
  }
  if (!is_on() || tuning_.has_measured(key.first, key.second) || is_done(key)) return;
  TunedProblem tuned{attention, {}};
  try {
    tuned.result = tune_one(device, attention, stream);
  } catch (const Error& error) {
    tuned.result.reason = error.what();
  }
  if (tuned.result.record) {
    log(LogLevel::kInfo, "autotune(): " + outcome_text(tuned));
    keep(key, tuned);
  } else {
    leave(key, attention, tuned.result.reason);
  }
  if (tuned.result.interrupted) throw Interrupted();
  const std::lock_guard guard(mutex_);
  done_.insert(key);
}

SearchResult Autotuner::tune_one(Device& device, const AttentionCase& attention, StreamHandle stream) {
  TuneSettings settings;
  double left_seconds = 0;
  {
    const std::lock_guard guard(mutex_);
    settings.worker_command = settings_.worker_command;
    settings.driver = settings_.driver;
    left_seconds = settings_.budget_seconds - spent_seconds_;
    settings.budget_seconds = std::min(left_seconds, settings_.seconds_each);
  }
  SearchResult nothing;
  nothing.reason = "budget_seconds is spent";
  if (left_seconds < kLeastSeconds) return nothing;
  device.wait_for(stream);  // what the caller has the device do would be measured too
  const auto begin = std::chrono::steady_clock::now();
  const auto spend = [&] {
    const std::lock_guard guard(mutex_);
    spent_seconds_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  };
  try {
    std::vector<TunedProblem> tuned = tune(device, tuning_, {attention}, settings);
    spend();
    return tuned.empty() ? nothing : std::move(tuned.front().result);
  } catch (...) {
    spend();
    throw;
  }
}

}  // namespace flash_attn_jit
