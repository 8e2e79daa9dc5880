#include "runtime/tuner/report_data.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <map>
#include <set>
#include <tuple>

#include "runtime/tuner/flops.h"

namespace flash_attn_jit {
namespace {

// Power limits that differ by less are one: NVML counts milliwatts.
constexpr double kSameWatts = 0.5;

std::optional<CandidateTime> time_of(const TuningRecord& record, const Candidate* candidate) {
  if (candidate == nullptr) return std::nullopt;
  if (record.key.policy.is_prediction()) {
    if (!candidate->predicted_seconds) return std::nullopt;
    return CandidateTime{*candidate->predicted_seconds, *candidate->predicted_seconds, *candidate->predicted_seconds};
  }
  if (!candidate->median_seconds) return std::nullopt;
  return CandidateTime{*candidate->median_seconds, candidate->low_seconds.value(), candidate->high_seconds.value()};
}

std::string watts_text(double watts) {
  char text[32];
  std::snprintf(text, sizeof text, "%g W", watts);
  return text;
}

std::vector<std::string> differences(const TuningEnvironment& there, const ReportPlace& here) {
  std::vector<std::string> found;
  if (here.driver && *here.driver != there.driver) found.push_back("driver " + there.driver + ", here " + *here.driver);
  if (here.nvrtc && *here.nvrtc != there.nvrtc) found.push_back(there.nvrtc + ", here " + *here.nvrtc);
  if (here.power_limit_watts && there.power_limit_watts &&
      std::fabs(*here.power_limit_watts - *there.power_limit_watts) > kSameWatts)
    found.push_back("power limit " + watts_text(*there.power_limit_watts) + ", here " +
                    watts_text(*here.power_limit_watts));
  return found;
}

std::vector<Rejection> rejections(const TuningRecord& record) {
  std::vector<Rejection> found;
  for (const Outcome outcome : kOutcomes) {
    Rejection rejection{outcome, 0, {}};
    for (const Candidate& candidate : record.candidates) {
      if (candidate.outcome != outcome || candidate.tile == record.winner) continue;
      ++rejection.count;
      if (!candidate.reason.empty() &&
          std::find(rejection.reasons.begin(), rejection.reasons.end(), candidate.reason) == rejection.reasons.end())
        rejection.reasons.push_back(candidate.reason);
    }
    if (outcome != Outcome::kMeasured && rejection.count > 0) found.push_back(std::move(rejection));
  }
  return found;
}

// The candidate of the least `seconds_of`, which may be nothing; null where all are.
template <class SecondsOf>
const Candidate* fastest(const TuningRecord& record, const SecondsOf& seconds_of) {
  const Candidate* best = nullptr;
  for (const Candidate& candidate : record.candidates) {
    const std::optional<double> seconds = seconds_of(candidate);
    if (seconds && (best == nullptr || *seconds < *seconds_of(*best))) best = &candidate;
  }
  return best;
}

void add_times(ReportRow& row) {
  const TuningRecord& record = row.record;
  row.winner = time_of(record, record.candidate(record.winner));
  if (!row.winner) return;
  row.default_tile = time_of(record, record.candidate(record.default_tile));
  if (row.default_tile) row.default_loss = row.default_tile->seconds / row.winner->seconds - 1;
  const Candidate* const second = fastest(record, [&](const Candidate& candidate) -> std::optional<double> {
    const auto time = time_of(record, &candidate);
    return candidate.tile == record.winner || !time ? std::nullopt : std::optional(time->seconds);
  });
  if (second == nullptr) return;
  row.runner_up_tile = second->tile;
  row.runner_up = time_of(record, second);
  if (!record.key.policy.is_prediction()) row.told_apart = !row.winner->overlaps(*row.runner_up);
}

void add_predicted(ReportRow& row) {
  const Candidate* const choice =
      fastest(row.record, [](const Candidate& candidate) { return candidate.predicted_seconds; });
  if (choice == nullptr) return;
  row.predicted_tile = choice->tile;
  if (!row.winner || row.record.key.policy.is_prediction()) return;
  if (choice->median_seconds) row.predicted_loss = *choice->median_seconds / row.winner->seconds - 1;
  if (const auto predicted = row.winning_candidate().predicted_seconds)
    row.predicted_over_measured = *predicted / row.winner->seconds;
}

using ClassKey = std::tuple<std::string, ProblemClass, MeasurementPolicy>;

std::map<ClassKey, TuningRecord> newest_by_class(const std::vector<TuningRecord>& records, bool by_device) {
  std::map<ClassKey, TuningRecord> newest;
  for (const TuningRecord& record : records) {
    const std::string device = by_device ? record.key.device.text() : "";
    const auto [known, is_new] = newest.try_emplace({device, record.key.problem, record.key.policy}, record);
    if (!is_new && known->second.when < record.when) known->second = record;
  }
  return newest;
}

std::set<TunedDevice> devices_of(const std::vector<TuningRecord>& records) {
  std::set<TunedDevice> devices;
  for (const TuningRecord& record : records) devices.insert(record.key.device);
  return devices;
}

bool is_one_problem(const TuningRecord& a, const TuningRecord& b) {
  const auto sizes = [](const TuningRecord& record) {
    return std::tuple(record.batch, record.num_heads, record.num_heads_k, record.seqlen_q, record.seqlen_k,
                      record.window_left, record.window_right);
  };
  return sizes(a) == sizes(b);
}

void judge(ComparedClass& compared) {
  const auto winner_time = [](const TuningRecord& record) { return time_of(record, record.candidate(record.winner)); };
  const auto before = winner_time(*compared.before), after = winner_time(*compared.after);
  if (!is_one_problem(*compared.before, *compared.after)) {
    compared.why = "they measured problems of other sizes";
    return;
  }
  if (!before || !after) {
    compared.why = "no time is known";
    return;
  }
  compared.change = after->seconds / before->seconds - 1;
  const double most = std::max(before->high, after->high), least = std::min(before->low, after->low);
  if (most <= least * (1 + kSameWithin))
    compared.verdict = Verdict::kSame;
  else if (!before->overlaps(*after))
    compared.verdict = after->seconds < before->seconds ? Verdict::kFaster : Verdict::kSlower;
  else
    compared.why = "their intervals overlap";
}

}  // namespace

ReportRow report_row(TuningRecord record, const ReportPlace& place, bool in_use) {
  ReportRow row;
  row.record = std::move(record);
  row.in_use = in_use;
  const TuningRecord& r = row.record;
  row.differences = differences(r.environment, place);
  row.rejections = rejections(r);
  row.flops = flops(r);
  add_times(row);
  add_predicted(row);
  if (row.winner) row.tflops = row.flops / row.winner->seconds / 1e12;
  if (row.tflops && r.environment.peak_tflops) row.share_of_peak = *row.tflops / *r.environment.peak_tflops;
  return row;
}

std::string_view to_text(Verdict verdict) {
  switch (verdict) {
    case Verdict::kFaster:
      return "faster";
    case Verdict::kSlower:
      return "slower";
    case Verdict::kSame:
      return "same";
    case Verdict::kCannotTell:
      return "cannot be told";
    case Verdict::kOnlyBefore:
      return "only before";
    case Verdict::kOnlyAfter:
      return "only after";
  }
  return {};
}

std::vector<ComparedClass> compare_records(const std::vector<TuningRecord>& before,
                                           const std::vector<TuningRecord>& after) {
  const bool by_device = devices_of(before).size() > 1 || devices_of(after).size() > 1;
  const auto left = newest_by_class(before, by_device), right = newest_by_class(after, by_device);
  std::set<ClassKey> keys;
  for (const auto* side : {&left, &right})
    for (const auto& entry : *side) keys.insert(entry.first);
  std::vector<ComparedClass> compared;
  for (const ClassKey& key : keys) {
    ComparedClass each;
    each.problem = std::get<ProblemClass>(key);
    if (const auto found = left.find(key); found != left.end()) each.before = found->second;
    if (const auto found = right.find(key); found != right.end()) each.after = found->second;
    if (each.before && each.after)
      judge(each);
    else
      each.verdict = each.before ? Verdict::kOnlyBefore : Verdict::kOnlyAfter;
    compared.push_back(std::move(each));
  }
  return compared;
}

}  // namespace flash_attn_jit
