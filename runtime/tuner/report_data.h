// What the records say, a row for each: the figures of every form of the report.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "runtime/tuner/record.h"

namespace flash_attn_jit {

// Two times are the same where they lie within this share of each other, whole intervals, whatever their order.
inline constexpr double kSameWithin = 0.02;

// The median of a candidate's samples, and its interval; of a prediction, which has no spread, what is predicted.
struct CandidateTime {
  double seconds, low, high;

  bool overlaps(const CandidateTime& other) const { return low <= other.high && other.low <= high; }
};

// Candidates that were not measured, of one outcome.
struct Rejection {
  Outcome outcome;
  std::size_t count = 0;
  std::vector<std::string> reasons;  // each once, as they came
};

struct ReportRow {
  TuningRecord record;                   // the rest follows from it
  bool in_use = true;                    // false: made with other templates than those here
  std::vector<std::string> differences;  // from here: "driver 12.4, here 13.0"

  // Nothing: not known.
  std::optional<CandidateTime> winner, default_tile;
  std::optional<TileConfig> runner_up_tile;  // the fastest beside the winner
  std::optional<CandidateTime> runner_up;
  std::optional<bool> told_apart;  // winner and runner-up: whether their intervals do not overlap; not of predictions

  double flops = 0;
  std::optional<double> tflops;         // of the winner's median
  std::optional<double> share_of_peak;  // of the card's peak, which is measured or predicted as the winner is
  std::optional<double> default_loss;   // 0.041: the default takes 4.1 % longer than the winner

  // The candidate that the model puts first, and what taking it would have lost.
  std::optional<TileConfig> predicted_tile;
  std::optional<double> predicted_loss;
  std::optional<double> predicted_over_measured;  // of the winner's time

  std::vector<Rejection> rejections;

  const Candidate& winning_candidate() const { return *record.candidate(record.winner); }
};

// What is here, as far as it is known: records are compared with it.
struct ReportPlace {
  std::optional<std::string> driver, nvrtc;  // as in TuningEnvironment
  std::optional<double> power_limit_watts;
};

ReportRow report_row(TuningRecord record, const ReportPlace& place, bool in_use);

enum class Verdict { kFaster, kSlower, kSame, kCannotTell, kOnlyBefore, kOnlyAfter };
std::string_view to_text(Verdict);

// One class of two sets of records.
struct ComparedClass {
  ProblemClass problem;
  Verdict verdict = Verdict::kCannotTell;
  std::string why;  // it cannot be told
  std::optional<TuningRecord> before, after;
  std::optional<double> change;  // after's seconds over before's, less 1
};

// Verdicts are of `after`. Classes meet by kernel, buckets, device and how they were measured; where each side has one
// device, whichever it is. Of several records of one class the newest counts.
std::vector<ComparedClass> compare_records(const std::vector<TuningRecord>& before,
                                           const std::vector<TuningRecord>& after);

}  // namespace flash_attn_jit
