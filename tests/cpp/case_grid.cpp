#include "case_grid.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <iterator>
#include <set>
#include <sstream>
#include <tuple>
#include <utility>

#include "every_spec.h"
#include "generator/legality.h"
#include "generator/tile_chooser.h"
#include "runtime/system/sanitizers.h"

namespace flash_attn_jit::testing {

namespace {

// Products go over 8 dims at a time: loads of operands over 16 or 32, with what is left; above 128 halves of gradients
// have a rest of their own.
auto arithmetic_class(int d) {
  const int eights = (d + 7) / 8, rest = d % 8 != 0 ? eights % 2 : d > 128 ? eights % 8 : eights % 4;
  return std::tuple(d % 8 == 0, d % 2 == 0, d > 128, rest);
}

// Tiles are the same with what finishes a row.
std::vector<FeatureSet> feature_sets_of_tiles() {
  std::vector<FeatureSet> sets = all_feature_sets();
  std::erase_if(sets, [](const FeatureSet& features) { return !features.finishing_rows().empty(); });
  return sets;
}

// The rows of the default tables that a head dim is served by, whatever the kind and the options.
std::vector<TileConfig> table_rows(int d) {
  static const std::vector<FeatureSet> feature_sets = feature_sets_of_tiles();
  std::vector<TileConfig> rows;
  for_every_spec(d, feature_sets, [&](KernelSpec spec) {
    spec.access = d % 8 == 0 ? GlobalAccess::kVector16B : GlobalAccess::kElement2B;
    for (TileConfig tile : default_tiles(spec)) {
      tile.register_dims = 0;  // follows the head dim
      rows.push_back(tile);
    }
  });
  return rows;
}

// The greatest head dim of every table row, then the least of each arithmetic class that is still missing. Tables tell
// apart what kernels compute with, dims in steps of 8 (tests/cpp/test_default_tiles.cpp), and kinds of access.
std::vector<int> choose_head_dims() {
  std::set<std::vector<TileConfig>> rows;
  std::set<decltype(arithmetic_class(1))> classes;
  std::vector<int> dims;
  const auto add = [&](int d) {
    dims.push_back(d);
    classes.insert(arithmetic_class(d));
  };
  for (int d = kMostNarrowHeadDim; d >= 1; --d)
    if ((d % 8 == 0 || d % 8 == 7) && rows.insert(table_rows(d)).second) add(d);
  for (int d = 1; d <= kMostNarrowHeadDim; ++d)
    if (!classes.count(arithmetic_class(d))) add(d);
  std::sort(dims.begin(), dims.end());
  return dims;
}

struct VisibleChoice {
  Mask mask;
  Window window;
};
const std::vector<VisibleChoice> kVisibleChoices = {
    {Mask::kNone, {}},        {Mask::kCausal, {}},       {Mask::kWindow, {0, 0}},    {Mask::kWindow, {20, 0}},
    {Mask::kWindow, {70, 5}}, {Mask::kWindow, {-1, 30}}, {Mask::kWindow, {100, -1}}, {Mask::kWindow, {999, 999}},
};

struct AdjustmentChoice {
  double softcap;
  AlibiCase alibi;
  BiasCase bias = BiasCase::kOff;
  double dropout = 0;
};
const std::vector<AdjustmentChoice> kAdjustmentChoices = {
    {0, AlibiCase::kOff},
    {5, AlibiCase::kOff},
    {0, AlibiCase::kHeads},
    {30, AlibiCase::kBatchAndHeads},
    {0, AlibiCase::kOff, BiasCase::kHalf},
    {0, AlibiCase::kOff, BiasCase::kHalfUnpaired},
    {0, AlibiCase::kHeads, BiasCase::kFloatUnpaired},
    {5, AlibiCase::kOff, BiasCase::kFloatKeys},
    {0, AlibiCase::kOff, BiasCase::kBool},
    {5, AlibiCase::kHeads, BiasCase::kBoolUnpaired},
    {0, AlibiCase::kOff, BiasCase::kBoolKeys},
    {0, AlibiCase::kOff, BiasCase::kOff, 0.1},
    {30, AlibiCase::kHeads, BiasCase::kOff, 0.4},
    {0, AlibiCase::kOff, BiasCase::kHalf, 0.3},
    {0, AlibiCase::kOff, BiasCase::kBoolKeys, 0.1},
};
// Those of every rest of an operand load, and where gradients are split: 0 for q's.
const std::vector<int> kValueDims = {0, 24, 33, 128, 200};
// Among the scores, where it takes nearly all of a row, and where it takes no part.
const std::vector<std::optional<double>> kSinks = {std::nullopt, 0.5, 20, -INFINITY};
const std::vector<std::int64_t> kSequenceChoices = {0, 5};
const std::vector<int> kGroupSizes = {1, 2, 4, 7};
constexpr int kGroupChoice = 1;  // the first of more than one head
const std::vector<int> kLengths = {0, 1, 63, 64, 65, 127, 129, 257};
const std::vector<Layout> kLayouts = {Layout::kContiguous, Layout::kTransposed, Layout::kRowGaps, Layout::kOddStrides,
                                      Layout::kMisaligned};

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

// The indices of a mask's choices.
std::vector<int> visible_choices_of(Mask mask) {
  std::vector<int> choices;
  for (int i = 0; i < static_cast<int>(kVisibleChoices.size()); ++i)
    if (kVisibleChoices[i].mask == mask) choices.push_back(i);
  return choices;
}

// Two values of two different factors.
using Pair = std::array<int, 4>;

std::vector<Pair> pairs_of(const Choice& choice) {
  std::vector<Pair> pairs;
  for (int a = 0; a < kFactors; ++a)
    for (int b = a + 1; b < kFactors; ++b) pairs.push_back({a, choice[a], b, choice[b]});
  return pairs;
}

// Of those with an attn_bias or dropout one at a time.
bool has_turn(int adjustment, int turn) {
  int first = 0;
  while (kAdjustmentChoices[first].bias == BiasCase::kOff && kAdjustmentChoices[first].dropout == 0) ++first;
  return adjustment < first || (adjustment + turn) % (static_cast<int>(kAdjustmentChoices.size()) - first) == 0;
}

}  // namespace

const std::vector<int>& head_dims() {
  static const std::vector<int> dims = choose_head_dims();
  return dims;
}

Choice sizes() {
  const auto size = [](const auto& list) { return static_cast<int>(list.size()); };
  return {size(head_dims()), size(kValueDims),       size(kDTypes),     size(kVisibleChoices), size(kAdjustmentChoices),
          size(kSinks),      size(kSequenceChoices), size(kGroupSizes), size(kLengths),        size(kLengths),
          size(kLayouts),    size(kInputChoices),    size(kScales)};
}

ForwardCase make_case(const Choice& choice) {
  ForwardCase c;
  c.head_dim = head_dims()[choice[kDimChoice]];
  c.dtype = kDTypes[choice[kDTypeChoice]];
  const int values = kValueDims[choice[kValues]];
  c.head_dim_v = values == c.head_dim ? 0 : values;
  c.mask = kVisibleChoices[choice[kVisible]].mask;
  c.window = kVisibleChoices[choice[kVisible]].window;
  c.softcap = kAdjustmentChoices[choice[kAdjustment]].softcap;
  c.alibi = kAdjustmentChoices[choice[kAdjustment]].alibi;
  c.bias = kAdjustmentChoices[choice[kAdjustment]].bias;
  c.dropout = kAdjustmentChoices[choice[kAdjustment]].dropout;
  c.sink = kSinks[choice[kSink]];
  c.sequences = kSequenceChoices[choice[kSequences]];
  c.group_size = kGroupSizes[choice[kGroup]];
  c.seqlen_q = kLengths[choice[kSeqlenQ]];
  c.seqlen_k = kLengths[choice[kSeqlenK]];
  c.layout = kLayouts[choice[kLayout]];
  c.inputs = kInputChoices[choice[kInput]].inputs;
  c.rise = kInputChoices[choice[kInput]].rise;
  c.softmax_scale = kScales[choice[kScale]];
  // With few elements, the emulation's error is small by luck: have some thousand.
  c.num_heads_k = c.group_size > 2 ? 1 : 2;
  const std::int64_t elements = std::max<std::int64_t>(1, c.seqlen_q * c.head_dim * c.num_heads_k * c.group_size);
  c.batch = std::clamp<std::int64_t>(2048 / elements, c.group_size > 2 ? 1 : 2, 32);
  if (c.sequences > 0) c.sequences = std::max(c.sequences, c.batch);
  return c;
}

std::vector<Choice> lengths_and_masks() {
  std::vector<Choice> choices;
  std::mt19937 random(2);
  const Choice size = sizes();
  int kernel = 0;
  for (int d = 0; d < size[kDimChoice]; ++d)
    for (const Mask mask : kAllMasks) {
      const std::vector<int> visible = visible_choices_of(mask);
      // The digits of its number, so that each meets each of the others.
      Choice choice = only(d);
      int rest = kernel++;
      const auto digit = [&](int values) { return std::exchange(rest, rest / values) % values; };
      choice[kAdjustment] = digit(size[kAdjustment]);
      const bool is_aligned = digit(2) == 0;
      choice[kSequences] = digit(size[kSequences]);
      choice[kGroup] = digit(size[kGroup]);
      choice[kSink] = static_cast<int>(random() % size[kSink]);
      choice[kDTypeChoice] = static_cast<int>(random() % size[kDTypeChoice]);
      for (int q = 0; q < size[kSeqlenQ]; ++q)
        for (int k = 0; k < size[kSeqlenK]; ++k) {
          if ((q + k + d) % 4 != 0) continue;
          choice[kVisible] = visible[random() % visible.size()];
          choice[kSeqlenQ] = q;
          choice[kSeqlenK] = k;
          choice[kLayout] = is_aligned ? q % kAlignedLayouts : kAlignedLayouts + q % (size[kLayout] - kAlignedLayouts);
          for (const Factor free : {kInput, kScale}) choice[free] = static_cast<int>(random() % size[free]);
          choices.push_back(choice);
        }
    }
  return choices;
}

bool tests_all() {
  const char* variable = std::getenv("FLASH_ATTN_JIT_TEST_ALL");
  return variable != nullptr && std::string(variable) == "1";
}

bool runs_whole_grids() { return tests_all() && !kAddressSanitizer; }

Share share_of_grid() {
  if (tests_all()) return kAddressSanitizer ? Share{0, 6} : Share{0, 1};
  return kAddressSanitizer ? Share{1, 54} : Share{0, 9};
}

Share share_of_few() { return kAddressSanitizer ? Share{0, 5} : Share{0, 1}; }

std::set<std::string> values_of(const ForwardCase& c) {
  ForwardCase chosen = c;
  chosen.tile.reset();
  chosen.batch = 1;  // follows the other choices, as the number of sequences does
  chosen.sequences = std::min<std::int64_t>(c.sequences, 1);
  std::istringstream words(chosen.text());
  return {std::istream_iterator<std::string>(words), {}};
}

Choice only(int head_dim) {
  Choice fixed;
  fixed.fill(-1);
  fixed[kDimChoice] = head_dim;
  if (head_dim >= 0) fixed[kValues] = 0;
  return fixed;
}

std::vector<Choice> choices_of_tiles(int head_dim) {
  std::vector<Choice> choices;
  const Choice size = sizes();
  for (int visible = 0; visible < size[kVisible]; ++visible)
    for (int adjustment = 0; adjustment < size[kAdjustment]; ++adjustment)
      for (int sequences = 0; sequences < size[kSequences]; ++sequences)
        for (const int layout : {0, kAlignedLayouts}) {
          if (!has_turn(adjustment, head_dim + visible + sequences + layout)) continue;
          for (int dtype = 0; dtype < size[kDTypeChoice]; ++dtype)
            for (const int group : {0, kGroupChoice}) {
              Choice fixed = only(head_dim);
              fixed[kVisible] = visible;
              fixed[kAdjustment] = adjustment;
              fixed[kSequences] = sequences;
              fixed[kLayout] = layout;
              fixed[kDTypeChoice] = dtype;
              fixed[kGroup] = group;
              choices.push_back(fixed);
            }
        }
  return choices;
}

Choice PairwiseChoices::next(const Choice& fixed) {
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

bool PairwiseChoices::all_covered() const {
  const Choice size = sizes();
  std::size_t pairs = 0;
  for (int a = 0; a < kFactors; ++a)
    for (int b = a + 1; b < kFactors; ++b) pairs += static_cast<std::size_t>(size[a]) * size[b];
  return covered_.size() == pairs;
}

// mt19937's numbers are the same everywhere; the standard distributions' are not.
Choice PairwiseChoices::draw(const Choice& fixed) {
  const Choice size = sizes();
  Choice choice;
  for (int i = 0; i < kFactors; ++i) choice[i] = fixed[i] >= 0 ? fixed[i] : static_cast<int>(random_() % size[i]);
  return choice;
}

}  // namespace flash_attn_jit::testing
