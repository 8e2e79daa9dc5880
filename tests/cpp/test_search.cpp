// The search for a tile, on a fake clock, compiler and device: the same search that runs on a GPU.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <random>
#include <set>
#include <sstream>

#include "generator/errors.h"
#include "generator/legality.h"
#include "runtime/system/interrupt.h"
#include "runtime/tuner/candidates.h"
#include "runtime/tuner/search.h"
#include "tests/cpp/containing.h"

using namespace flash_attn_jit;
using namespace flash_attn_jit::testing;

namespace {

constexpr double kBegin = 1000;

enum class Ill { kNo, kWrong, kCrashesAtCheck, kHangsAtCheck, kCrashesLater, kHangsLater, kDoesNotCompile, kRefused };

struct FakeTile {
  double seconds = 1e-3;  // of a launch
  double compile_seconds = 0.5;
  Ill ill = Ill::kNo;
};

// A machine with a clock that moves only when something is done.
class FakeWorld final : public TuningClock, public CandidateCompiler, public MeasuringDevice, public RecordSink {
 public:
  std::map<TileConfig, FakeTile> tiles;
  double noise = 0.003;  // standard deviation of a burst
  double check_seconds = 0.05;
  double restart_seconds = 1;  // after a crash
  int compile_threads = 2;
  double interrupt_at = 1e9;
  std::uint64_t seed = 1;
  // How much slower than its best the device is at a time; and at the first of so many bursts after a check, which warm
  // it.
  std::function<double(double)> slowdown = [](double) { return 1.0; };
  double cold_slowdown = 1;
  int warm_bursts = 0;

  double moment = kBegin;
  std::vector<TuningRecord> published;
  std::map<TileConfig, int> checks, bursts, compiles;
  std::vector<TileConfig> burst_order;

  double now() override { return moment; }
  double passed() const { return moment - kBegin; }
  std::string utc_time() override { return "2026-11-27T08:00:00Z"; }
  void publish(const TuningRecord& record) override { published.push_back(record); }

  double last_compile_end() const { return last_compile_end_; }
  std::map<TileConfig, int> last_launches;

  int most_at_once() const override { return compile_threads; }
  void start(const KernelSpec& spec) override {
    ++compiles[spec.tile];
    running_.emplace_back(moment + tiles.at(spec.tile).compile_seconds, spec.tile);
    last_compile_end_ = std::max(last_compile_end_, running_.back().first);
  }
  std::optional<CompiledCandidate> next(double wait_seconds) override {
    const auto first = std::min_element(running_.begin(), running_.end());
    if (first == running_.end() || first->first > moment + wait_seconds) {
      if (first != running_.end()) pass(wait_seconds);
      return std::nullopt;
    }
    if (first->first > moment) pass(first->first - moment);
    CompiledCandidate compiled{first->second, std::nullopt, ""};
    running_.erase(first);
    const FakeTile& tile = tiles.at(compiled.tile);
    if (tile.ill == Ill::kDoesNotCompile) {
      compiled.failure = "the compiler's words";
      return compiled;
    }
    compiled.kernel.emplace();
    compiled.kernel->resources.registers = 128;
    compiled.kernel->threads = compiled.tile.threads();
    compiled.kernel->seconds = tile.compile_seconds;
    return compiled;
  }

  CheckedCandidate check(const CompiledCandidate& candidate, double limit_seconds) override {
    REQUIRE(candidate.kernel);
    ++checks[candidate.tile];
    const Ill ill = tiles.at(candidate.tile).ill;
    CheckedCandidate checked{std::nullopt, 1e-4, 1e-3, 2};
    if (ill == Ill::kWrong) {
      pass(check_seconds);
      return {CandidateFault{Outcome::kWrongResult, "off by 0.5"}, 0.5, 1e-3, 2};
    }
    if (ill == Ill::kRefused) return {CandidateFault{Outcome::kLaunchFailed, "too many resources"}, {}, {}, 0};
    checked.fault = fault(ill == Ill::kCrashesAtCheck, ill == Ill::kHangsAtCheck, limit_seconds);
    if (!checked.fault) pass(check_seconds);
    idle_ = warm_bursts;
    return checked;
  }

