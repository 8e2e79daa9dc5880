// Forward of few queries: a warp has 16 or 32 rows, those that share them take turns with the keys, and so do blocks.
#include "generator/families/families.h"
#include "generator/tile_layout.h"
#include "generator/tile_rules.h"

namespace flash_attn_jit {
namespace {

constexpr int kMergedDims = 64;  // of the warps' results, put together at a time

// Registers hold a tile's keys and values. With 16 rows a warp they hold the queries too, above head dim 128 as much of
// them as spills nothing; with 32 they have more to do with a tile, and shared memory holds the queries.
// (With bfloat16 32 rows spill up to 36 bytes at head dim 128.)
constexpr std::array kFewRows = {
    TileRow{128, {.block_m = 16, .block_n = 16, .warps = 4, .register_dims = 128, .schedule = {0, 0, 0}}},
    TileRow{192, {.block_m = 16, .block_n = 8, .warps = 4, .register_dims = 128, .schedule = {0, 0, 0}}},
    TileRow{256, {.block_m = 16, .block_n = 8, .warps = 4, .register_dims = 32, .schedule = {0, 0, 0}}},
};
template <int kRows>
constexpr std::array kManyRows = {
    TileRow{64, {.block_m = kRows, .block_n = 32, .warps = 4, .register_dims = 0, .schedule = {0, 0, 0}}},
    TileRow{128, {.block_m = kRows, .block_n = 8, .warps = 4, .register_dims = 0, .schedule = {0, 0, 0}}},
    TileRow{192, {.block_m = kRows, .block_n = 8, .warps = 4, .register_dims = 128, .schedule = {0, 0, 0}}},
    TileRow{256, {.block_m = kRows, .block_n = 8, .warps = 4, .register_dims = 32, .schedule = {0, 0, 0}}},
};
// What scores are made of has no room beside 32 keys, and pages of 16 rows hold no tile of them.
template <int kRows>
constexpr std::array kManyRowsOfFewerKeys = {
    TileRow{64, {.block_m = kRows, .block_n = 16, .warps = 4, .register_dims = 64, .schedule = {0, 0, 0}}},
};

template <int kRows>
TileTableList many_rows(const KernelSpec& spec) {
  const bool fewer_keys = spec.mask == Mask::kWindow || spec.features.change_scores() || spec.has(Feature::kPaged);
  return {only_if(fewer_keys, kManyRowsOfFewerKeys<kRows>), kManyRows<kRows>};
}

// With more rows a block more warps read the same keys: the first of them from L2, the others from L1.
TileTables tiles(const KernelSpec& spec) { return {many_rows<64>(spec), many_rows<32>(spec), TileTableList{kFewRows}}; }

std::optional<std::string> check_tile(const KernelSpec& spec) {
  const TileConfig& tile = spec.tile;
  const int rows = tile.block_m >= 16 ? rows_of_warp(spec) : 16, row_groups = tile.block_m / rows;
  if (row_groups < 1 || tile.block_m % rows != 0 || tile.warps % row_groups != 0)
    return tile_name(spec) + " has " + std::to_string(tile.block_m) + " rows for " + std::to_string(tile.warps) +
           " warps; accepted: " + std::to_string(rows) + " rows for each, or for each two, three and so on";
  if (tile.block_n < 8 || tile.block_n > 32 || tile.block_n % 8 != 0)
    return tile_name(spec) + " has " + std::to_string(tile.block_n) +
           " keys an iteration of a warp; accepted: 8, 16, 24 or 32";
  if (tile.schedule != LoopSchedule{0, 0, 0})
    return tile_name(spec) + " is for kind " + std::string(to_text(spec.kind)) + "; accepted: 0 for its schedule";
  return check_register_dims(spec);
}

int chunks(int dims) { return (dims + 31) / 32; }
int register_chunks(const KernelSpec& spec) { return chunks(register_dims(spec, kernel_dims(spec))); }

// The queries that registers do not hold; in their place, later, O of the warps that others put together, and behind
// both those warps' row_max and row_sum.
int shared_bytes(const KernelSpec& spec) {
  const TileConfig& tile = spec.tile;
  const int shared_chunks = chunks(spec.head_dim) - register_chunks(spec);
  const int rows = rows_of_warp(spec), merged_rows = tile.warps * rows - tile.block_m;
  return std::max(tile.block_m * shared_chunks * 64, merged_rows * kMergedDims * 4) + merged_rows * 8;
}

int registers(const KernelSpec& spec) {
  const int key_chunks = chunks(spec.head_dim), value_chunks = (spec.value_head_dim() + 63) / 64;
  const int steps = spec.tile.block_n / 8, m_tiles = row_tiles_of_warp(spec);
  const int acc_o = 32 * value_chunks * m_tiles, queries = 8 * register_chunks(spec) * m_tiles;
  const int tile = steps * 4 * (key_chunks + 2 * value_chunks), scores = 4 * steps * m_tiles;
  // What the operands of products under way hold twice, ptxas finds room for or spills.
  return std::min(acc_o + queries + tile + scores + kFragmentAndAddressRegisters, 255);
}

constexpr std::array kColumns = {8, 16, 32};
constexpr std::array kSchedules = {LoopSchedule{0, 0, 0}};

}  // namespace

constinit const KernelFamily kDecodeFamily = {.word = "decode",
                                              .pack_group = "decode",
                                              .template_file = "flash_decode.cuh",
                                              .function = "flash_decode",
                                              .params = "FlashDecodeParams",
                                              .tile = "FlashDecodeTile",
                                              .results = {.out = true},
                                              .rows = RowSide::kQueries,
                                              .reads_mask = true,
                                              .warps_share_rows = true,
                                              .products = 2,
                                              .value_products = 1,
                                              .shared_bytes = shared_bytes,
                                              .registers = registers,
                                              .check_tile = check_tile,
                                              .default_tiles = tiles,
                                              .space = {kColumns, kSchedules}};

}  // namespace flash_attn_jit
