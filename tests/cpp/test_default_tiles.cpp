// The default tiles are legal wherever they apply, and the one that is done first is chosen.
#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <random>
#include <vector>

#include "every_spec.h"
#include "generator/errors.h"
#include "generator/families/families.h"
#include "generator/tile_chooser.h"
#include "generator/tile_costs.h"
#include "runtime/model/problem_model.h"

using namespace flash_attn_jit;

namespace {

constexpr int kT4Multiprocessors = 40;

TileConfig chosen(const KernelSpec& spec, const Problem& problem) {
  return default_tile_chooser().choose(spec, problem);
}

template <class Body>
void for_every_problem(Body body) {
  for (int head_dim = 1; head_dim <= 256; ++head_dim)
    for (Mask mask : {Mask::kNone, Mask::kCausal})
      for (GlobalAccess access : {GlobalAccess::kVector16B, GlobalAccess::kElement2B}) {
        if (access == GlobalAccess::kVector16B && head_dim % 8 != 0) continue;
        KernelSpec spec;
        spec.head_dim = head_dim;
        spec.mask = mask;
        spec.access = access;
        body(spec);
      }
}

}  // namespace

TEST_CASE("every default tile and every tile of the space is legal on a T4, and the space holds the defaults") {
  const ArchLimits t4 = arch_limits(75);
  for (const KernelKind kind : kKernelKinds)
    for_every_problem([&](KernelSpec spec) {
      spec.kind = kind;
      const auto defaults = default_tiles(spec);
      const auto space = tile_space(spec, t4);
      if (!family_of(kind).has_head_dim(spec.head_dim)) {
        CHECK(space.empty());
        return;
      }
      CHECK(defaults.size() >= (family_of(kind).has_tile_costs() ? 2 : 1));  // nothing is chosen without
      for (const TileConfig& tile : defaults) CHECK(std::binary_search(space.begin(), space.end(), tile));
      for (const TileConfig& tile : space) {
        spec.tile = tile;
        CAPTURE(spec.text());
        CHECK(check(spec, t4).value_or("legal") == "legal");
      }
    });
}

// What the card's model says of a problem, from the costs that stand beside the tiles.
double predicted_cycles(KernelSpec spec, const TileConfig& tile, const ProblemSize& size, int multiprocessors) {
  spec.tile = tile;
  const TileCost cost = tile_cost(spec, tile);
  std::vector<BlockCost> costs;
  for (int sharing = 1; sharing <= cost.resident; ++sharing) {
    const auto of = [&](int BlockCycles::* part) {
      const double alone = cost.alone.*part, shared = cost.sharing.*part;
      return cost.resident > 1 ? alone + (shared - alone) * (sharing - 1) / (cost.resident - 1) : alone;
    };
    costs.push_back({of(&BlockCycles::block), of(&BlockCycles::iteration), of(&BlockCycles::masked_iteration)});
  }
  Card card = find_card("t4");
  card.multiprocessors = multiprocessors;
  card.dram_bytes_per_second = 1e15;  // the choice looks at the multiprocessors alone
  return predict(spec, size, costs, card).cycles;
}

// Alone, or with what it says something of.
FeatureSet with_what_it_needs(Feature feature) {
  return feature == Feature::kUnpaired || feature == Feature::kOneRow ? FeatureSet{Feature::kBoolMask, feature}
                                                                      : FeatureSet{feature};
}

std::vector<FeatureSet> feature_sets() {
  std::vector<FeatureSet> sets = {{}};
  for (const FeatureInfo& info : kFeatures)
    if (!info.is_users) sets.push_back(with_what_it_needs(info.feature));
  return sets;
}

bool has_kernels(const KernelFamily& family, const KernelSpec& spec) {
  return family.has_head_dim(spec.head_dim) && (family.results.out || !spec.features.forward_only()) &&
         !(family.warps_share_rows && spec.has(Feature::kDropout));
}