  TimedBurst time(const CompiledCandidate& candidate, int launches, double limit_seconds) override {
    const FakeTile& tile = tiles.at(candidate.tile);
    const int burst = bursts[candidate.tile]++;
    TimedBurst timed;
    timed.fault =
        fault(tile.ill == Ill::kCrashesLater && burst == 9, tile.ill == Ill::kHangsLater && burst == 9, limit_seconds);
    if (timed.fault) return timed;
    const double cold = idle_ > 0 ? 1 + (cold_slowdown - 1) * idle_ / warm_bursts : 1;
    if (idle_ > 0) --idle_;
    timed.sample.seconds = tile.seconds * slowdown(passed()) * cold * (1 + noise * normal());
    pass(timed.sample.seconds * launches + 1e-4);
    burst_order.push_back(candidate.tile);
    last_launches[candidate.tile] = launches;
    return timed;
  }

 private:
  void pass(double seconds) {
    moment += seconds;
    if (passed() >= interrupt_at) throw Interrupted();
  }

  std::optional<CandidateFault> fault(bool crashes, bool hangs, double limit_seconds) {
    if (crashes) {
      pass(restart_seconds);
      return CandidateFault{Outcome::kCrashed, "it took the process with it"};
    }
    if (hangs) {
      pass(limit_seconds);
      return CandidateFault{Outcome::kTimedOut, "it did not end"};
    }
    return std::nullopt;
  }

  double uniform() {
    if (!random_) random_.emplace(seed * 77 + 5);
    return static_cast<double>((*random_)() >> 11) * 0x1p-53 + 0x1p-60;
  }
  double normal() { return std::sqrt(-2 * std::log(uniform())) * std::cos(6.283185307179586 * uniform()); }

  std::vector<std::pair<double, TileConfig>> running_;
  std::optional<std::mt19937_64> random_;
  int idle_ = 0;
  double last_compile_end_ = 0;
};

TileConfig tile(int n, int load = 0) {
  return {.block_m = 128, .block_n = n, .warps = 8, .register_dims = 64, .schedule = {load, 8, 8}};
}

const TileConfig kDefault = tile(16), kBest = tile(24), kOther = tile(32), kSmall = tile(8);

SearchTask task_of(const FakeWorld& world, const TileConfig& default_tile = kDefault) {
  SearchTask task;
  task.record.key.problem.spec = KernelSpec::parse("fwd hdim64 fp16 full gqa1 vec16 m128n16w8q64l0b8k8");
  task.record.key.problem.spec.tile = {};
  task.record.batch = 4;
  task.record.num_heads = task.record.num_heads_k = 12;
  task.record.seqlen_q = task.record.seqlen_k = 1024;
  task.record.default_tile = default_tile;
  task.multiprocessors = 40;
  task.tiles.push_back(default_tile);
  for (const auto& [tile, fake] : world.tiles)
    if (tile != default_tile) task.tiles.push_back(tile);
  return task;
}

SearchResult search(FakeWorld& world, SearchSettings settings = {}, const std::optional<TuningRecord>& known = {},
                    const CandidateModel* model = nullptr) {
  SearchTask task = task_of(world);
  task.known = known;
  return search_tiles(task, {world, world, world, model, &world, nullptr}, settings);
}

const Candidate& candidate(const TuningRecord& record, const TileConfig& tile) {
  for (const Candidate& candidate : record.candidates)
    if (candidate.tile == tile) return candidate;
  FAIL("not in the record: " << tile.text());
  throw Error("unreachable");
}

FakeWorld four_tiles() {
  FakeWorld world;
  world.tiles[kDefault].seconds = 1.00e-3;
  world.tiles[kBest].seconds = 0.93e-3;
  world.tiles[kOther].seconds = 0.97e-3;
  world.tiles[kSmall].seconds = 1.30e-3;
  return world;
}

// A fake that knows what a tile takes, but for an error of its own.
class FakeModel final : public CandidateModel {
 public:
  FakeModel(const FakeWorld& world, bool knows_before) : world_(world), knows_before_(knows_before) {}
  std::optional<Prediction> predict(const KernelSpec& spec, const Problem&,
                                    const CompiledKernel* kernel) const override {
    if (kernel == nullptr && !knows_before_) return std::nullopt;
    const double bias = 1 + 0.02 * (spec.tile.schedule.load % 3 - 1);
    return Prediction{world_.tiles.at(spec.tile).seconds * bias, "tensor"};
  }

