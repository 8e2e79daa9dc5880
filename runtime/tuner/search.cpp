#include "runtime/tuner/search.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <random>

#include "generator/tile_layout.h"
#include "runtime/system/interrupt.h"

namespace flash_attn_jit {
namespace {

// Warm-up: bursts of the default until this many in a row lie this close together, at most this share of the budget.
constexpr int kAgreeingBursts = 3;
constexpr double kAgreement = 0.01;
constexpr double kMostWarmUpShare = 0.1, kMostWarmUpSeconds = 3;
// A device that did nothing for so long has to be warmed up again.
constexpr double kIdleSeconds = 0.25;

// Beside the leader, at most so many new candidates enter a round.
constexpr int kNewAtOnce = 4;

// The last part of a budget: nothing is compiled and nobody comes in, and the best so far race on until they can be
// told apart.
constexpr double kFinalShare = 0.3;
constexpr std::size_t kFinalists = 5;  // the default, which races anyway, not among them

// Where a budget ends before rounds are enough for confidence: that many, and faster in each of them.
constexpr std::size_t kFewRounds = 4;

constexpr int kMostLaunches = 4096;

// What a candidate may take before it counts as hanging. Of a burst: so many times what it is expected to take.
constexpr double kLeastLimitSeconds = 2;
constexpr double kMostLimitSeconds = 60;
constexpr double kLimitFactor = 20;

enum class Stage {
  kWaiting,  // for the compiler's attention
  kCompiling,
  kCompiled,
  kRacing,  // takes part in the rounds
  kSlower,  // told apart from the leader
  kOut,     // its outcome says why
};

struct Entry {
  Candidate found;
  Stage stage = Stage::kWaiting;
  bool was_known = false;
  CompiledCandidate compiled;
  int launches = 1;          // of a burst
  double burst_seconds = 0;  // as expected
};

std::string number_text(const char* format, double value) {
  char text[48];
  std::snprintf(text, sizeof text, format, value);
  return text;
}

std::string percent_text(double ratio) { return number_text("%.1f %%", std::fabs(ratio) * 100); }

std::string milliseconds_text(double seconds) { return number_text("%.4g ms", seconds * 1e3); }

bool has_failed(const Candidate& candidate) {
  return candidate.outcome != Outcome::kMeasured && candidate.outcome != Outcome::kNotReached;
}

class TileSearch {
 public:
  TileSearch(const SearchTask& task, const SearchParts& parts, const SearchSettings& settings)
      : task_(task), parts_(parts), settings_(settings), random_(settings.seed), start_(parts.clock.now()) {
    const auto width = [&](std::int64_t side) { return side < 0 ? task.record.seqlen_k : side; };
    problem_ = {task.record.seqlen_q, task.record.seqlen_k, task.record.batch * task.record.num_heads,
                task.multiprocessors, width(task.record.window_left) + width(task.record.window_right) + 1};
    round_ = task.known ? task.known->rounds : 0;
    last_publish_ = start_;
    for (const TileConfig& tile : task.tiles) add(tile);
    if (task.known)
      for (const Candidate& candidate : task.known->candidates) take_over(candidate);
    rejoin_undecided();
    foresee();
  }

  SearchResult run() {
    bool interrupted = false;
    if (has_work()) try {
        search();
      } catch (const Interrupted&) {
        forget_round(round_);
        interrupted = true;
      }
    return result(interrupted);
  }

 private:
  // ---- what is known before ----

  void add(const TileConfig& tile) {
    if (find(tile) != nullptr) return;
    Entry entry;
    entry.found.tile = tile;
    entries_.push_back(std::move(entry));
  }

  Entry* find(const TileConfig& tile) {
    for (Entry& entry : entries_)
      if (entry.found.tile == tile) return &entry;
    return nullptr;
  }

  void take_over(const Candidate& candidate) {
    add(candidate.tile);
    Entry& entry = *find(candidate.tile);
    if (candidate.outcome == Outcome::kNotReached) return;
    entry.found = candidate;
    entry.was_known = true;
    entry.stage = has_failed(candidate) ? Stage::kOut : Stage::kSlower;
  }

