#include "generator/tile_chooser.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <optional>

#include "generator/errors.h"
#include "generator/families/families.h"
#include "generator/integers.h"
#include "generator/kernel_traffic.h"
#include "generator/key_splits.h"
#include "generator/tile_costs.h"
#include "generator/tile_layout.h"

namespace flash_attn_jit {
namespace {

// Of a time: the model's noise is several times as much (a kernel moves by up to 7 % with the compiler).
constexpr double kIndistinguishable = 0.03;

// Cycles from one kernel's end to the next one's beginning in a row of launches: 1.5 us.
constexpr double kLaunchGap = 2400;

// Rows of a key head that the decode kernel is thought of for: beyond them the forward kernel's tiles are full. Keys:
// kernels count them in 32 bits, past the last split's end too.
constexpr std::int64_t kMostDecodeRows = 256, kMostDecodeKeys = std::int64_t{1} << 30;

// A T4's DRAM, 320 GB/s over 40 multiprocessors of 1590 MHz; an RTX 2080 Ti has 5.9 bytes.
constexpr double kDramBytesPerCycle = 5.0;

// What L2 gives each multiprocessor of a T4 when all of them ask: with this figure the card's model meets published
// half-precision products on a T4 (github.com/alexarmbr/matmul-playground).
constexpr double kL2BytesPerCycle = 24.0;

// A kernel's side of a problem: rows are those that its blocks own, columns what its main loop goes over.
struct Sides {
  std::int64_t rows, columns, heads;
  std::int64_t seen;   // columns that a row sees, in the mean
  std::int64_t group;  // times that a block goes over the columns
};

// The columns that all rows of a triangle see together: the last row sees all, each one before it one less, none less
// than none.
std::int64_t triangle(std::int64_t rows, std::int64_t columns) {
  const std::int64_t steps = std::min(rows, columns);
  return steps * (columns - steps) + steps * (steps + 1) / 2;
}

Sides sides_of(const KernelSpec& spec, const Problem& problem) {
  const bool owns_keys = family_of(spec.kind).rows == RowSide::kKeys;
  Sides sides{problem.seqlen_q, problem.seqlen_k, problem.batch_heads, problem.seqlen_k, 1};
  if (owns_keys)
    sides = {problem.seqlen_k, problem.seqlen_q, ceil_div(problem.batch_heads, spec.group_size), problem.seqlen_q,
             spec.group_size};
  sides.rows = std::max<std::int64_t>(1, sides.rows);
  // Scores are the same, whichever side they are counted from.
  if (spec.mask == Mask::kCausal) sides.seen = triangle(problem.seqlen_q, problem.seqlen_k) / sides.rows;
  if (spec.mask == Mask::kWindow) sides.seen = std::min(sides.columns, problem.window);
  return sides;
}

// Cycles of one of `sharing` blocks, whose rows see `seen` columns in the mean.
std::int64_t cycles_of(const KernelSpec& spec, const TileCost& cost, const TileConfig& tile, const Sides& sides,
                       std::int64_t seen, std::int64_t sharing) {
  // Where a mask cuts tiles, along one edge of what is seen or along two, its first and last row see others than the
  // mean.
  const std::int64_t rows = std::min<std::int64_t>(tile.block_m, sides.rows);
  const std::int64_t spread = spec.mask == Mask::kNone ? 0 : spec.mask == Mask::kCausal ? rows / 2 : rows;
  const std::int64_t whole = std::max<std::int64_t>(0, seen - spread) / tile.block_n;
  const std::int64_t tiles = ceil_div(std::min(sides.columns, seen + spread), tile.block_n);
  // A warp leaves out those that none of its rows sees: half of them.
  const std::int64_t cut = spread > 0 ? (tiles - whole + 1) / 2 : tiles - whole;
  const auto of = [&](int BlockCycles::* part) {
    const std::int64_t alone = cost.alone.*part, shared = cost.sharing.*part;
    return cost.resident > 1 ? alone + (shared - alone) * (sharing - 1) / (cost.resident - 1) : alone;
  };
  return of(&BlockCycles::block) +
         (of(&BlockCycles::iteration) * whole + of(&BlockCycles::masked_iteration) * cut) * sides.group;
}

// Of a decode kernel: its splits are alike, and what puts them together is done soon after it begins. Each block has
// its keys and values from L2 at the least, so that a block of more rows may pay where its loop does not.
double decode_cycles(const KernelSpec& spec, const TileCost& cost, const Problem& problem) {
  const KeySplits splits = split_keys(spec, problem);
  const std::int64_t seen = spec.mask == Mask::kWindow ? std::min(problem.seqlen_k, problem.window) : problem.seqlen_k;
  const std::int64_t iterations = ceil_div(std::min<std::int64_t>(splits.keys, seen), columns_of_iteration(spec));
  const std::int64_t blocks = decode_row_blocks(spec, problem) * splits.count;
  const std::int64_t sharing = std::clamp<std::int64_t>(ceil_div(blocks, problem.multiprocessors), 1, cost.resident);
  const BlockCycles& of = sharing > 1 ? cost.sharing : cost.alone;
  const auto rounds = static_cast<double>(ceil_div(blocks, problem.multiprocessors * sharing));
  const double bytes = 2.0 * (spec.head_dim + spec.value_head_dim()) * static_cast<double>(columns_of_iteration(spec));
  const double iteration = std::max<double>(of.iteration, bytes / kL2BytesPerCycle);
  return rounds * static_cast<double>(sharing) * (of.block + iteration * static_cast<double>(iterations)) +
         (splits.count > 1 ? kLaunchGap : 0);
}

// The tables of a family, the one for large problems first.
using DefaultTiles = std::array<std::optional<TileConfig>, std::tuple_size_v<TileTables>>;

DefaultTiles find_default_tiles(KernelSpec spec) {
  const KernelFamily& family = family_of(spec.kind);
  DefaultTiles tiles;
  if (!family.has_head_dim(spec.greatest_head_dim())) return tiles;
  spec.features = spec.features.of_main_loop();
  const TileTables tables = family.default_tiles(spec);
  const int dims = greatest_kernel_dims(spec);
  for (std::size_t i = 0; i < tables.size(); ++i) tiles[i] = find_tile(tables[i], spec, dims);
  return tiles;
}

UnsupportedError mask_blocks_error(const Problem& problem) {
  return UnsupportedError({"block_mask",
                           "has blocks of " + std::to_string(problem.mask_block_q) + " queries and " +
                               std::to_string(problem.mask_block_k) + " keys",
                           "a BLOCK_SIZE of multiples of 64; 128, as create_block_mask() has it, is fastest"});
}

struct DefaultChoice {
  std::optional<TileConfig> tile;  // none: no tile is for the problem
  double cycles = std::numeric_limits<double>::infinity();
};

DefaultChoice choose_default(const KernelSpec& spec, const Problem& problem) {
  DefaultChoice best;
  for (const std::optional<TileConfig>& tile : find_default_tiles(spec)) {
    if (!tile || !has_rows(spec, *tile, problem.seqlen_k) || !fits_mask_blocks(spec, *tile, problem)) continue;
    // What costs are known of is nothing like a block mask: there the first tile that fits is taken.
    if (spec.has(Feature::kBlockMask)) return {tile, 0};
    const double cycles = expected_cycles(spec, *tile, problem);
    // What the model cannot tell apart goes to the smaller tile, whose blocks leave less of the device idle at the end.
    if (best.tile && cycles * (1 - kIndistinguishable) >= best.cycles) continue;
    best = {tile, std::min(best.cycles, cycles)};
  }
  return best;
}

// Infinite where no tile is for the problem. An attn_bias counts nothing: most are broadcast, and a cache holds them.
double cycles_with_default(KernelSpec spec, KernelKind kind, const Problem& problem) {
  spec.kind = kind;
  const auto queries = static_cast<double>(problem.batch_heads * problem.seqlen_q);
  const auto keys = static_cast<double>(problem.batch_heads * problem.seqlen_k) / spec.group_size;
  return std::max(choose_default(spec, problem).cycles,
                  kernel_traffic(spec, queries, keys, 0) / (kDramBytesPerCycle * problem.multiprocessors));
}

class DefaultTileChooser final : public TileChooser {
 public:
  TileConfig choose(const KernelSpec& spec, const Problem& problem) const override {
    require_head_dims(spec.head_dim, spec.value_head_dim());
    const DefaultChoice choice = choose_default(spec, problem);
    if (choice.tile) return *choice.tile;
    if (spec.has(Feature::kBlockMask)) throw mask_blocks_error(problem);
    throw UnsupportedError("seqlen_k is " + std::to_string(problem.seqlen_k) + " with kind " +
                           std::string(to_text(spec.kind)) + " at head_dim " + std::to_string(spec.head_dim) +
                           ", which has no default tile with as many rows");
  }