 private:
  const FakeWorld& world_;
  bool knows_before_;
};

// Eighty tiles, the best of which is far from the default.
FakeWorld large_space() {
  FakeWorld world;
  for (int n = 8; n <= 80; n += 8)
    for (int load = 0; load < 8; ++load)
      world.tiles[tile(n, load)] = {.seconds = 1e-3 * (1 + 0.02 * std::abs(n - 72) + 0.01 * std::abs(load - 6))};
  return world;
}

}  // namespace

TEST_CASE("search: the fastest tile wins, and the record says how") {
  FakeWorld world = four_tiles();
  const SearchResult result = search(world);
  REQUIRE(result.record);
  const TuningRecord& record = *result.record;
  CHECK(result.settled);
  CHECK_FALSE(result.interrupted);
  CHECK(result.newly_measured == 4);
  CHECK(record.winner == kBest);
  CHECK(record.default_tile == kDefault);
  CHECK(record.rule == Containing{"lowest median, "});
  CHECK(record.rule == Containing{"below the default's in the same rounds"});
  CHECK(record.rounds >= 8);
  CHECK(record.seconds == doctest::Approx(world.passed()));
  CHECK(record.when == "2026-11-27T08:00:00Z");
  REQUIRE(record.candidates.size() == 4);
  const Candidate& best = candidate(record, kBest);
  CHECK(best.outcome == Outcome::kMeasured);
  CHECK(best.registers == 128);
  CHECK(best.threads == 256);
  CHECK(best.compile_seconds == 0.5);
  CHECK(best.error == 1e-4);
  CHECK(best.blocks_per_multiprocessor == 2);
  CHECK(best.median_seconds.value() / 0.93e-3 == doctest::Approx(1).epsilon(0.005));
  CHECK(best.low_seconds.value() <= best.median_seconds.value());
  CHECK(best.samples.size() == 2 * round_times(best.samples).size());
  // The hopeless one left early, with its samples.
  CHECK(candidate(record, kSmall).samples.size() == 4);
  REQUIRE(world.published.size() == 1);
  CHECK(world.published[0].winner == kBest);
}

TEST_CASE("search: every candidate is checked before it is timed, and compiled once") {
  FakeWorld world = four_tiles();
  search(world);
  for (const auto& [tile, fake] : world.tiles) {
    CHECK(world.checks[tile] == 1);
    CHECK(world.compiles[tile] == 1);
  }
}

TEST_CASE("search: a round is a random order and its reverse, and the order changes") {
  FakeWorld world = four_tiles();
  world.tiles[kSmall].seconds = world.tiles[kOther].seconds = world.tiles[kBest].seconds =
      world.tiles[kDefault].seconds;
  for (auto& [tile, fake] : world.tiles) fake.compile_seconds = 0;
  world.noise = 0.01;
  search(world);
  // Rounds of four, from the end: the first rounds have fewer.
  std::set<std::vector<TileConfig>> orders;
  for (int round = 0; round < 10; ++round) {
    const auto end = world.burst_order.end() - 8 * round;
    std::vector<TileConfig> first(end - 8, end - 4), second(end - 4, end);
    std::reverse(second.begin(), second.end());
    CHECK(first == second);
    orders.insert(first);
    std::sort(first.begin(), first.end());
    CHECK(std::unique(first.begin(), first.end()) == first.end());
  }
  CHECK(orders.size() > 4);
}

TEST_CASE("search: the same seed gives the same search") {
  FakeWorld a = four_tiles(), b = four_tiles(), c = four_tiles();
  search(a);
  search(b);
  SearchSettings other;
  other.seed = 2;
  search(c, other);
  CHECK(a.burst_order == b.burst_order);
  CHECK(a.burst_order != c.burst_order);
}

