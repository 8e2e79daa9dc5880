#include "runtime/tuner/candidates.h"

#include <algorithm>
#include <cmath>
#include <tuple>

#include "generator/tile_chooser.h"

namespace flash_attn_jit {
namespace {

double doublings(int a, int b) { return a > 0 && b > 0 ? std::fabs(std::log2(static_cast<double>(a) / b)) : a != b; }

}  // namespace

double tile_distance(const TileConfig& a, const TileConfig& b) {
  const auto eighths = [](int x, int y) { return std::abs(x - y) / 8.0; };
  const double schedule = eighths(a.schedule.load, b.schedule.load) + eighths(a.schedule.barrier, b.schedule.barrier) +
                          eighths(a.schedule.first_keys, b.schedule.first_keys);
  // Registers hold most of the rows or all of them: half as much is as far as half the rows.
  const int most_dims = std::max({a.register_dims, b.register_dims, 1});
  const double dims = 2.0 * std::abs(a.register_dims - b.register_dims) / most_dims;
  return doublings(a.block_m, b.block_m) + doublings(a.block_n, b.block_n) + doublings(a.warps, b.warps) + dims +
         schedule;
}

std::vector<TileConfig> tiles_to_try(const ProblemClass& problem, const TileConfig& default_tile,
                                     const ArchLimits& arch) {
  const KernelSpec& spec = problem.spec;
  const std::vector<TileConfig> defaults = default_tiles(spec);
  const auto distance = [&](const TileConfig& tile) {
    double least = tile_distance(tile, default_tile);
    for (const TileConfig& known : defaults) least = std::min(least, tile_distance(tile, known));
    return least;
  };
  std::vector<std::tuple<bool, double, std::string, TileConfig>> ordered;
  for (const TileConfig& tile : tile_space(spec, arch))
    if (tile != default_tile && has_rows(spec, tile, problem.seqlen_k))
      ordered.emplace_back(true, distance(tile), tile.text(), tile);
  ordered.emplace_back(false, 0.0, default_tile.text(), default_tile);
  std::sort(ordered.begin(), ordered.end());
  std::vector<TileConfig> tiles;
  for (const auto& entry : ordered) tiles.push_back(std::get<TileConfig>(entry));
  return tiles;
}

}  // namespace flash_attn_jit