  // What was measured before and can still win races on: of a search that ended early, or a winner beside what is new.
  void rejoin_undecided() {
    if (!task_.known) return;
    Entry* const winner = find(task_.known->winner);
    std::vector<Entry*> back;
    for (Entry& entry : entries_)
      if (entry.stage == Stage::kSlower && &entry != winner && is_undecided(entry, *winner)) back.push_back(&entry);
    if (back.empty() && !has_work()) return;
    back.push_back(winner);
    back.push_back(find(task_.record.default_tile));
    for (Entry* entry : back)
      if (entry->stage == Stage::kSlower) entry->stage = Stage::kWaiting;
  }

  bool is_undecided(const Entry& entry, const Entry& winner) const {
    return !was_beaten(entry) && standing(ratios(entry, winner), settings_.telling) == Standing::kOpen;
  }

  // By any of the others, whoever led then.
  bool was_beaten(const Entry& entry) const {
    return std::any_of(entries_.begin(), entries_.end(), [&](const Entry& other) {
      return other.stage == Stage::kSlower && &other != &entry && is_told_apart(ratios(entry, other));
    });
  }

  bool has_work() const {
    return std::any_of(entries_.begin(), entries_.end(), [](const Entry& e) { return e.stage == Stage::kWaiting; });
  }

  // A model that can tell before anything is compiled orders the rest; the default and what rejoins stay in front.
  void foresee() {
    if (parts_.model == nullptr) return;
    for (Entry& entry : entries_)
      if (entry.stage == Stage::kWaiting) take_prediction(entry, nullptr);
    std::stable_sort(entries_.begin(), entries_.end(),
                     [this](const Entry& a, const Entry& b) { return rank_of(a) < rank_of(b); });
    for (Entry& entry : entries_)
      if (entry.stage == Stage::kWaiting && !must_take_part(entry)) prune(entry);
  }

  std::pair<int, double> rank_of(const Entry& entry) const {
    if (entry.found.tile == task_.record.default_tile) return {0, 0};
    if (entry.was_known) return {1, 0};
    return entry.found.predicted_seconds ? std::pair(2, *entry.found.predicted_seconds) : std::pair(3, 0.0);
  }

  void take_prediction(Entry& entry, const CompiledKernel* kernel) {
    if (parts_.model == nullptr) return;
    KernelSpec spec = task_.record.key.problem.spec;
    spec.tile = entry.found.tile;
    const auto prediction = parts_.model->predict(spec, problem_, kernel);
    if (!prediction) return;
    entry.found.predicted_seconds = prediction->seconds;
    entry.found.limited_by = prediction->limited_by;
  }

  bool must_take_part(const Entry& entry) const {
    return entry.was_known || entry.found.tile == task_.record.default_tile;
  }

  void prune(Entry& entry) {
    if (!entry.found.predicted_seconds) return;
    const Entry* best = nullptr;
    for (const Entry& other : entries_)
      if (other.found.predicted_seconds && !has_failed(other.found) &&
          (best == nullptr || *other.found.predicted_seconds < *best->found.predicted_seconds))
        best = &other;
    if (best == nullptr) return;
    const double factor = *entry.found.predicted_seconds / *best->found.predicted_seconds;
    if (factor <= settings_.prune_factor) return;
    leave(entry, Outcome::kPruned,
          "predicted " + milliseconds_text(*entry.found.predicted_seconds) + ", " + number_text("%.2f", factor) +
              " times the " + milliseconds_text(*best->found.predicted_seconds) + " of " + best->found.tile.text() +
              (entry.found.limited_by.empty() ? "" : ", limited by " + entry.found.limited_by));
  }

  // ---- the search ----

  void search() {
    for (;;) {
      throw_if_interrupted();
      feed_compiler();
      collect(0);
      const bool came_in = !is_final() && admit();
      const std::vector<Entry*> next = starters();
      if (anchor_ != nullptr && need_rounds(next)) {
        if (!fits(round_seconds(next))) return;
        race(next);
        publish_now_and_then();
      } else if (is_final() || (!came_in && !wait_for_compiler())) {
        return;
      }
      if (remaining() <= 0) return;
    }
  }

  bool is_final() const { return anchor_ != nullptr && remaining() < kFinalShare * settings_.budget_seconds; }

  double elapsed() const { return parts_.clock.now() - start_; }
  double remaining() const { return settings_.budget_seconds - elapsed(); }
  bool fits(double seconds) const { return seconds <= remaining(); }