TEST_CASE("search: a liar never wins") {
  FakeWorld world = four_tiles();
  world.tiles[kOther] = {.seconds = 0.1e-3, .ill = Ill::kWrong};
  const TuningRecord record = search(world).record.value();
  CHECK(record.winner == kBest);
  const Candidate& liar = candidate(record, kOther);
  CHECK(liar.outcome == Outcome::kWrongResult);
  CHECK(liar.reason == "off by 0.5");
  CHECK(liar.error == 0.5);
  CHECK(liar.samples.empty());
  CHECK(world.bursts[kOther] == 0);
}

TEST_CASE("search: what crashes, hangs, is refused or does not compile is recorded, and the search goes on") {
  struct Case {
    Ill ill;
    Outcome outcome;
    const char* reason;
  };
  for (const Case& c : {Case{Ill::kCrashesAtCheck, Outcome::kCrashed, "took the process"},
                        {Ill::kHangsAtCheck, Outcome::kTimedOut, "did not end"},
                        {Ill::kCrashesLater, Outcome::kCrashed, "took the process"},
                        {Ill::kHangsLater, Outcome::kTimedOut, "did not end"},
                        {Ill::kDoesNotCompile, Outcome::kCompileFailed, "the compiler's words"},
                        {Ill::kRefused, Outcome::kLaunchFailed, "too many resources"}}) {
    CAPTURE(static_cast<int>(c.ill));
    FakeWorld world = four_tiles();
    world.tiles[kOther] = {.seconds = 0.925e-3, .ill = c.ill};
    const SearchResult result = search(world);
    const TuningRecord record = result.record.value();
    CHECK(record.winner == kBest);
    CHECK(result.settled);
    CHECK(candidate(record, kOther).outcome == c.outcome);
    CHECK(candidate(record, kOther).reason == Containing{c.reason});
    CHECK(world.passed() < 60 * 1.1);
  }
}

TEST_CASE("search: where the default fails another wins, and the rule says so; where all fail there is no record") {
  FakeWorld world = four_tiles();
  world.tiles[kDefault].ill = Ill::kWrong;
  TuningRecord record = search(world).record.value();
  CHECK(record.winner == kBest);
  CHECK(record.rule == Containing{"the default failed"});
  CHECK(candidate(record, kDefault).outcome == Outcome::kWrongResult);

  world = four_tiles();
  world.tiles[kDefault].ill = Ill::kCrashesLater;  // while it is what others are compared with
  for (auto& [tile, fake] : world.tiles) fake.compile_seconds = 0;
  world.compile_threads = 4;
  record = search(world).record.value();
  CHECK(record.winner == kBest);
  CHECK(candidate(record, kDefault).outcome == Outcome::kCrashed);

  for (auto& [tile, fake] : world.tiles) fake.ill = Ill::kWrong;
  world.bursts.clear();
  world.published.clear();
  const SearchResult none = search(world);
  CHECK_FALSE(none.record);
  CHECK(none.reason == Containing{"no tile could be measured: " + kDefault.text() + ": off by 0.5"});
  CHECK(world.published.empty());
}

TEST_CASE("search: a sinking clock does not decide") {
  // It falls by a third over the search; by steps; and to and fro.
  const std::vector<std::function<double(double)>> clocks = {
      [](double t) { return 1 + 0.5 * std::min(t, 20.0) / 20; },
      [](double t) { return 1 + 0.05 * std::floor(t / 1.3); },
      [](double t) { return 1.2 + 0.2 * std::sin(t * 1.7); },
  };
  for (std::size_t i = 0; i < clocks.size(); ++i)
    for (std::uint64_t seed = 1; seed <= 8; ++seed) {
      CAPTURE(i);
      CAPTURE(seed);
      FakeWorld world = four_tiles();
      world.slowdown = clocks[i];
      world.seed = seed;
      // The best one comes last, when the clock has sunk: its own median is above that of others.
      world.tiles[kBest].compile_seconds = 12;
      SearchSettings settings;
      settings.seed = seed;
      const TuningRecord record = search(world, settings).record.value();
      CHECK(record.winner == kBest);
      if (i == 0) CHECK(candidate(record, kBest).median_seconds > candidate(record, kOther).median_seconds);
    }
}

