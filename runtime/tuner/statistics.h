// What samples tell: medians with an interval, and whether one candidate is faster than another. Deterministic.
#pragma once

#include <map>
#include <optional>
#include <vector>

#include "runtime/tuner/record.h"

namespace flash_attn_jit {

double median(std::vector<double> values);  // of one value or more

struct Interval {
  double low = 0, high = 0;
};

// Where the median of what `values` were drawn from lies, with this confidence at least, whatever their distribution:
// between two of them, as many ranks from the least as from the greatest. Nothing where they are too few: 95 % takes 6.
std::optional<Interval> median_interval(std::vector<double> values, double confidence);

// As a record gives it.
inline constexpr double kRecordedConfidence = 0.95;

// Sets the median and its interval of what was sampled; where samples are too few for one, it is all of them.
void summarise(Candidate& candidate);

// The mean of a candidate's bursts in each round that it took part in.
using RoundTimes = std::map<int, double>;
RoundTimes round_times(const std::vector<Sample>& samples);

// `a` through `b`, in every round that both took part in: a clock that sinks from round to round divides out.
std::vector<double> round_ratios(const RoundTimes& a, const RoundTimes& b);

// When two candidates can be told apart. More confidence than a record's interval has, because the question is asked
// after every round.
struct TellingRule {
  double confidence = 0.99;
  double least_gap = 0.005;  // what differs by less is as good as equal
  int most_rounds = 40;      // what these do not tell apart is equal
};

enum class Standing {
  kFaster,
  kSlower,
  kTied,  // equal, or not to be told apart
  kOpen,  // more rounds may tell
};

// How `a` stands to `b`, of round_ratios(a, b).
Standing standing(const std::vector<double>& ratios, const TellingRule& rule = {});

// The rounds without which standing() is open.
int least_rounds(const TellingRule& rule);

// Whether more rounds would change nothing: each of `others` is told apart from `leader`, or tied with it.
bool is_settled(const RoundTimes& leader, const std::vector<RoundTimes>& others, const TellingRule& rule = {});

}  // namespace flash_attn_jit
