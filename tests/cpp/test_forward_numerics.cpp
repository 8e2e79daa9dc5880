// The forward kernel in the interpreter against float64.
//
// One case from the shell, with the templates as they lie in the source tree:
//
//   export FLASH_ATTN_JIT_TEMPLATES=$PWD/templates
//   export FLASH_ATTN_JIT_TEST_CASE="hdim128 causal gqa2 sq257 sk129"
//   build/flash_attn_jit_tests -tc="the case of*"
//
// It prints errors, bounds and the interpreter's report. Words: see ForwardCase::text(), a tile among
// them; none is needed.
#include <doctest/doctest.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "forward_case.h"
#include "generator/default_tiles.h"
#include "generator/legality.h"
#include "runtime/interpreter/interpreter.h"

using namespace flash_attn_jit;
using namespace flash_attn_jit::testing;

namespace {

const std::vector<int> kHeadDims = {1, 8, 16, 33, 40, 64, 72, 80, 96, 128, 160, 192, 256};
const std::vector<Mask> kMasks = {Mask::kNone, Mask::kCausal};
const std::vector<int> kGroupSizes = {1, 2, 4, 7};
const std::vector<int> kLengths = {0, 1, 63, 64, 65, 127, 129, 257};
constexpr int kAlignedLayouts = 3;  // the first of these
const std::vector<Layout> kLayouts = {Layout::kContiguous, Layout::kTransposed, Layout::kRowGaps,
                                      Layout::kOddStrides, Layout::kMisaligned};

struct InputChoice {
  Inputs inputs;
  double rise;
};
const std::vector<InputChoice> kInputChoices = {
    {Inputs::kNormal, 0},  {Inputs::kRising, 0.5}, {Inputs::kRising, 4},
    {Inputs::kRising, 9},  {Inputs::kRising, 30},  {Inputs::kFalling, 4},
    {Inputs::kFalling, 9}, {Inputs::kFalling, 30}, {Inputs::kThousand, 0},
};
const std::vector<std::optional<float>> kScales = {std::nullopt, 0.25f, 0.0f, -0.125f};

// The choices of a case, as indices: everything but its tile.
enum Factor { kHeadDim, kMask, kGroup, kSeqlenQ, kSeqlenK, kLayout, kInput, kScale, kFactors };
using Choice = std::array<int, kFactors>;

Choice sizes() {
  const auto size = [](const auto& list) { return static_cast<int>(list.size()); };
  return {size(kHeadDims), size(kMasks),   size(kGroupSizes),   size(kLengths),
          size(kLengths),  size(kLayouts), size(kInputChoices), size(kScales)};
}

ForwardCase make_case(const Choice& choice, std::optional<TileConfig> tile) {
  ForwardCase c;
  c.head_dim = kHeadDims[choice[kHeadDim]];
  c.mask = kMasks[choice[kMask]];
  c.group_size = kGroupSizes[choice[kGroup]];
  c.seqlen_q = kLengths[choice[kSeqlenQ]];
  c.seqlen_k = kLengths[choice[kSeqlenK]];
  c.layout = kLayouts[choice[kLayout]];
  c.inputs = kInputChoices[choice[kInput]].inputs;
  c.rise = kInputChoices[choice[kInput]].rise;
  c.softmax_scale = kScales[choice[kScale]];
  c.tile = tile;
  // With few elements, the emulation's error is small by luck: have some thousand.
  c.num_heads_k = c.group_size > 2 ? 1 : 2;
  const std::int64_t elements =
      std::max<std::int64_t>(1, c.seqlen_q * c.head_dim * c.num_heads_k * c.group_size);
  c.batch = std::clamp<std::int64_t>(2048 / elements, c.group_size > 2 ? 1 : 2, 32);
  return c;
}

// Two values of two different factors.
using Pair = std::array<int, 4>;

std::vector<Pair> pairs_of(const Choice& choice) {
  std::vector<Pair> pairs;
  for (int a = 0; a < kFactors; ++a)
    for (int b = a + 1; b < kFactors; ++b) pairs.push_back({a, choice[a], b, choice[b]});
  return pairs;
}

// Draws choices until every pair of values has stood in one, each time the best of a few, and every head dim
// has had `tiles[head_dim]` turns.
class PairwiseChoices {
 public:
  // `fixed` holds the values that are given, -1 for those to choose.
  Choice next(const Choice& fixed) {
    Choice best{};
    int best_new = -1;
    for (int candidate = 0; candidate < 40; ++candidate) {
      const Choice choice = draw(fixed);
      int fresh = 0;
      for (const Pair& pair : pairs_of(choice)) fresh += !covered_.count(pair);
      if (fresh > best_new) {
        best_new = fresh;
        best = choice;
      }
    }
    for (const Pair& pair : pairs_of(best)) covered_.insert(pair);
    return best;
  }

  bool all_covered() const {
    const Choice size = sizes();
    std::size_t pairs = 0;
    for (int a = 0; a < kFactors; ++a)
      for (int b = a + 1; b < kFactors; ++b) pairs += static_cast<std::size_t>(size[a]) * size[b];
    return covered_.size() == pairs;
  }

 private:
  // mt19937's numbers are the same everywhere; the standard distributions' are not.
  Choice draw(const Choice& fixed) {
    const Choice size = sizes();
    Choice choice;
    for (int i = 0; i < kFactors; ++i)
      choice[i] = fixed[i] >= 0 ? fixed[i] : static_cast<int>(random_() % size[i]);
    return choice;
  }