TEST_CASE("search: a device that was idle is warmed up before anything counts") {
  FakeWorld world = four_tiles();
  world.cold_slowdown = 1.5;
  world.warm_bursts = 12;
  world.noise = 0.001;
  const TuningRecord record = search(world).record.value();
  CHECK(record.winner == kBest);
  for (const Candidate& each : record.candidates)
    for (const Sample& sample : each.samples)
      CHECK(sample.seconds / world.tiles[each.tile].seconds == doctest::Approx(1).epsilon(0.025));
}

TEST_CASE("search: the budget is kept within 10 %, and what it did not reach is told") {
  for (const double budget : {2.0, 5.0, 12.0})
    for (const Ill ill : {Ill::kNo, Ill::kHangsAtCheck, Ill::kHangsLater}) {
      CAPTURE(budget);
      CAPTURE(static_cast<int>(ill));
      FakeWorld world = large_space();
      for (auto& [tile, fake] : world.tiles) fake.compile_seconds = 0.3 + 0.1 * tile.schedule.load;
      world.tiles[tile(24)].ill = world.tiles[tile(16, 1)].ill = ill;
      SearchSettings settings;
      settings.budget_seconds = budget;
      const SearchResult result = search(world, settings);
      CHECK(world.passed() <= 1.1 * budget);
      CHECK(world.last_compile_end() - kBegin <= 1.1 * budget);
      REQUIRE(result.record);
      CHECK_FALSE(result.settled);
      CHECK(result.record->rule == Containing{"the budget ended before the ranking was settled"});
      int not_reached = 0;
      for (const Candidate& each : result.record->candidates)
        if (each.outcome == Outcome::kNotReached) {
          ++not_reached;
          CHECK_FALSE(each.reason.empty());
        }
      CHECK(not_reached > 0);
      CHECK(result.record->candidates.size() == 80);
    }
  // Too little for anything.
  FakeWorld world = four_tiles();
  SearchSettings settings;
  settings.budget_seconds = 0.3;
  const SearchResult nothing = search(world, settings);
  CHECK_FALSE(nothing.record);
  CHECK(nothing.reason == Containing{"before the default tile was measured"});
  CHECK(world.passed() <= 0.33);
}

TEST_CASE("search: where a budget ends early the best so far wins all the same") {
  for (const double budget : {4.0, 6.0, 9.0, 14.0})
    for (std::uint64_t seed = 1; seed <= 6; ++seed) {
      CAPTURE(budget);
      CAPTURE(seed);
      FakeWorld world = large_space();
      for (auto& [tile, fake] : world.tiles) fake.compile_seconds = 0.8;
      world.compile_threads = 16;
      world.seed = seed;
      SearchSettings settings;
      settings.seed = seed;
      settings.budget_seconds = budget;
      const TuningRecord record = search(world, settings).record.value();
      double best = 1;
      for (const Candidate& each : record.candidates)
        if (!each.samples.empty()) best = std::min(best, world.tiles[each.tile].seconds);
      CHECK(world.tiles[record.winner].seconds <= 1.03 * best);
      if (record.winner == kDefault) CHECK(record.rule == Containing{"had too few rounds to tell"});
    }
}

TEST_CASE("search: the last part of a budget is for the best") {
  FakeWorld world = large_space();
  for (auto& [tile, fake] : world.tiles) fake.compile_seconds = 0.8;
  world.compile_threads = 16;
  SearchSettings settings;
  settings.budget_seconds = 10;
  const TuningRecord record = search(world, settings).record.value();
  CHECK(round_times(candidate(record, record.winner).samples).size() >= 8);
  int last_round = 0;
  for (const Candidate& each : record.candidates)
    last_round += !each.samples.empty() && each.samples.back().round == record.rounds - 1;
  CHECK(last_round <= 6);
}

TEST_CASE("search: one that was cut short by the budget is not said to hang") {
  FakeWorld world = four_tiles();
  world.tiles[kOther] = {.compile_seconds = 3.6, .ill = Ill::kHangsAtCheck};
  SearchSettings settings;
  settings.budget_seconds = 6;
  TuningRecord record = search(world, settings).record.value();
  CHECK(record.winner == kBest);
  CHECK(candidate(record, kOther).outcome == Outcome::kNotReached);
  CHECK(candidate(record, kOther).reason == "the budget ended while it ran");
  CHECK(world.passed() <= 1.1 * settings.budget_seconds);
}

