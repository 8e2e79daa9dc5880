#include "generator/tile_chooser.h"

#include <algorithm>
#include <array>
#include <optional>

#include "generator/families/families.h"
#include "generator/tile_layout.h"

namespace flash_attn_jit {
namespace {

// Beside warps of 32 rows, those of 16 read shared memory twice as often for the same products: of the tensor cores' peak
// the cycle model of the T4 gives default kernels of head dim 64 to 128 0.55 to 0.80, most about 0.67, where it gives the
// others 0.79 to 0.94 (tools/tile_search/records).
constexpr double kCostOf16Rows = 1.3;

// What a multiprocessor loses for every block that it could hold and does not: the others run faster, but not so much that
// they make up for it.
constexpr double kCostOfMissingBlock = 1.0 / 3;

// What each block beside another costs, because each copies the same columns to shared memory for itself. It decides where
// nothing else does.
constexpr double kCostOfOwnColumns = 0.05;

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// How long a problem takes with a tile, in query rows (or rows of keys) of a whole multiprocessor: rounds of blocks, rows
// beyond the sequence's end counted, as they are computed.
double rows_of_time(const KernelSpec& spec, const TileConfig& tile, const Problem& problem) {
  const KernelFamily& family = family_of(spec.kind);
  const bool owns_keys = family.rows == RowSide::kKeys;
  const std::int64_t rows = owns_keys ? problem.seqlen_k : problem.seqlen_q;
  const std::int64_t heads = owns_keys ? ceil_div(problem.batch_heads, spec.group_size) : problem.batch_heads;
  const std::int64_t blocks = ceil_div(rows, tile.block_m) * heads * family.output_splits(spec);
  const int capacity = blocks_per_multiprocessor(tile);
  const std::int64_t resident = std::clamp<std::int64_t>(ceil_div(blocks, problem.multiprocessors), 1, capacity);
  const std::int64_t rounds = std::max<std::int64_t>(1, ceil_div(blocks, problem.multiprocessors * resident));
  const double slots = static_cast<double>(resident) + kCostOfMissingBlock * static_cast<double>(capacity - resident);
  const double cost = (tile.rows_per_warp() == 16 ? kCostOf16Rows : 1.0) * (1 + kCostOfOwnColumns * (capacity - 1));
  return static_cast<double>(rounds) * slots * tile.block_m * cost;
}

// The tables of a family, the one for large problems first.
using DefaultTiles = std::array<std::optional<TileConfig>, std::tuple_size_v<TileTables>>;

DefaultTiles find_default_tiles(const KernelSpec& spec) {
  const TileTables tables = family_of(spec.kind).default_tiles(spec);
  DefaultTiles tiles;
  for (std::size_t i = 0; i < tables.size(); ++i) tiles[i] = find_tile(tables[i], spec);
  return tiles;
}

class DefaultTileChooser final : public TileChooser {
 public:
  TileConfig choose(const KernelSpec& spec, const Problem& problem) const override {
    require_head_dim(spec.head_dim);
    std::optional<TileConfig> best;
    double least = 0;
    for (const std::optional<TileConfig>& tile : find_default_tiles(spec)) {
      if (!tile) continue;
      const double time = rows_of_time(spec, *tile, problem);
      if (best && time >= least) continue;
      best = tile;
      least = time;
    }
    return best.value();
  }
};

bool is_legal(const KernelSpec& spec, const TileConfig& tile, const ArchLimits& arch) {
  KernelSpec with_tile = spec;
  with_tile.tile = tile;
  return !check(with_tile, arch);
}

}  // namespace

const TileChooser& default_tile_chooser() {
  static const DefaultTileChooser chooser;
  return chooser;
}

std::vector<TileConfig> default_tiles(const KernelSpec& spec) {
  std::vector<TileConfig> tiles;
  for (const std::optional<TileConfig>& tile : find_default_tiles(spec))
    if (tile && std::find(tiles.begin(), tiles.end(), *tile) == tiles.end()) tiles.push_back(*tile);
  return tiles;
}

std::vector<TileConfig> tile_space(const KernelSpec& spec, const ArchLimits& arch) {
  const int dims = spec.padded_head_dim();
  std::vector<TileConfig> tiles = default_tiles(spec);
  for (int warps : {2, 4, 8})
    for (int rows : {16, 32})
      for (int block_n : {8, 16, 24, 32})
        for (int register_dims : {dims, dims * 5 / 8 / 16 * 16})
          for (const LoopSchedule& schedule : family_of(spec.kind).schedules) {
            const TileConfig tile{warps * rows, block_n, warps, register_dims, schedule};
            if (is_legal(spec, tile, arch)) tiles.push_back(tile);
          }
  std::sort(tiles.begin(), tiles.end());
  tiles.erase(std::unique(tiles.begin(), tiles.end()), tiles.end());
  return tiles;
}

}  // namespace flash_attn_jit