  // A limit for something on the device, within the budget.
  double limit(double expected) const {
    const double most = std::clamp(kLimitFactor * expected, kLeastLimitSeconds, kMostLimitSeconds);
    return std::clamp(most, 0.0, std::max(remaining(), 0.0));
  }

  // ---- compiling ----

  void feed_compiler() {
    int running = count(Stage::kCompiling);
    for (Entry& entry : entries_) {
      if (running >= parts_.compiler.most_at_once()) return;
      if (entry.stage != Stage::kWaiting) continue;
      // It cannot be called back.
      if (anchor_ != nullptr && elapsed() + expected_compile_seconds() > (1 - kFinalShare) * settings_.budget_seconds)
        return;
      KernelSpec spec = task_.record.key.problem.spec;
      spec.tile = entry.found.tile;
      parts_.compiler.start(spec);
      entry.stage = Stage::kCompiling;
      ++running;
      show("compiling", entry);
    }
  }

  double expected_compile_seconds() const { return compiled_ == 0 ? 0 : 1.5 * compile_seconds_ / compiled_; }

  // Takes what is compiled, after a wait for the first where nothing is. Whether there was any.
  bool collect(double wait_seconds) {
    bool any = false;
    while (auto compiled = parts_.compiler.next(any ? 0 : wait_seconds)) {
      any = true;
      Entry* const entry = find(compiled->tile);
      if (entry == nullptr || entry->stage != Stage::kCompiling) continue;
      take_compiled(*entry, *std::move(compiled));
    }
    return any;
  }

  void take_compiled(Entry& entry, CompiledCandidate compiled) {
    if (!compiled.kernel) return leave(entry, Outcome::kCompileFailed, compiled.failure);
    const CompiledKernel& kernel = *compiled.kernel;
    entry.found.registers = kernel.resources.registers;
    entry.found.spill_stores = kernel.resources.spill_stores;
    entry.found.spill_loads = kernel.resources.spill_loads;
    entry.found.static_smem = kernel.resources.static_smem;
    entry.found.dynamic_smem = kernel.dynamic_smem;
    entry.found.threads = kernel.threads;
    entry.found.compile_seconds = kernel.seconds;
    entry.found.blocks_per_multiprocessor = blocks_per_multiprocessor(entry.found.tile);
    ++compiled_;
    compile_seconds_ += kernel.seconds;
    entry.stage = Stage::kCompiled;
    take_prediction(entry, &kernel);
    entry.compiled = std::move(compiled);
  }

  // False: nothing is to come in time.
  bool wait_for_compiler() { return count(Stage::kCompiling) > 0 && collect(std::max(remaining(), 0.0)); }

  int count(Stage stage) const {
    return static_cast<int>(
        std::count_if(entries_.begin(), entries_.end(), [stage](const Entry& e) { return e.stage == stage; }));
  }

  // ---- admitting ----

  // Checks what is compiled, the likely ones first, and lets it race. Nobody before the default, whose result is what
  // others are compared with. Whether there was any that time was left for.
  bool admit() {
    bool any = false;
    for (int admitted = 0; admitted < kNewAtOnce;) {
      Entry* const entry = next_compiled();
      if (entry == nullptr || remaining() <= 0 || !fits(check_seconds_)) break;
      any = true;
      if (!must_take_part(*entry)) {
        prune(*entry);
        if (entry->stage == Stage::kOut) continue;
      }
      if (check(*entry) && estimate(*entry)) {
        entry->stage = Stage::kRacing;
        entry->found.outcome = Outcome::kMeasured;
        entry->found.reason.clear();
        if (anchor_ == nullptr) anchor_ = entry;
        ++admitted;
      }
    }
    return any;
  }

  Entry* next_compiled() {
    Entry& anchor = *find(task_.record.default_tile);
    if (anchor.stage == Stage::kCompiled) return &anchor;
    if (anchor.stage == Stage::kWaiting || anchor.stage == Stage::kCompiling) return nullptr;
    Entry* best = nullptr;
    for (Entry& entry : entries_)
      if (entry.stage == Stage::kCompiled && (best == nullptr || rank_of(entry) < rank_of(*best))) best = &entry;
    return best;
  }