TEST_CASE("search: a model brings the likely ones to the front of a small budget, and prunes") {
  for (const bool before : {true, false}) {
    CAPTURE(before);
    FakeWorld world = large_space();
    for (auto& [tile, fake] : world.tiles) fake.compile_seconds = before ? 1 : 0.1;
    const FakeModel model(world, before);
    SearchSettings settings;
    settings.budget_seconds = 16;
    const TuningRecord with = search(world, settings, {}, &model).record.value();
    CHECK(with.winner == tile(72, 6));
    int pruned = 0;
    for (const Candidate& each : with.candidates) {
      if (each.outcome != Outcome::kPruned) continue;
      ++pruned;
      CHECK(each.reason == Containing{"times the "});
      CHECK(each.reason == Containing{"limited by tensor"});
      CHECK(each.samples.empty());
      CHECK(each.predicted_seconds.value() > 1.3 * candidate(with, with.winner).predicted_seconds.value());
      CHECK(world.compiles[each.tile] == (before ? 0 : 1));
    }
    CHECK(pruned > 10);
    CHECK(candidate(with, kDefault).outcome == Outcome::kMeasured);  // though the model gives it no chance
    CHECK(candidate(with, tile(72, 6)).predicted_seconds.value() > 0);
    CHECK(candidate(with, tile(72, 6)).limited_by == "tensor");
    if (!before) continue;
    FakeWorld blind = large_space();
    for (auto& [tile, fake] : blind.tiles) fake.compile_seconds = 1;
    CHECK(search(blind, settings).record.value().winner != tile(72, 6));
  }
}

TEST_CASE("search: a tie goes to the default, then to the smaller name") {
  for (std::uint64_t seed = 1; seed <= 10; ++seed) {
    CAPTURE(seed);
    FakeWorld world = four_tiles();
    world.seed = seed;
    SearchSettings settings;
    settings.seed = seed;
    world.tiles[kBest].seconds = 0.999e-3;  // within the noise
    world.tiles[kOther].seconds = 0.9995e-3;
    TuningRecord record = search(world, settings).record.value();
    CHECK(record.winner == kDefault);
    CHECK(record.rule == Containing{"cannot be told apart from"});

    world = four_tiles();
    world.seed = seed;
    world.tiles[kOther].seconds = world.tiles[kBest].seconds * 0.999;
    record = search(world, settings).record.value();
    CHECK(record.winner == std::min(kBest, kOther, [](auto a, auto b) { return a.text() < b.text(); }));
    CHECK(record.rule == Containing{"smallest name among 2"});
  }
}

TEST_CASE("search: repeated tunings seldom flip, and then between tiles that are as good") {
  int flips = 0, default_flips = 0;
  constexpr int kTimes = 60;
  for (std::uint64_t seed = 1; seed <= kTimes; ++seed) {
    FakeWorld world;
    world.seed = seed;
    world.noise = 0.01;
    // Two that are equal for all that matters, one that is 1.5 % behind, the default 4 % behind, others.
    world.tiles[kDefault].seconds = 1.04e-3;
    world.tiles[kBest].seconds = 1.000e-3;
    world.tiles[kOther].seconds = 1.001e-3;
    world.tiles[kSmall].seconds = 1.015e-3;
    for (int load = 1; load < 6; ++load) world.tiles[tile(16, load)].seconds = 1.03e-3 + 0.01e-3 * load;
    SearchSettings settings;
    settings.seed = seed;
    const TileConfig winner = search(world, settings).record.value().winner;
    flips += winner != kBest;
    CHECK(world.tiles[winner].seconds <= 1.016e-3);

    // And a default that nothing beats.
    FakeWorld flat = four_tiles();
    flat.seed = seed;
    flat.noise = 0.01;
    for (auto& [tile, fake] : flat.tiles) fake.seconds = 1e-3;
    default_flips += search(flat, settings).record.value().winner != kDefault;
  }
  MESSAGE("flips of " << kTimes << ": " << flips << " with near ties, " << default_flips << " away from the default");
  CHECK(flips <= kTimes * 5 / 100);
  CHECK(default_flips <= kTimes * 5 / 100);
}

