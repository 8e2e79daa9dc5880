// Forward of few queries: a warp has 16 rows, those that share them take turns with the keys, and so do blocks.
#include "generator/families/families.h"
#include "generator/tile_layout.h"
#include "generator/tile_rules.h"

namespace flash_attn_jit {
namespace {

constexpr int kRowsOfWarp = 16;
constexpr int kMergedDims = 64;  // of the warps' results, put together at a time

// Registers hold a tile's keys and values: 16 of them up to head dim 128. Above it they hold a part of the queries, as
// much as spills nothing.
template <int kRows>
constexpr std::array kTiles = {
    TileRow{128, {.block_m = kRows, .block_n = 16, .warps = 4, .register_dims = 128, .schedule = {0, 0, 0}}},
    TileRow{192, {.block_m = kRows, .block_n = 8, .warps = 4, .register_dims = 128, .schedule = {0, 0, 0}}},
    TileRow{256, {.block_m = kRows, .block_n = 8, .warps = 4, .register_dims = 32, .schedule = {0, 0, 0}}},
};

// With more rows a block more warps read the same keys: the first of them from L2, the others from L1.
TileTables tiles(const KernelSpec&) {
  return {TileTableList{kTiles<64>}, TileTableList{kTiles<32>}, TileTableList{kTiles<16>}};
}

std::optional<std::string> check_tile(const KernelSpec& spec) {
  const TileConfig& tile = spec.tile;
  const int row_groups = tile.block_m / kRowsOfWarp;
  if (row_groups < 1 || tile.block_m % kRowsOfWarp != 0 || tile.warps % row_groups != 0)
    return tile_name(spec) + " has " + std::to_string(tile.block_m) + " rows for " + std::to_string(tile.warps) +
           " warps; accepted: 16 rows for each, or for each two, three and so on";
  if (tile.block_n != 8 && tile.block_n != 16)
    return tile_name(spec) + " has " + std::to_string(tile.block_n) + " keys an iteration of a warp; accepted: 8 or 16";
  if (tile.schedule != LoopSchedule{0, 0, 0})
    return tile_name(spec) + " is for kind " + std::string(to_text(spec.kind)) + "; accepted: 0 for its schedule";
  return check_register_dims(spec);
}

int chunks_of_queries(int dims) { return (dims + 31) / 32; }

// O of each warp, then its row_max and row_sum; the queries that registers do not hold, 2 x 32 x 16 bytes a chunk.
int shared_bytes(const KernelSpec& spec) {
  const TileConfig& tile = spec.tile;
  const int shared_chunks = chunks_of_queries(spec.head_dim) - chunks_of_queries(tile.register_dims);
  return tile.warps * kRowsOfWarp * ((kMergedDims + 4) * 4 + 8) + tile.block_m / kRowsOfWarp * shared_chunks * 1024;
}

int registers(const KernelSpec& spec) {
  const int key_chunks = chunks_of_queries(spec.head_dim), value_chunks = (spec.head_dim + 63) / 64;
  const int steps = spec.tile.block_n / 8;
  const int acc_o = 32 * value_chunks, queries = 2 * 4 * chunks_of_queries(spec.tile.register_dims);
  const int tile = steps * 4 * (key_chunks + 2 * value_chunks), scores = 4 * steps;
  // What the operands of products under way hold twice, ptxas finds room for or spills.
  return std::min(acc_o + queries + tile + scores + kFragmentAndAddressRegisters, 255);
}

constexpr std::array kColumns = {8, 16};
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
                                              .shared_bytes = shared_bytes,
                                              .registers = registers,
                                              .is_tuned = false,
                                              .check_tile = check_tile,
                                              .default_tiles = tiles,
                                              .space = {kColumns, kSchedules}};

}  // namespace flash_attn_jit