  bool check(Entry& entry) {
    show("checking", entry);
    is_warm_ = false;  // the device waits while results are compared
    const double begin = elapsed();
    // Nobody knows how long the first takes: it sets everything up.
    const double most = check_seconds_ > 0 ? limit(check_seconds_) : limit(kMostLimitSeconds);
    const bool was_cut = most + 1e-9 >= remaining();
    const CheckedCandidate checked = parts_.device.check(entry.compiled, most);
    check_seconds_ = std::max(check_seconds_, checked.fault ? 0 : elapsed() - begin);
    entry.found.error = checked.error;
    entry.found.error_allowed = checked.error_allowed;
    if (checked.blocks_per_multiprocessor > 0)
      entry.found.blocks_per_multiprocessor = checked.blocks_per_multiprocessor;
    return !checked.fault || leave(entry, *checked.fault, was_cut);
  }

  // Finds how many launches make a burst. The first launch is cold and says nothing.
  bool estimate(Entry& entry) {
    show("measuring", entry);
    int launches = 1;
    double seconds = 0;
    for (int i = 0;; ++i) {
      const TimedBurst burst = time(entry, launches, 0.1);
      if (entry.stage == Stage::kOut) return false;
      seconds = std::max(burst.sample.seconds, 1e-9);
      const int wanted =
          static_cast<int>(std::clamp(std::round(settings_.burst_seconds / seconds), 1.0, double{kMostLaunches}));
      if (i > 0 && 2 * launches >= wanted) {
        entry.launches = wanted;
        entry.burst_seconds = seconds * wanted;
        return true;
      }
      if (i > 0) launches = std::min(wanted, 16 * launches);
    }
  }

  TimedBurst time(Entry& entry, int launches, double expected_seconds) {
    const double most = limit(expected_seconds);
    const bool was_cut = most + 1e-9 >= remaining();
    TimedBurst burst = parts_.device.time(entry.compiled, launches, most);
    last_burst_ = elapsed();
    collect(0);
    feed_compiler();
    if (burst.fault) leave(entry, *burst.fault, was_cut);
    return burst;
  }

  bool leave(Entry& entry, const CandidateFault& fault, bool limit_was_cut) {
    // It was given less time than it may take: that says nothing about it.
    if (fault.outcome == Outcome::kTimedOut && limit_was_cut)
      leave(entry, Outcome::kNotReached, "the budget ended while it ran");
    else
      leave(entry, fault.outcome, fault.reason);
    return false;
  }

  void leave(Entry& entry, Outcome outcome, const std::string& reason) {
    entry.stage = Stage::kOut;
    entry.found.outcome = outcome;
    entry.found.reason = reason;
    entry.compiled = {};
    if (&entry == anchor_) choose_anchor();
  }

  // Where the default fails, another one stands in as what all are compared with.
  void choose_anchor() {
    anchor_ = nullptr;
    for (Entry& entry : entries_)
      if (entry.stage == Stage::kRacing && anchor_ == nullptr) anchor_ = &entry;
  }

  // ---- racing ----

  std::vector<Entry*> racing() {
    std::vector<Entry*> entries;
    for (Entry& entry : entries_)
      if (entry.stage == Stage::kRacing) entries.push_back(&entry);
    return entries;
  }

  // Those that the next round is for.
  std::vector<Entry*> starters() {
    std::vector<Entry*> entries = racing();
    if (!is_final() || entries.size() <= kFinalists + 1) return entries;
    const auto order = [this](const Entry* entry) { return std::pair(entry != anchor_, ratio_to_anchor(*entry)); };
    std::stable_sort(entries.begin(), entries.end(),
                     [&](const Entry* a, const Entry* b) { return order(a) < order(b); });
    entries.resize(kFinalists + 1);
    return entries;
  }

  static double round_seconds(const std::vector<Entry*>& entries) {
    double seconds = 0;
    for (const Entry* entry : entries) seconds += 2 * entry->burst_seconds;
    return seconds;
  }

  void race(const std::vector<Entry*>& entries) {
    warm_up();
    std::vector<Entry*> order = shuffled(entries);
    for (int turn = 0; turn < 2; ++turn) {
      for (Entry* entry : order) measure(*entry);
      std::reverse(order.begin(), order.end());
    }
    if (anchor_ == nullptr) return;
    ++round_;
    drop_the_slow();
  }

