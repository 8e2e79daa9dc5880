#include "runtime/tuner/statistics.h"

#include <algorithm>
#include <cmath>

namespace flash_attn_jit {
namespace {

// Of n tosses of a coin: exactly `heads`.
double probability_of(int heads, int n) {
  return std::exp(std::lgamma(n + 1.0) - std::lgamma(heads + 1.0) - std::lgamma(n - heads + 1.0) - n * std::log(2.0));
}

// The rank, from 1, of the lower end of the shortest interval with this confidence; 0 where n values give none.
int lower_rank(int n, double confidence) {
  double outside = 0;  // probability that the median lies below the value of rank `rank` + 1
  int rank = 0;
  while (rank < n / 2) {
    outside += probability_of(rank, n);
    if (1 - 2 * outside < confidence) break;
    ++rank;
  }
  return rank;
}

}  // namespace

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const std::size_t n = values.size();
  return n % 2 == 1 ? values[n / 2] : (values[n / 2 - 1] + values[n / 2]) / 2;
}

std::optional<Interval> median_interval(std::vector<double> values, double confidence) {
  const int rank = lower_rank(static_cast<int>(values.size()), confidence);
  if (rank == 0) return std::nullopt;
  std::sort(values.begin(), values.end());
  const auto from_end = static_cast<std::size_t>(rank);
  return Interval{values[from_end - 1], values[values.size() - from_end]};
}

void summarise(Candidate& candidate) {
  candidate.median_seconds = candidate.low_seconds = candidate.high_seconds = std::nullopt;
  if (candidate.samples.empty()) return;
  std::vector<double> seconds;
  for (const Sample& sample : candidate.samples) seconds.push_back(sample.seconds);
  const auto [least, most] = std::minmax_element(seconds.begin(), seconds.end());
  const Interval interval = median_interval(seconds, kRecordedConfidence).value_or(Interval{*least, *most});
  candidate.median_seconds = median(seconds);
  candidate.low_seconds = interval.low;
  candidate.high_seconds = interval.high;
}

RoundTimes round_times(const std::vector<Sample>& samples) {
  std::map<int, std::pair<double, int>> sums;
  for (const Sample& sample : samples) {
    sums[sample.round].first += sample.seconds;
    ++sums[sample.round].second;
  }
  RoundTimes times;
  for (const auto& [round, sum] : sums) times[round] = sum.first / sum.second;
  return times;
}

std::vector<double> round_ratios(const RoundTimes& a, const RoundTimes& b) {
  std::vector<double> ratios;
  for (const auto& [round, seconds] : a)
    if (const auto other = b.find(round); other != b.end()) ratios.push_back(seconds / other->second);
  return ratios;
}

Standing standing(const std::vector<double>& ratios, const TellingRule& rule) {
  const auto interval = median_interval(ratios, rule.confidence);
  if (!interval) return Standing::kOpen;
  const double middle = median(ratios), gap = 1 + rule.least_gap;
  if (interval->low > 1 && middle >= gap) return Standing::kSlower;
  if (interval->high < 1 && middle <= 1 / gap) return Standing::kFaster;
  if (interval->low > 1 / gap && interval->high < gap) return Standing::kTied;
  return static_cast<int>(ratios.size()) >= rule.most_rounds ? Standing::kTied : Standing::kOpen;
}

int least_rounds(const TellingRule& rule) {
  int rounds = 1;
  while (lower_rank(rounds, rule.confidence) == 0) ++rounds;
  return rounds;
}

bool is_settled(const RoundTimes& leader, const std::vector<RoundTimes>& others, const TellingRule& rule) {
  return std::none_of(others.begin(), others.end(), [&](const RoundTimes& other) {
    return standing(round_ratios(other, leader), rule) == Standing::kOpen;
  });
}

}  // namespace flash_attn_jit
