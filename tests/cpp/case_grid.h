// The grid of cases that both passes are tested over: everything a case is made of, but for its tiles.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdio>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "forward_case.h"
#include "runtime/system/sanitizers.h"

namespace flash_attn_jit::testing {

// Head dims of every class that the code tells apart, at least one of each. Classes: whether rows can be read 16 bytes
// at a time (8), how many of an operand load's 32 dims are left in the last one, whether the last dim stands alone in
// its pair, on which side of 128, where gradients are split; and every row of the tables of default tiles.
const std::vector<int>& head_dims();

// A case's choices, as indices into lists of values.
enum Factor {
  kDimChoice,
  kValues,  // v's head dim, the first value is q's
  kDTypeChoice,
  kVisible,     // the mask, a window's widths with it
  kAdjustment,  // softcap, ALiBi, attn_bias, dropout
  kSink,
  kSequences,  // one length for all, or cu_seqlens
  kGroup,
  kSeqlenQ,
  kSeqlenK,
  kLayout,  // the first kAlignedLayouts of them allow 16-byte accesses
  kInput,
  kScale,
  kFactors
};
constexpr int kAlignedLayouts = 3;
using Choice = std::array<int, kFactors>;

// How many values each factor has.
Choice sizes();

ForwardCase make_case(const Choice& choice);

// Every factor open (-1) but the head dim, an index of head_dims(), which is v's too; -1 leaves both open.
Choice only(int head_dim);

// The same with every combination of what else default tiles depend on: mask, features, kind of access, dtype, whether
// heads share keys. Kinds of attn_bias and dropout take turns.
std::vector<Choice> choices_of_tiles(int head_dim);

// Every head dim and mask with every length of queries, every length of keys, and every fourth pair of the two, so that
// a pair meets a quarter of the head dims. What else makes another kernel (group, features, kind of access) takes
// turns, once for each head dim and mask: few kernels to compile.
std::vector<Choice> lengths_and_masks();

// Draws choices, each time the best of a few, until every pair of values of two factors has stood in one.
class PairwiseChoices {
 public:
  // `fixed` holds the values that are given, -1 for those to choose.
  Choice next(const Choice& fixed);
  // The same at random; covers nothing.
  Choice draw(const Choice& fixed);
  bool all_covered() const;

 private:
  std::mt19937 random_{1};
  std::set<std::array<int, 4>> covered_;
};

// Whether FLASH_ATTN_JIT_TEST_ALL=1 asks for everything.
bool tests_all();

// What is too much for the program under sanitizers.
bool runs_whole_grids();

// Which of a grid's cases this program runs: every `step`th from `first` on.
struct Share {
  std::size_t first, step;
};

// The plain program has a ninth of a grid, and the one under sanitizers, which is several times slower, a
// fifty-fourth, with no case in both. With FLASH_ATTN_JIT_TEST_ALL=1 they have all and a sixth.
Share share_of_grid();

// Cases that are few, drawn or listed: the plain program has all, the one under sanitizers a fifth.
Share share_of_few();

template <class Case>
std::vector<Case> pick(const std::vector<Case>& cases, Share share) {
  std::vector<Case> kept;
  for (std::size_t i = share.first; i < cases.size(); i += share.step) kept.push_back(cases[i]);
  return kept;
}

// This program's share of the cases of these texts.
template <class Case>
std::vector<Case> listed(const std::vector<std::string>& texts) {
  std::vector<Case> cases;
  for (const std::string& text : texts) cases.push_back(Case::parse(text));
  return pick(cases, share_of_few());
}

// The values that a case's choices have, as words of its text.
std::set<std::string> values_of(const ForwardCase& c);

inline const ForwardCase& problem_of(const ForwardCase& c) { return c; }

// What this program runs of a grid: its share, and for each value that the share lacks a case that has it.
template <class Case>
std::vector<Case> pick_of_grid(const std::vector<Case>& cases) {
  std::vector<Case> kept = pick(cases, share_of_grid());
  if (kAddressSanitizer) return kept;
  std::set<std::string> seen;
  for (const Case& c : kept) seen.merge(values_of(problem_of(c)));
  for (const Case& c : cases) {
    const std::set<std::string> values = values_of(problem_of(c));
    if (std::includes(seen.begin(), seen.end(), values.begin(), values.end())) continue;
    kept.push_back(c);
    seen.insert(values.begin(), values.end());
  }
  return kept;
}

// Runs cases on as many threads as there are cores, two at the least; `run` returns a fault or "". Faults are told as
// they come, so that a long run that is broken off has told what it found.
template <class Case, class Run>
int count_faults(const std::vector<Case>& cases, Run run) {
  std::atomic<std::size_t> next = 0;
  std::atomic<int> faults = 0;
  const auto work = [&] {
    for (std::size_t i; (i = next++) < cases.size();) {
      const std::string fault = run(cases[i]);
      if (fault.empty()) continue;
      ++faults;
      std::fprintf(stderr, "%s\n", fault.c_str());
    }
  };
  std::vector<std::thread> others(std::max(2u, std::thread::hardware_concurrency()) - 1);
  for (std::thread& other : others) other = std::thread(work);
  work();
  for (std::thread& other : others) other.join();
  return faults;
}

}  // namespace flash_attn_jit::testing