TEST_CASE("search: what is known is not measured again") {
  FakeWorld world = four_tiles();
  const TuningRecord first = search(world).record.value();
  const double then = world.moment;
  world.bursts.clear();
  world.compiles.clear();
  const SearchResult again = search(world, {}, first);
  CHECK(world.moment == then);
  CHECK(world.compiles.empty());
  CHECK(again.settled);
  CHECK(again.newly_measured == 0);
  CHECK(again.record.value().winner == first.winner);
  CHECK(again.record.value().rounds == first.rounds);
}

TEST_CASE("search: a new candidate is measured beside the winner and the default only") {
  FakeWorld world = four_tiles();
  const TuningRecord first = search(world).record.value();
  const TileConfig added = tile(16, 3);
  world.tiles[added].seconds = 0.90e-3;
  world.bursts.clear();
  const SearchResult second = search(world, {}, first);
  const TuningRecord record = second.record.value();
  CHECK(second.newly_measured == 1);
  CHECK(record.winner == added);
  CHECK(world.bursts.size() == 3);
  CHECK(world.bursts.count(kOther) == 0);
  CHECK(record.candidates.size() == 5);
  CHECK(record.seconds > first.seconds);
  CHECK(record.rounds > first.rounds);
  CHECK(candidate(record, kOther).samples.size() == candidate(first, kOther).samples.size());
  CHECK(candidate(record, kBest).samples.size() > candidate(first, kBest).samples.size());
  for (const Sample& sample : candidate(record, added).samples) CHECK(sample.round >= first.rounds);
}

TEST_CASE("search: known failures are not tried again") {
  FakeWorld world = four_tiles();
  world.tiles[kOther].ill = Ill::kCrashesAtCheck;
  const TuningRecord first = search(world).record.value();
  world.tiles[tile(16, 3)].seconds = 2e-3;
  search(world, {}, first);
  CHECK(world.checks[kOther] == 1);
}

TEST_CASE("search: one that was interrupted publishes what there is, and goes on where it was") {
  int between = 0;
  for (const double at : {0.6, 1.0, 1.31, 1.77, 2.5, 3.33, 4.05, 6.0}) {
    CAPTURE(at);
    FakeWorld world = large_space();
    world.interrupt_at = at;
    const SearchResult first = search(world);
    CHECK(first.interrupted);
    CHECK_FALSE(first.settled);
    if (!first.record) {
      CHECK(world.published.empty());
      continue;
    }
    ++between;
    REQUIRE(world.published.size() == 1);
    CHECK(first.record->rule == Containing{"interrupted before the ranking was settled"});
    std::map<TileConfig, int> checks = world.checks;
    // Whole rounds alone.
    for (const Candidate& each : first.record->candidates)
      CHECK(each.samples.size() == 2 * round_times(each.samples).size());

    world.interrupt_at = 1e9;
    SearchSettings settings;
    settings.budget_seconds = 300;
    const SearchResult second = search(world, settings, first.record);
    CHECK(second.settled);
    CHECK(second.record->winner == tile(72, 6));
    CHECK(second.record->candidates.size() == 80);
    // What was hopeless was left alone.
    const double best = candidate(*first.record, first.record->winner).median_seconds.value();
    for (const Candidate& each : first.record->candidates)
      if (each.samples.size() >= 4 && each.median_seconds.value() > 1.2 * best && each.tile != kDefault)
        CHECK(world.checks[each.tile] == checks[each.tile]);
  }
  CHECK(between >= 5);
}

TEST_CASE("search: a long one publishes now and then") {
  FakeWorld world = large_space();
  SearchSettings settings;
  settings.budget_seconds = 60;
  settings.publish_every_seconds = 5;
  search(world, settings);
  REQUIRE(world.published.size() >= 3);
  CHECK(world.published.front().rule == Containing{"the search goes on"});
  CHECK(world.published.front().candidates.size() == 80);
}

