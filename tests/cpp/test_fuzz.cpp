// Random legal problems and random legal tiles in the interpreter, against float64: what no grid holds. The numbers are
// the same at every run; FLASH_ATTN_JIT_TEST_ALL=1 draws more of them.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "backward_case.h"
#include "case_grid.h"
#include "generator/families/families.h"
#include "generator/legality.h"
#include "generator/tile_layout.h"

using namespace flash_attn_jit;
using namespace flash_attn_jit::testing;

namespace {

// mt19937's numbers are the same everywhere; the standard distributions' are not.
class Dice {
 public:
  explicit Dice(unsigned seed) : random_(seed) {}
  int between(int least, int most) { return least + static_cast<int>(random_() % (most - least + 1)); }
  bool once_in(int n) { return between(1, n) == 1; }
  template <class Value>
  Value one_of(std::initializer_list<Value> values) {
    return values.begin()[between(0, static_cast<int>(values.size()) - 1)];
  }

 private:
  std::mt19937 random_;
};

// As often a multiple of 16 and of 8 as any: else few could be read 16 bytes at a time.
int random_head_dim(Dice& dice) {
  const int step = dice.one_of({1, 8, 16});
  return step * dice.between(1, kMostNarrowHeadDim / step);
}

void draw_head_dims(Dice& dice, ForwardCase& f) {
  f.head_dim = random_head_dim(dice);
  const int values = dice.once_in(2) ? random_head_dim(dice) : f.head_dim;
  f.head_dim_v = values == f.head_dim ? 0 : values;
}

// Any legal problem; the library chooses its tiles.
BackwardCase random_problem(Dice& dice) {
  BackwardCase c;
  ForwardCase& f = c.forward;
  draw_head_dims(dice, f);
  f.mask = dice.one_of({Mask::kNone, Mask::kCausal, Mask::kWindow});
  f.window = {dice.between(-1, 150), dice.between(-1, 150)};
  f.group_size = dice.between(1, 4);
  f.num_heads_k = f.group_size > 2 ? 1 : dice.between(1, 2);
  f.batch = f.group_size > 1 ? 1 : dice.between(1, 2);
  f.seqlen_q = dice.between(0, 140);
  f.seqlen_k = dice.between(0, 140);
  if (dice.once_in(3)) {
    f.dtype = DType::kBFloat16;
    c.dout_factor = std::ldexp(1, dice.between(-40, 20));
  }
  if (dice.once_in(3)) f.sequences = dice.between(1, 3);
  if (dice.once_in(3)) f.softcap = dice.one_of({0.7, 5.0, 30.0});
  if (dice.once_in(4)) f.dropout = dice.one_of({0.02, 0.3, 0.7});
  if (dice.once_in(3)) f.alibi = dice.one_of({AlibiCase::kHeads, AlibiCase::kBatchAndHeads});
  if (dice.once_in(3))
    f.bias = dice.one_of({BiasCase::kHalf, BiasCase::kHalfUnpaired, BiasCase::kFloatUnpaired, BiasCase::kFloatKeys,
                          BiasCase::kBool, BiasCase::kBoolUnpaired, BiasCase::kBoolKeys});
  if (dice.once_in(3)) f.sink = dice.between(-3, 12);
  f.layout = dice.one_of(
      {Layout::kContiguous, Layout::kTransposed, Layout::kRowGaps, Layout::kOddStrides, Layout::kMisaligned});
  if (dice.once_in(3)) {
    f.inputs = dice.one_of({Inputs::kRising, Inputs::kFalling});
    f.rise = dice.between(1, 20);
  }
  if (dice.once_in(4)) f.softmax_scale = dice.one_of({0.25f, 0.0f, -0.125f, 1.0f});
  c.shares_out = dice.once_in(2);
  c.dout_layout = dice.one_of({DoutLayout::kLikeQ, DoutLayout::kLikeQ, DoutLayout::kApart, DoutLayout::kExpanded});
  if (c.dout_layout == DoutLayout::kExpanded) c.dout_factor = 1;  // it is 0.75
  f.seed = static_cast<unsigned>(dice.between(2, 1 << 20));
  return c;
}

int random_register_dims(Dice& dice, const KernelSpec& spec) {
  const int dims = greatest_kernel_dims(spec);
  return std::min(dims, 16 * dice.between(0, (dims + 15) / 16));
}

// Any tile that check() admits for the spec, drawn from a box that is wider than what it admits.
TileConfig random_tile(Dice& dice, KernelSpec spec) {
  while (true) {
    const int warps = dice.between(1, dice.one_of({2, 16}));
    if (spec.kind == KernelKind::kBackwardPreprocess)
      return {.block_m = warps * 16 * dice.between(1, 2), .warps = warps, .schedule = {0, 0, 0}};
    spec.tile = {.block_m = warps * 16 * dice.between(1, 2),
                 .block_n = 8 * dice.between(1, 9),
                 .warps = warps,
                 .register_dims = random_register_dims(dice, spec),
                 .schedule = {dice.between(0, 8), dice.between(0, 8), dice.once_in(2) ? 8 : dice.between(0, 8)}};
    if (!check(spec, arch_limits(75))) return spec.tile;
  }
}

KernelSpec spec_of(KernelKind kind, const ForwardCase& c) {
  KernelSpec spec;
  spec.kind = kind;
  spec.set_head_dims(c.head_dim, c.value_head_dim());
  spec.mask = c.mask;
  const bool aligned = c.head_dim % 8 == 0 && c.value_head_dim() % 8 == 0;
  spec.access = aligned ? GlobalAccess::kVector16B : GlobalAccess::kElement2B;
  return spec;
}

TileConfig random_decode_tile(Dice& dice, const ForwardCase& f) {
  KernelSpec spec = spec_of(KernelKind::kDecode, f);
  while (true) {
    spec.tile = {.block_m = 16 * dice.between(1, 8),
                 .block_n = 8 * dice.between(1, 4),
                 .warps = dice.between(1, 16),
                 .register_dims = random_register_dims(dice, spec),
                 .schedule = {0, 0, 0}};
    if (!check(spec, arch_limits(75))) return spec.tile;
  }
}

// A small problem with random tiles of every kind.
BackwardCase random_tiles(Dice& dice) {
  BackwardCase c;
  ForwardCase& f = c.forward;
  draw_head_dims(dice, f);
  f.mask = dice.one_of({Mask::kNone, Mask::kCausal, Mask::kWindow});
  f.window = {dice.between(0, 80), dice.between(0, 40)};
  f.seqlen_q = dice.between(1, 140);
  f.seqlen_k = dice.between(1, 140);
  if (dice.once_in(3)) {
    f.splits = dice.between(1, 6);
    f.tile = random_decode_tile(dice, f);
  } else {
    f.tile = random_tile(dice, spec_of(KernelKind::kForward, f));
    if (dice.once_in(3)) f.dropout = 0.3;
  }
  if (dice.once_in(2)) f.sink = dice.between(-3, 12);
  c.preprocess_tile = random_tile(dice, spec_of(KernelKind::kBackwardPreprocess, f));
  c.dkdv_tile = random_tile(dice, spec_of(KernelKind::kBackwardDkDv, f));
  c.dq_tile = random_tile(dice, spec_of(KernelKind::kBackwardDq, f));
  const KernelSpec all_keys = spec_of(KernelKind::kBackwardAllKeys, f);
  if (all_keys.greatest_head_dim() > family_of(all_keys.kind).most_head_dim || dice.once_in(2)) return c;
  c.all_keys_tile = random_tile(dice, all_keys);
  f.seqlen_k = dice.between(1, c.all_keys_tile->block_m);
  return c;
}

// A forward problem of a head dim above 256, every other time with a random tile.
BackwardCase random_wide(Dice& dice) {
  BackwardCase c = random_problem(dice);
  ForwardCase& f = c.forward;
  const int step = dice.one_of({1, 8, 64});
  f.head_dim = step * dice.between(kMostNarrowHeadDim / step + 1, kMostHeadDim / step);
  f.head_dim_v = 0;
  KernelSpec spec = spec_of(KernelKind::kForwardWide, f);
  while (dice.once_in(2)) {
    const int groups = dice.between(1, 4);
    spec.tile = {.block_m = 32 * groups,
                 .block_n = 8,
                 .warps = 4 * groups,
                 .register_dims = 16 * dice.between(0, 8),
                 .schedule = {dice.between(0, 8), dice.between(0, 8), dice.between(0, 8)}};
    if (check(spec, arch_limits(75))) continue;
    f.tile = spec.tile;
    break;
  }
  return c;
}

template <class Draw>
std::vector<BackwardCase> drawn(unsigned seed, int number, Draw draw) {
  Dice dice(seed);
  std::vector<BackwardCase> cases;
  for (int i = 0; i < number; ++i) cases.push_back(draw(dice));
  return cases;
}

std::string run_both_passes(const BackwardCase& c) { return run_forward_case(c.forward).fault + run_backward_case(c); }

}  // namespace

TEST_CASE("fuzz: random legal problems, both passes") {
  CHECK(count_faults(pick(drawn(1, tests_all() ? 300 : 20, random_problem), share_of_few()), run_both_passes) == 0);
}

TEST_CASE("fuzz: random legal problems of head dims above 256, forward") {
  const auto run_forward = [](const BackwardCase& c) { return run_forward_case(c.forward).fault; };
  CHECK(count_faults(pick(drawn(3, tests_all() ? 200 : 30, random_wide), share_of_few()), run_forward) == 0);
}

TEST_CASE("fuzz: random legal tiles of every kind") {
  CHECK(count_faults(pick(drawn(2, tests_all() ? 200 : 12, random_tiles), share_of_few()), run_both_passes) == 0);
}