  std::mt19937 random_{1};
  std::set<Pair> covered_;
};

// Nothing given but `head_dim`, an index of kHeadDims.
Choice only(int head_dim) {
  Choice fixed;
  fixed.fill(-1);
  fixed[kHeadDim] = head_dim;
  return fixed;
}

// The default tiles of a head dim with the masks and layouts that they are for: what the library runs by
// itself.
void add_default_tiles(int head_dim, PairwiseChoices& choices, std::vector<ForwardCase>& cases) {
  KernelSpec spec;
  spec.head_dim = kHeadDims[head_dim];
  for (int mask = 0; mask < static_cast<int>(kMasks.size()); ++mask)
    for (const int layout : {0, kAlignedLayouts}) {
      spec.mask = kMasks[mask];
      spec.access =
          layout == 0 && spec.head_dim % 8 == 0 ? GlobalAccess::kVector16B : GlobalAccess::kElement2B;
      for (const TileConfig& tile : default_tiles(spec, arch_limits(75))) {
        Choice fixed = only(head_dim);
        fixed[kMask] = mask;
        fixed[kLayout] = layout;
        cases.push_back(make_case(choices.next(fixed), tile));
      }
    }
}

// Every default tile with what it is for, every tile of the tile space with some head dim, and every two
// choices with each other.
std::vector<ForwardCase> pairwise_cases() {
  std::vector<ForwardCase> cases;
  PairwiseChoices choices;
  std::set<TileConfig> seen;
  for (int i = 0; i < static_cast<int>(kHeadDims.size()); ++i) {
    add_default_tiles(i, choices, cases);
    for (const TileConfig& tile : tiles_of(kHeadDims[i]))
      if (seen.insert(tile).second) cases.push_back(make_case(choices.next(only(i)), tile));
  }
  while (!choices.all_covered()) cases.push_back(make_case(choices.next(only(-1)), std::nullopt));
  return cases;
}

// Every tile with both masks and every head dim, over all lengths; every pair of lengths with every head dim,
// mask and group size on the default tiles. Layouts, inputs and scales take turns. A tile keeps its group
// size and is used either with 16-byte or with element-wise access, since each of these is another kernel to
// compile.
std::vector<ForwardCase> all_cases() {
  std::vector<ForwardCase> cases;
  std::mt19937 random(2);
  const Choice size = sizes();
  const auto add = [&](Choice choice, std::optional<TileConfig> tile) {
    for (const Factor free : {kInput, kScale}) choice[free] = static_cast<int>(random() % size[free]);
    cases.push_back(make_case(choice, tile));
  };
  for (int d = 0; d < size[kHeadDim]; ++d)
    for (int m = 0; m < size[kMask]; ++m) {
      const std::vector<TileConfig> tiles = tiles_of(kHeadDims[d]);
      for (int t = 0; t < static_cast<int>(tiles.size()); ++t)
        for (int q = 0; q < size[kSeqlenQ]; ++q) {
          const int layout = t / size[kGroup] % 2 ? q % kAlignedLayouts : kAlignedLayouts + q % 2;
          add({d, m, (t + m) % size[kGroup], q, (t + 3 * q) % size[kSeqlenK], layout}, tiles[t]);
        }
      for (int g = 0; g < size[kGroup]; ++g)
        for (int q = 0; q < size[kSeqlenQ]; ++q)
          for (int k = 0; k < size[kSeqlenK]; ++k)
            add({d, m, g, q, k, (q + k) % size[kLayout]}, std::nullopt);
    }
  return cases;
}

// Runs cases on two threads. Faults are told as they come, so that a long run that is broken off has told
// what it found.
int count_faults(const std::vector<ForwardCase>& cases) {
  std::atomic<std::size_t> next = 0;
  std::atomic<int> faults = 0;
  const auto work = [&] {
    for (std::size_t i; (i = next++) < cases.size();) {
      const std::string fault = run_forward_case(cases[i]).fault;
      if (fault.empty()) continue;
      ++faults;
      std::fprintf(stderr, "%s\n", fault.c_str());
    }
  };
  std::thread other(work);
  work();
  other.join();
  return faults;
}

void check_all(const std::vector<ForwardCase>& cases) {
  MESSAGE(cases.size() << " cases");
  CHECK(count_faults(cases) == 0);
}

}  // namespace

TEST_CASE("the case of FLASH_ATTN_JIT_TEST_CASE") {
  const char* text = std::getenv("FLASH_ATTN_JIT_TEST_CASE");
  if (text == nullptr) return;
  const ForwardCase c = ForwardCase::parse(text);
  const ForwardOutcome outcome = run_forward_case(c);
  MESSAGE(c.text() << "\nout error " << outcome.out_error << " bound " << outcome.out_bound << "\nlse error "
                   << outcome.lse_error << " bound " << outcome.lse_bound << "\n"
                   << last_interpreter_report().text());
  CHECK(outcome.fault == "");
}

TEST_CASE("a case's text parses back") {
  for (const ForwardCase& c : pairwise_cases()) REQUIRE(ForwardCase::parse(c.text()).text() == c.text());
}

TEST_CASE("forward: every tile, head dim, length, layout and input, pair by pair") {
  check_all(pairwise_cases());
}

TEST_CASE("forward: the whole grid (FLASH_ATTN_JIT_TEST_ALL=1)") {
  const char* all = std::getenv("FLASH_ATTN_JIT_TEST_ALL");
  if (all == nullptr || std::string(all) != "1") return;
  check_all(all_cases());
}
