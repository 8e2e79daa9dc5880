// What samples tell: against values from tables and by hand.
#include <doctest/doctest.h>

#include <cmath>
#include <random>

#include "runtime/tuner/statistics.h"

using namespace flash_attn_jit;

namespace {

Sample sample(int round, double seconds) {
  Sample sample;
  sample.round = round;
  sample.seconds = seconds;
  return sample;
}

std::vector<double> one_to(int n) {
  std::vector<double> values;
  for (int i = 0; i < n; ++i) values.push_back((i * 7) % n + 1);  // 7 and n have no common divisor: each once, mixed
  return values;
}

RoundTimes times_of(const std::vector<double>& seconds, int first_round = 0) {
  RoundTimes times;
  for (std::size_t i = 0; i < seconds.size(); ++i) times[first_round + static_cast<int>(i)] = seconds[i];
  return times;
}

std::vector<double> around(double middle, double spread, int n, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<double> values;
  for (int i = 0; i < n; ++i) values.push_back(middle * (1 + spread * (random() / 4294967296.0 - 0.5)));
  return values;
}

}  // namespace

TEST_CASE("a median is the middle, or between the two middle ones") {
  CHECK(median({3}) == 3);
  CHECK(median({5, 1, 9}) == 5);
  CHECK(median({4, 1, 9, 2}) == 3);
}

TEST_CASE("the interval of a median has the ranks that tables of the sign test give") {
  struct Known {
    int n;
    double confidence;
    int rank;  // 0: none
  };
  // Of n values at 95 % (two-sided critical values of the sign test at 5 %, plus one) and at 99 %.
  for (const Known& known : {Known{5, 0.95, 0},
                             {6, 0.95, 1},
                             {8, 0.95, 1},
                             {9, 0.95, 2},
                             {12, 0.95, 3},
                             {15, 0.95, 4},
                             {17, 0.95, 5},
                             {20, 0.95, 6},
                             {25, 0.95, 8},
                             {30, 0.95, 10},
                             {50, 0.95, 18},
                             {99, 0.95, 40},
                             {7, 0.99, 0},
                             {8, 0.99, 1},
                             {11, 0.99, 1},
                             {12, 0.99, 2},
                             {20, 0.99, 4},
                             {30, 0.99, 8},
                             {50, 0.99, 16}}) {
    CAPTURE(known.n);
    CAPTURE(known.confidence);
    std::vector<double> values(static_cast<std::size_t>(known.n));
    for (int i = 0; i < known.n; ++i) values[static_cast<std::size_t>(i)] = known.n - i;
    const auto interval = median_interval(values, known.confidence);
    REQUIRE(interval.has_value() == (known.rank > 0));
    if (!interval) continue;
    CHECK(interval->low == known.rank);
    CHECK(interval->high == known.n + 1 - known.rank);
  }
  CHECK_FALSE(median_interval({}, 0.95));
  CHECK(least_rounds({}) == 8);
  CHECK(least_rounds({.confidence = 0.95}) == 6);
}

TEST_CASE("the interval holds the median as often as it says, whatever the distribution") {
  std::mt19937_64 random(7);
  int held = 0;
  constexpr int kTimes = 4000;
  for (int i = 0; i < kTimes; ++i) {
    std::vector<double> values;
    for (int j = 0; j < 17; ++j) values.push_back(-std::log((random() >> 11) * 0x1p-53 + 0x1p-60));  // exponential
    const auto interval = median_interval(values, 0.95).value();
    held += interval.low <= std::log(2.0) && std::log(2.0) <= interval.high;
  }
  const double share = static_cast<double>(held) / kTimes;  // exactly: 0.9510
  CHECK(share > 0.94);
  CHECK(share < 0.962);
}

TEST_CASE("a candidate's samples are summarised, too few of them by the least and the greatest") {
  Candidate candidate;
  summarise(candidate);
  CHECK_FALSE(candidate.median_seconds);
  for (const double seconds : one_to(5)) candidate.samples.push_back(sample(0, seconds));
  summarise(candidate);
  CHECK(candidate.median_seconds == 3);
  CHECK(candidate.low_seconds == 1);
  CHECK(candidate.high_seconds == 5);
  candidate.samples.clear();
  for (const double seconds : one_to(9)) candidate.samples.push_back(sample(0, seconds));
  summarise(candidate);
  CHECK(candidate.median_seconds == 5);
  CHECK(candidate.low_seconds == 2);
  CHECK(candidate.high_seconds == 8);
}

TEST_CASE("ratios are of rounds that both were in, with the mean of a round's bursts") {
  std::vector<Sample> samples;
  for (const auto& [round, seconds] : {std::pair{3, 2.0}, {3, 4.0}, {5, 8.0}}) {
    samples.push_back(sample(round, seconds));
  }
  const RoundTimes times = round_times(samples);
  CHECK(times == RoundTimes{{3, 3.0}, {5, 8.0}});
  CHECK(round_ratios(times, {{2, 1.0}, {3, 1.5}, {5, 4.0}, {9, 1.0}}) == std::vector<double>{2, 2});
  CHECK(round_ratios(times, {{4, 1.0}}).empty());
}

TEST_CASE("two candidates are told apart, tied or open") {
  const TellingRule rule;
  CHECK(standing(around(1.05, 0.02, 8, 1), rule) == Standing::kSlower);
  CHECK(standing(around(0.95, 0.02, 8, 1), rule) == Standing::kFaster);
  CHECK(standing(around(1.05, 0.02, 7, 1), rule) == Standing::kOpen);      // too few
  CHECK(standing(around(1.0, 0.04, 12, 1), rule) == Standing::kOpen);      // too noisy yet
  CHECK(standing(around(1.0, 0.04, 40, 1), rule) == Standing::kTied);      // enough of it
  CHECK(standing(around(1.001, 0.002, 12, 1), rule) == Standing::kTied);   // equal for all that matters
  CHECK(standing(around(1.003, 0.0005, 12, 1), rule) == Standing::kTied);  // surely slower, by too little
  CHECK(standing(around(1.008, 0.0005, 12, 1), rule) == Standing::kSlower);
}

TEST_CASE("a ranking is settled when each is told apart from the leader or tied with it") {
  const RoundTimes leader = times_of(around(1.0, 0.0005, 12, 1)), slower = times_of(around(1.1, 0.0005, 12, 2)),
                   equal = times_of(around(1.0, 0.0005, 12, 3)), open = times_of(around(1.1, 0.0005, 12, 4), 6);
  CHECK(is_settled(leader, {}));
  CHECK(is_settled(leader, {slower, equal}));
  CHECK_FALSE(is_settled(leader, {slower, equal, open}));  // six rounds in common
}
