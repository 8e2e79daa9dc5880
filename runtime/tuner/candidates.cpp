#include "runtime/tuner/candidates.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>

#include "generator/tile_chooser.h"

namespace flash_attn_jit {
namespace {

double doublings(int a, int b) { return a > 0 && b > 0 ? std::fabs(std::log2(static_cast<double>(a) / b)) : a != b; }

// Of six problems (forward, dQ, dK and dV; head dims 64 and 128) the 20 tiles that this puts first take 1.24 times as
// long as the best, in the mean and by the model of the compiled kernels; without doubt 1.61, by distance alone 1.31.
constexpr double kDoubt = 0.2;

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

double promising_cycles(const KernelSpec& spec, const TileConfig& tile, const Problem& problem) {
  double distance = std::numeric_limits<double>::infinity();
  for (const TileConfig& known : default_tiles(spec)) distance = std::min(distance, tile_distance(tile, known));
  return (1 + kDoubt * distance) * expected_cycles(spec, tile, problem);
}

std::vector<TileConfig> tiles_to_try(const ProblemClass& of, const Problem& problem, const TileConfig& default_tile,
                                     const ArchLimits& arch) {
  std::vector<std::tuple<double, std::string, TileConfig>> ordered;
  for (const TileConfig& tile : tile_space(of.spec, arch))
    if (tile != default_tile && has_rows(of.spec, tile, of.seqlen_k))
      ordered.emplace_back(promising_cycles(of.spec, tile, problem), tile.text(), tile);
  std::sort(ordered.begin(), ordered.end());
  std::vector<TileConfig> tiles{default_tile};
  for (const auto& [cycles, name, tile] : ordered) tiles.push_back(tile);
  return tiles;
}

}  // namespace flash_attn_jit