  void measure(Entry& entry) {
    if (entry.stage != Stage::kRacing) return;
    throw_if_interrupted();
    show("measuring", entry);
    TimedBurst burst = time(entry, entry.launches, entry.burst_seconds);
    if (entry.stage == Stage::kOut) return forget_round(entry, round_);
    burst.sample.round = round_;
    entry.burst_seconds = burst.sample.seconds * entry.launches;
    entry.found.samples.push_back(std::move(burst.sample));
  }

  std::vector<Entry*> shuffled(std::vector<Entry*> entries) {
    for (std::size_t i = entries.size(); i > 1; --i) std::swap(entries[i - 1], entries[random_() % i]);
    return entries;
  }

  void warm_up() {
    if (last_burst_ && elapsed() - *last_burst_ < kIdleSeconds && is_warm_) return;
    const double end = elapsed() + std::min(kMostWarmUpSeconds, kMostWarmUpShare * settings_.budget_seconds);
    std::vector<double> bursts;
    while (anchor_ != nullptr && elapsed() < end) {
      show("warming up", *anchor_);
      bursts.push_back(time(*anchor_, anchor_->launches, anchor_->burst_seconds).sample.seconds);
      if (bursts.size() < kAgreeingBursts) continue;
      const auto [least, most] = std::minmax_element(bursts.end() - kAgreeingBursts, bursts.end());
      if (*most <= *least * (1 + kAgreement)) break;
    }
    is_warm_ = true;
  }

  // A round that was broken off says nothing: some had two turns of it and some one.
  static void forget_round(Entry& entry, int round) {
    std::erase_if(entry.found.samples, [round](const Sample& sample) { return sample.round == round; });
  }
  void forget_round(int round) {
    for (Entry& entry : entries_) forget_round(entry, round);
  }

  // What one took through what the other took, in every round that both were in.
  static std::vector<double> ratios(const Entry& entry, const Entry& other) {
    return round_ratios(round_times(entry.found.samples), round_times(other.found.samples));
  }

  double ratio_to_anchor(const Entry& entry) const {
    const std::vector<double> in_rounds = ratios(entry, *anchor_);
    return in_rounds.empty() ? std::numeric_limits<double>::infinity() : median(in_rounds);
  }

  bool is_hopeless(const std::vector<double>& ratios) const {
    return ratios.size() >= 2 && *std::min_element(ratios.begin(), ratios.end()) >= settings_.hopeless_factor;
  }

  void drop_the_slow() {
    const Entry* const leader = find_leader();
    for (Entry* entry : racing()) {
      if (entry == anchor_ || entry == leader || !is_told_apart(ratios(*entry, *leader))) continue;
      entry->stage = Stage::kSlower;
      entry->compiled = {};
    }
  }

  // The least median of ratios to the anchor, which is in every round.
  Entry* find_leader() {
    Entry* leader = anchor_;
    double least = 1;
    for (Entry* entry : racing()) {
      if (entry == anchor_) continue;
      const double ratio = ratio_to_anchor(*entry);
      if (ratio < least ||
          (ratio == least && leader != anchor_ && entry->found.tile.text() < leader->found.tile.text())) {
        leader = entry;
        least = ratio;
      }
    }
    return leader;
  }

  bool need_rounds(const std::vector<Entry*>& entries) {
    const auto rounds = [](const Entry* entry) { return round_times(entry->found.samples).size(); };
    const auto least = static_cast<std::size_t>(least_rounds(settings_.telling));
    if (std::any_of(entries.begin(), entries.end(), [&](const Entry* e) { return rounds(e) < least; })) return true;
    const Entry* const leader = find_leader();
    std::vector<RoundTimes> others;
    for (const Entry* entry : entries)
      if (entry != leader) others.push_back(round_times(entry->found.samples));
    return !is_settled(round_times(leader->found.samples), others, settings_.telling);
  }

  // ---- the end ----

  struct Decision {
    TileConfig winner;
    std::string rule;
  };