TEST_CASE("search: short kernels are timed in long bursts, long ones alone") {
  FakeWorld world;
  world.tiles[kDefault].seconds = 2e-5;
  world.tiles[kBest].seconds = 1.9e-5;
  world.tiles[kOther].seconds = 0.4;
  search(world);
  CHECK(world.last_launches[kDefault] == doctest::Approx(1000).epsilon(0.05));
  CHECK(world.last_launches[kBest] == doctest::Approx(1053).epsilon(0.05));
  CHECK(world.last_launches[kOther] == 1);
  CHECK(world.bursts[kOther] <= 6);
}

TEST_CASE("the tiles to try: the default first, then by what the costs beside the default tiles promise, each once") {
  KernelSpec spec = KernelSpec::parse("fwd hdim64 fp16 causal gqa1 vec16 m128n16w8q64l0b8k8");
  spec.tile = {};
  const ArchLimits arch = arch_limits(75);
  const std::vector<TileConfig> defaults = default_tiles(spec), space = tile_space(spec, arch);
  const Problem large{1024, 1024, 64, 40, 0}, small{100, 100, 2, 40, 0};
  for (const Problem& problem : {large, small})
    for (const TileConfig& default_tile : defaults) {
      const std::vector<TileConfig> tiles = tiles_to_try(class_of(spec, problem), problem, default_tile, arch);
      REQUIRE(tiles.size() > 20);
      CHECK(tiles.front() == default_tile);
      CHECK(std::set<TileConfig>(tiles.begin(), tiles.end()).size() == tiles.size());
      CHECK(std::set<TileConfig>(tiles.begin(), tiles.end()) == std::set<TileConfig>(space.begin(), space.end()));
      for (std::size_t i = 2; i < tiles.size(); ++i)
        CHECK(promising_cycles(spec, tiles[i - 1], problem) <= promising_cycles(spec, tiles[i], problem));
    }
  // What one block of 256 rows leaves idle on 40 multiprocessors goes last.
  const auto place = [&](const Problem& problem, const TileConfig& which) {
    const std::vector<TileConfig> tiles = tiles_to_try(class_of(spec, problem), problem, defaults.back(), arch);
    return std::find(tiles.begin(), tiles.end(), which) - tiles.begin();
  };
  REQUIRE(defaults.front().block_m == 256);
  CHECK(place(large, defaults.front()) < 10);
  CHECK(place(small, defaults.front()) > 20);
  // Of equal promise, the one nearer to a default tile.
  TileConfig near = defaults.front(), far = near;
  near.schedule.load += 1, far.schedule.load += 3;
  CHECK(promising_cycles(spec, defaults.front(), large) == expected_cycles(spec, defaults.front(), large));
  CHECK(promising_cycles(spec, near, large) < promising_cycles(spec, far, large));
  CHECK(tile_distance(tile(16), tile(16)) == 0);
  CHECK(tile_distance(tile(16), tile(32)) == 1);
  CHECK(tile_distance(tile(16, 0), tile(16, 4)) == 0.5);
}

TEST_CASE("the tiles to try of a decode problem: blocks of every number of rows, the default's first") {
  const KernelSpec spec = parse_kernel_without_tile("decode hdim128 fp16 causal gqa4 vec16");
  const ArchLimits arch = arch_limits(75);
  for (const std::int64_t seqlen_q : {1, 16}) {
    const Problem problem{seqlen_q, 4096, 32, 40, 0};
    const TileConfig default_tile = default_tile_chooser().choose(spec, problem);
    const std::vector<TileConfig> tiles = tiles_to_try(class_of(spec, problem), problem, default_tile, arch);
    CHECK(tiles.front() == default_tile);
    std::set<int> rows;
    for (const TileConfig& each : tiles) rows.insert(each.block_m);
    CHECK(rows == std::set<int>{16, 32, 64, 128});
    for (std::size_t i = 2; i < tiles.size(); ++i)
      CHECK(promising_cycles(spec, tiles[i - 1], problem) <= promising_cycles(spec, tiles[i], problem));
    // Rows that a block has beyond the problem's four are computed all the same.
    if (seqlen_q == 1) CHECK(tiles[1].block_m < tiles.back().block_m);
  }
}
