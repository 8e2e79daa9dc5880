#include "generator/tile_costs.h"

#include <algorithm>
#include <array>
#include <cstdlib>

#include "generator/errors.h"
#include "generator/families/families.h"

namespace flash_attn_jit {
namespace {

constexpr int kDimSteps = kMostNarrowHeadDim / 16;
constexpr int kMostTiles = 3;

using TileCosts = std::array<TileCost, kMostTiles>;  // those that there are stand first

constexpr TileCosts kCosts[] = {
#include "generator/tile_costs.inc"
};

// Where the data of a kind begin: they stand in the order of the kinds, without those that have none.
std::size_t first_of(KernelKind kind) {
  std::size_t before = 0;
  for (const KernelKind other : kKernelKinds) {
    if (other == kind) break;
    before += family_of(other).has_tile_costs();
  }
  return before * kAllMasks.size() * kDimSteps;
}

int distance(const TileCost& cost, const TileConfig& tile) {
  return 1000 * std::abs(cost.block_m - tile.block_m) + 100 * std::abs(cost.warps - tile.warps) +
         std::abs(cost.block_n - tile.block_n);
}

// As if each score cost as much: what is known of other tiles before they are compiled.
TileCost scaled_to(const TileConfig& tile, const TileCost& known) {
  if (distance(known, tile) == 0) return known;
  const double rows = static_cast<double>(tile.block_m) / known.block_m;
  const double scores = rows * tile.block_n / known.block_n;
  const auto cycles = [&](const BlockCycles& of) {
    return BlockCycles{static_cast<int>(of.block * rows), static_cast<int>(of.iteration * scores),
                       static_cast<int>(of.masked_iteration * scores)};
  };
  return {tile.block_m,        tile.block_n,         tile.warps, std::max(1, known.resident * known.warps / tile.warps),
          cycles(known.alone), cycles(known.sharing)};
}

}  // namespace

const TileCost& nearest_cost(const KernelSpec& spec, const TileConfig& tile) {
  if (!family_of(spec.kind).has_tile_costs()) throw Error("there are no costs for such a kernel: " + spec.text());
  const auto mask = static_cast<std::size_t>(std::ranges::find(kAllMasks, spec.mask) - kAllMasks.begin());
  const std::size_t place =
      first_of(spec.kind) + mask * kDimSteps + static_cast<std::size_t>((spec.greatest_head_dim() - 1) / 16);
  if (place >= std::size(kCosts))
    throw Error("generator/tile_costs.inc has no costs of kind " + std::string(to_text(spec.kind)) +
                "; tools/tile_costs makes them");
  const TileCosts& costs = kCosts[place];
  const TileCost* nearest = costs.data();
  for (const TileCost& cost : costs)
    if (cost.resident > 0 && distance(cost, tile) < distance(*nearest, tile)) nearest = &cost;
  return *nearest;
}

TileCost tile_cost(const KernelSpec& spec, const TileConfig& tile) { return scaled_to(tile, nearest_cost(spec, tile)); }

}  // namespace flash_attn_jit