// With every head dim that kernels tell apart.
template <class Body>
void for_every_kernel(Body body) {
  const std::vector<FeatureSet> sets = feature_sets();
  for (int head_dim = 8; head_dim <= 512; head_dim += 8)
    testing::for_every_spec(head_dim, sets, [&](const KernelSpec& each) {
      const KernelSpec spec = normalized(each);
      if (has_kernels(family_of(spec.kind), spec)) body(spec);
    });
}

TEST_CASE("with every dtype, mask, feature and group the default tiles are legal on a T4") {
  const ArchLimits t4 = arch_limits(75);
  int tiles = 0;
  for_every_kernel([&](KernelSpec spec) {
    for (const TileConfig& tile : default_tiles(spec)) {
      ++tiles;
      spec.tile = tile;
      CAPTURE(spec.text());
      CHECK(check(spec, t4).value_or("legal") == "legal");
    }
  });
  CHECK(tiles > 0);
}

TEST_CASE("head dims that kernels pad to as many, and access alike, have the same default tiles") {
  for_every_kernel([](KernelSpec spec) {
    spec.access = GlobalAccess::kElement2B;
    spec.head_dim -= 1;
    const std::vector<TileConfig> tiles = default_tiles(spec);
    for (int fewer = 1; fewer < 7; ++fewer) {
      spec.head_dim -= 1;
      CAPTURE(spec.text());
      CHECK(default_tiles(spec) == tiles);
    }
  });
}

TEST_CASE("where bfloat16 has tiles of its own they are for as many dims, that mask, those features and groups") {
  const auto tile_of = [](int head_dim, DType dtype, Mask mask, FeatureSet features, int group_size) {
    KernelSpec spec;
    spec.kind = KernelKind::kBackwardDkDv;
    spec.dtype = dtype;
    spec.mask = mask;
    spec.features = features;
    spec.group_size = group_size;
    spec.head_dim = head_dim;
    return default_tiles(spec).front();
  };
  const FeatureSet varlen = {Feature::kVarlen}, other = {Feature::kVarlen, Feature::kAlibi};
  const TileConfig own = tile_of(128, DType::kBFloat16, Mask::kNone, varlen, 1);
  CHECK(own == TileConfig{.block_m = 128, .block_n = 16, .warps = 8, .register_dims = 128, .schedule = {0, 6, 8}});
  CHECK(own != tile_of(128, DType::kFloat16, Mask::kNone, varlen, 1));
  CHECK(own != tile_of(128, DType::kBFloat16, Mask::kCausal, varlen, 1));
  CHECK(own != tile_of(128, DType::kBFloat16, Mask::kNone, varlen, 4));
  for (const int head_dim : {120, 136})
    CHECK(tile_of(head_dim, DType::kBFloat16, Mask::kNone, varlen, 1) ==
          tile_of(head_dim, DType::kFloat16, Mask::kNone, varlen, 1));
  CHECK(tile_of(128, DType::kBFloat16, Mask::kNone, other, 1) == tile_of(128, DType::kFloat16, Mask::kNone, other, 1));
}

TEST_CASE("every default tile has a cost of its own") {
  for (const KernelKind kind : kKernelKinds)
    for (const Mask mask : kAllMasks)
      for (int head_dim = 8; head_dim <= 256; head_dim += 8) {
        KernelSpec spec;
        spec.kind = kind;
        spec.mask = mask;
        spec.head_dim = head_dim;
        CAPTURE(spec.text());
        if (!family_of(kind).has_tile_costs()) continue;
        for (const TileConfig& tile : default_tiles(spec)) {
          const TileCost& cost = nearest_cost(spec, tile);
          CHECK(cost.block_m == tile.block_m);
          CHECK(cost.block_n == tile.block_n);
          CHECK(cost.warps == tile.warps);
          CHECK(cost.resident >= 1);
          CHECK(cost.alone.iteration > 0);
          CHECK(cost.sharing.iteration > 0);
        }
      }
}