  // Who wins by what was measured: of those that are known to be no slower than the anchor the one with the least
  // median ratio to it, or the anchor where it cannot be told apart from that one. What differs from the winner by less
  // than the least gap is as good, and the smallest name stands for all of them.
  Decision decide() {
    std::vector<Entry*> contenders{anchor_};
    int unknown = 0;  // perhaps faster than the anchor, and in too few rounds
    for (Entry* entry : racing()) {
      if (entry == anchor_) continue;
      if (is_known(*entry))
        contenders.push_back(entry);
      else
        unknown += ratio_to_anchor(*entry) < 1;
    }
    const Entry* const leader = *std::min_element(contenders.begin(), contenders.end(), [this](Entry* a, Entry* b) {
      return ratio_to_anchor(*a) < ratio_to_anchor(*b);
    });
    std::vector<const Entry*> tied{leader};
    for (const Entry* entry : contenders)
      if (entry != leader && (is_as_good(*entry, *leader) || (entry == anchor_ && !is_slower(*entry, *leader))))
        tied.push_back(entry);
    const Entry& winner = choose(tied);
    return {winner.found.tile, rule_text(winner, *leader, tied, unknown)};
  }

  // Whether an entry's rounds say how it stands to the anchor.
  bool is_known(const Entry& entry) const {
    return median_interval(ratios(entry, *anchor_), settings_.telling.confidence) || is_slower(*anchor_, entry);
  }

  bool is_as_good(const Entry& entry, const Entry& leader) const {
    const std::vector<double> in_rounds = ratios(entry, leader);
    return !in_rounds.empty() && median(in_rounds) <= 1 + settings_.telling.least_gap && !is_told_apart(in_rounds);
  }

  // Told apart, or by a few rounds that all say so.
  bool is_slower(const Entry& entry, const Entry& other) const {
    const std::vector<double> in_rounds = ratios(entry, other);
    return is_told_apart(in_rounds) ||
           (in_rounds.size() >= kFewRounds &&
            *std::min_element(in_rounds.begin(), in_rounds.end()) >= 1 + settings_.telling.least_gap);
  }

  bool is_told_apart(const std::vector<double>& ratios) const {
    return is_hopeless(ratios) || standing(ratios, settings_.telling) == Standing::kSlower;
  }

  // Of those that are tied: the default, then the smaller name.
  const Entry& choose(const std::vector<const Entry*>& tied) const {
    const auto order = [this](const Entry* entry) {
      return std::pair(entry->found.tile != task_.record.default_tile, entry->found.tile.text());
    };
    return **std::min_element(tied.begin(), tied.end(),
                              [&](const Entry* a, const Entry* b) { return order(a) < order(b); });
  }

  std::string rule_text(const Entry& winner, const Entry& leader, const std::vector<const Entry*>& tied,
                        int unknown) const {
    std::string text;
    if (winner.found.tile != task_.record.default_tile)
      text = winner_text(winner, leader, tied.size());
    else if (tied.size() > 1)
      text = "the default, which cannot be told apart from " + count_text(tied.size() - 1, "other");
    else
      text = unknown == 0 ? "the default has the lowest median" : "the default";
    if (unknown > 0) text += "; " + count_text(unknown, "other") + " may be faster and had too few rounds to tell";
    return text;
  }

  std::string winner_text(const Entry& winner, const Entry& leader, std::size_t tied) const {
    std::string text = &winner == &leader ? "lowest median" : "as good as the lowest median";
    if (anchor_->found.tile != task_.record.default_tile)
      text += "; the default failed";
    else
      text += ", " + percent_text(1 - ratio_to_anchor(winner)) + " below the default's in the same rounds";
    if (tied > 1)
      text += "; the smallest name among " + std::to_string(tied) + " that differ by less than " +
              percent_text(settings_.telling.least_gap) +
              (&winner == &leader ? "" : " from " + leader.found.tile.text());
    return text;
  }

  static std::string count_text(std::size_t count, const std::string& noun) {
    return std::to_string(count) + " " + noun + (count == 1 ? "" : "s");
  }

  TuningRecord record(const Decision& decision) {
    TuningRecord record = task_.record;
    record.when = parts_.clock.utc_time();
    record.seconds = elapsed() + (task_.known ? task_.known->seconds : 0);
    record.winner = decision.winner;
    record.rule = decision.rule;
    record.rounds = round_;
    if (task_.known) record.others = task_.known->others;
    for (const Entry& entry : entries_) record.candidates.push_back(as_recorded(entry.found));
    return record;
  }