  bool takes_all_keys(const KernelSpec& spec, const Problem& problem) const override {
    const double of_one = cycles_with_default(spec, KernelKind::kBackwardAllKeys, problem);
    if (std::isinf(of_one)) return false;  // no tile has the rows: most problems, of which nothing more is asked
    double of_three = 2 * kLaunchGap;
    for (const KernelKind kind : kSeparateBackwardKinds) of_three += cycles_with_default(spec, kind, problem);
    return of_one <= of_three;
  }

  bool takes_decode(const KernelSpec& spec, const Problem& problem) const override {
    if (problem.seqlen_q * spec.group_size > kMostDecodeRows || problem.seqlen_k > kMostDecodeKeys) return false;
    KernelSpec forward = spec, decode = spec;
    forward.kind = KernelKind::kForward;
    decode.kind = KernelKind::kDecode;
    return choose_default(decode, problem).cycles <= choose_default(forward, problem).cycles;
  }
};

// Of a block: 16 or 32 a warp; where warps share them, from those of one warp on.
std::vector<int> rows_of_space(const KernelFamily& family, int warps) {
  if (family.warps_share_rows) return {16, 32, 64, 128};
  return {16 * warps, 32 * warps};
}

bool is_legal(const KernelSpec& spec, const TileConfig& tile, const ArchLimits& arch) {
  KernelSpec with_tile = spec;
  with_tile.tile = tile;
  return !check(with_tile, arch);
}

}  // namespace

bool fits_mask_blocks(const KernelSpec& spec, const TileConfig& tile, const Problem& problem) {
  if (!spec.has(Feature::kBlockMask)) return true;
  const bool owns_keys = family_of(spec.kind).rows == RowSide::kKeys;
  const std::int64_t rows = owns_keys ? problem.mask_block_k : problem.mask_block_q;
  const std::int64_t columns = owns_keys ? problem.mask_block_q : problem.mask_block_k;
  return rows % tile.block_m == 0 && columns % tile.block_n == 0;
}

bool has_rows(const KernelSpec& spec, const TileConfig& tile, std::int64_t seqlen_k) {
  return !family_of(spec.kind).has_all_rows || tile.block_m >= seqlen_k;
}

bool has_default_tile(const KernelSpec& spec, std::int64_t seqlen_k) {
  return std::ranges::any_of(find_default_tiles(spec), [&](const std::optional<TileConfig>& tile) {
    return tile && has_rows(spec, *tile, seqlen_k);
  });
}

double expected_cycles(const KernelSpec& spec, const TileConfig& tile, const Problem& problem) {
  if (!family_of(spec.kind).has_tile_costs()) return 0;  // one tile
  const TileCost cost = tile_cost(spec, tile);
  if (family_of(spec.kind).warps_share_rows) {
    KernelSpec with_tile = spec;
    with_tile.tile = tile;
    return decode_cycles(with_tile, cost, problem);
  }
  const Sides sides = sides_of(spec, problem);
  const std::int64_t row_blocks = ceil_div(sides.rows, tile.block_m);
  const std::int64_t blocks = row_blocks * sides.heads * family_of(spec.kind).output_splits(spec);
  const auto round = [&](std::int64_t seen, std::int64_t sharing) {
    return static_cast<double>(sharing * cycles_of(spec, cost, tile, sides, seen, sharing));
  };
  const std::int64_t sharing = std::clamp<std::int64_t>(ceil_div(blocks, problem.multiprocessors), 1, cost.resident);
  const std::int64_t at_once = problem.multiprocessors * sharing;
  const auto rounds = static_cast<double>(blocks / at_once);
  const std::int64_t rest = blocks % at_once;
  if (spec.mask != Mask::kCausal || row_blocks == 1)
    return rounds * round(sides.seen, sharing) +
           (rest > 0 ? round(sides.seen, ceil_div(rest, problem.multiprocessors)) : 0);
  // Long blocks go first, so that short ones fill the end; the longest bounds it.
  const double mean = round(sides.seen, sharing), part = static_cast<double>(rest) / static_cast<double>(at_once);
  return std::max(round(sides.columns, sharing), (rounds + part + 0.5) * mean);
}

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
  const KernelFamily& family = family_of(spec.kind);
  const int dims = greatest_kernel_dims(spec), fewer_dims = family.warps_share_rows ? 0 : dims * 5 / 8 / 16 * 16;
  std::vector<TileConfig> tiles = default_tiles(spec);
  for (int warps : {2, 4, 8})
    for (int block_m : rows_of_space(family, warps))
      for (int block_n : family.space.columns)
        for (int register_dims : {dims, fewer_dims})
          for (const LoopSchedule& schedule : family.space.schedules) {
            const TileConfig tile{block_m, block_n, warps, register_dims, schedule};
            if (is_legal(spec, tile, arch)) tiles.push_back(tile);
          }
  std::sort(tiles.begin(), tiles.end());
  tiles.erase(std::unique(tiles.begin(), tiles.end()), tiles.end());
  return tiles;
}

}  // namespace flash_attn_jit