TEST_CASE("of the default tiles the one is chosen that the model says is done first, nearly always") {
  std::mt19937 random(1);
  const auto size = [&](int most) {  // as many small as large ones
    return std::max<std::int64_t>(1, static_cast<std::int64_t>(std::pow(most, (random() % 1000) / 1000.0)));
  };
  int problems = 0, late = 0, other_than_large = 0;
  double worst = 1;
  for (int i = 0; i < 4000; ++i) {
    KernelSpec spec;
    spec.kind = std::array{KernelKind::kForward, KernelKind::kBackwardDkDv, KernelKind::kBackwardDq}[random() % 3];
    spec.mask = kAllMasks[random() % 3];
    spec.head_dim = 8 * static_cast<int>(1 + random() % 32);
    spec.group_size = 1 << random() % 3;
    ProblemSize problem{.batch = size(64), .num_heads = 8, .num_heads_k = 8 / spec.group_size, .seqlen_q = size(4096)};
    problem.seqlen_k = random() % 2 == 0 ? problem.seqlen_q : size(4096);
    problem.window_left = problem.window_right = size(1024);
    const int multiprocessors = std::array{40, 68, 132}[random() % 3];
    const TileConfig tile = chosen(spec, {problem.seqlen_q, problem.seqlen_k, problem.batch * 8, multiprocessors,
                                          problem.window_left + problem.window_right + 1});
    double least = 0, time = 0;
    for (const TileConfig& each : default_tiles(spec)) {
      const double cycles = predicted_cycles(spec, each, problem, multiprocessors);
      least = least == 0 ? cycles : std::min(least, cycles);
      if (each == tile) time = cycles;
    }
    REQUIRE(time > 0);
    ++problems;
    late += time > 1.1 * least;
    other_than_large += tile != default_tiles(spec).front();
    worst = std::max(worst, time / least);
  }
  CHECK(late < problems / 40);
  CHECK(worst < 2);
  CHECK(other_than_large > problems / 10);
  CHECK(other_than_large < problems * 9 / 10);
}

TEST_CASE("sizes at their ends: a tile is chosen") {
  for (const KernelKind kind : kKernelKinds)
    for_every_problem([&](KernelSpec spec) {
      spec.kind = kind;
      if (!family_of(kind).has_head_dim(spec.head_dim)) return;
      const std::int64_t most_keys = family_of(kind).has_all_rows ? default_tiles(spec).front().block_m : 1 << 24;
      for (const std::int64_t length : {0, 1, 1 << 24})
        for (const std::int64_t heads : {0, 1, 1 << 20})
          CHECK(chosen(spec, {length, std::min(length, most_keys), heads, kT4Multiprocessors}).block_m > 0);
    });
}

TEST_CASE("a block has all keys, or another kernel is taken") {
  KernelSpec spec;
  spec.kind = KernelKind::kBackwardAllKeys;
  spec.head_dim = 64;
  CHECK(chosen(spec, {500, 128, 64, kT4Multiprocessors}).block_m == 128);
  CHECK(chosen(spec, {500, 65, 64, kT4Multiprocessors}).block_m == 128);
  CHECK_THROWS_AS(chosen(spec, {500, 129, 64, kT4Multiprocessors}), Error);
  CHECK(default_tile_chooser().takes_all_keys(spec, {128, 128, 400, kT4Multiprocessors}));
  CHECK(default_tile_chooser().takes_all_keys(spec, {128, 1, 400, kT4Multiprocessors}));
  CHECK_FALSE(default_tile_chooser().takes_all_keys(spec, {128, 129, 400, kT4Multiprocessors}));
  // Few blocks, which go over many queries one after the other: the dQ kernel shares them out.
  CHECK_FALSE(default_tile_chooser().takes_all_keys(spec, {1 << 16, 77, 2, kT4Multiprocessors}));
  spec.head_dim = 136;
  CHECK_FALSE(default_tile_chooser().takes_all_keys(spec, {128, 128, 400, kT4Multiprocessors}));
}

TEST_CASE("there is no tile above head dim 256") {
  KernelSpec spec;
  spec.head_dim = 257;
  CHECK_THROWS_AS(chosen(spec, {4096, 4096, 64, kT4Multiprocessors}), UnsupportedError);
}