  static Candidate as_recorded(Candidate candidate) {
    if (candidate.outcome == Outcome::kMeasured && candidate.samples.empty()) candidate.outcome = Outcome::kNotReached;
    if (candidate.outcome == Outcome::kNotReached && candidate.reason.empty())
      candidate.reason = "the search ended before it";
    candidate.median_seconds = candidate.low_seconds = candidate.high_seconds = std::nullopt;
    if (candidate.outcome == Outcome::kMeasured) summarise(candidate);
    return candidate;
  }

  SearchResult result(bool interrupted) {
    SearchResult result;
    result.interrupted = interrupted;
    result.settled = !interrupted && is_all_settled();
    for (const Entry& entry : entries_)
      result.newly_measured += !entry.was_known && !entry.found.samples.empty() ? 1 : 0;
    if (anchor_ == nullptr || anchor_->found.samples.empty()) {
      // Nothing new: what was known stays as it is.
      result.record = task_.known;
      if (!task_.known) result.reason = why_nothing();
      return result;
    }
    Decision decision = decide();
    if (!result.settled)
      decision.rule += interrupted ? "; interrupted before the ranking was settled"
                                   : "; the budget ended before the ranking was settled";
    result.record = record(decision);
    if (parts_.records != nullptr) parts_.records->publish(*result.record);
    return result;
  }

  bool is_all_settled() {
    if (count(Stage::kWaiting) + count(Stage::kCompiling) + count(Stage::kCompiled) > 0) return false;
    for (const Entry& entry : entries_)
      if (entry.stage == Stage::kOut && entry.found.outcome == Outcome::kNotReached) return false;
    return anchor_ == nullptr || !need_rounds(racing());
  }

  std::string why_nothing() const {
    std::string reasons;
    for (const Entry& entry : entries_)
      if (has_failed(entry.found) && reasons.size() < 2000)
        reasons += (reasons.empty() ? "" : "; ") + entry.found.tile.text() + ": " + entry.found.reason;
    if (!reasons.empty()) return "no tile could be measured: " + reasons;
    return "the end came before the default tile was measured, after " + number_text("%.1f", elapsed()) +
           " s of a budget of " + number_text("%g", settings_.budget_seconds) + " s";
  }

  void publish_now_and_then() {
    if (parts_.records == nullptr || parts_.clock.now() - last_publish_ < settings_.publish_every_seconds) return;
    if (anchor_ == nullptr || anchor_->found.samples.empty()) return;
    Decision decision = decide();
    decision.rule += "; the search goes on";
    parts_.records->publish(record(decision));
    last_publish_ = parts_.clock.now();
  }

  void show(const char* doing, const Entry& entry) {
    if (parts_.watcher == nullptr) return;
    SearchProgress progress{.doing = doing, .tile = entry.found.tile, .leader = std::nullopt};
    if (anchor_ != nullptr && !anchor_->found.samples.empty()) {
      const Entry* const leader = find_leader();
      progress.leader = leader->found.tile;
      progress.leader_seconds = leader->found.samples.back().seconds;
      progress.default_seconds = anchor_->found.samples.back().seconds;
    }
    progress.decided = count(Stage::kSlower) + count(Stage::kOut);
    progress.candidates = static_cast<int>(entries_.size());
    progress.round = round_;
    progress.seconds = elapsed();
    progress.budget_seconds = settings_.budget_seconds;
    parts_.watcher->show(progress);
  }

  const SearchTask& task_;
  const SearchParts& parts_;
  const SearchSettings& settings_;
  std::mt19937_64 random_;
  Problem problem_;
  std::vector<Entry> entries_;  // its size is fixed once the search runs
  Entry* anchor_ = nullptr;     // takes part in every round: the default, if it works
  int round_ = 0;
  double start_, last_publish_ = 0;
  std::optional<double> last_burst_;
  bool is_warm_ = false;
  int compiled_ = 0;
  double compile_seconds_ = 0;
  double check_seconds_ = 0;
};

}  // namespace

SearchResult search_tiles(const SearchTask& task, const SearchParts& parts, const SearchSettings& settings) {
  return TileSearch(task, parts, settings).run();
}

}  // namespace flash_attn_jit
