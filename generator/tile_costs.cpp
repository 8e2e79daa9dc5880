#include "generator/tile_costs.h"

#include <algorithm>
#include <array>
#include <cstdlib>

#include "generator/errors.h"
#include "generator/legality.h"

namespace flash_attn_jit {
namespace {

constexpr int kDimSteps = kMostHeadDim / 16;
constexpr int kMostTiles = 3;

using TileCosts = std::array<TileCost, kMostTiles>;  // those that there are stand first

constexpr TileCosts kCosts[] = {
#include "generator/tile_costs.inc"
};

// The kinds that the data has, in its order; a kernel without a main loop has one tile.
constexpr std::array kKinds = {KernelKind::kForward, KernelKind::kBackwardDkDv, KernelKind::kBackwardDq,
                               KernelKind::kBackwardAllKeys};
static_assert(std::size(kCosts) == kKinds.size() * kAllMasks.size() * kDimSteps);

int distance(const TileCost& cost, const TileConfig& tile) {
  return 1000 * std::abs(cost.block_m - tile.block_m) + 100 * std::abs(cost.warps - tile.warps) +
         std::abs(cost.block_n - tile.block_n);
}

}  // namespace

const TileCost& tile_cost(const KernelSpec& spec, const TileConfig& tile) {
  const auto kind = std::ranges::find(kKinds, spec.kind);
  if (kind == kKinds.end()) throw Error("there are no costs for this kind of kernel: " + spec.text());
  const auto mask = static_cast<std::size_t>(std::ranges::find(kAllMasks, spec.mask) - kAllMasks.begin());
  const auto place = static_cast<std::size_t>(kind - kKinds.begin()) * kAllMasks.size() + mask;
  const TileCosts& costs = kCosts[place * kDimSteps + static_cast<std::size_t>(spec.padded_head_dim() / 16 - 1)];
  const TileCost* nearest = costs.data();
  for (const TileCost& cost : costs)
    if (cost.resident > 0 && distance(cost, tile) < distance(*nearest, tile)) nearest = &cost;
  return *nearest;
}

}  // namespace flash_attn_jit
