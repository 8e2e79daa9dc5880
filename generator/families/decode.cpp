// Forward of few queries: a block's warps share its 16 rows and split the keys, which also blocks do.
#include "generator/families/families.h"
#include "generator/tile_layout.h"
#include "generator/tile_rules.h"

namespace flash_attn_jit {
namespace {

constexpr int kRows = 16;
constexpr int kMergedDims = 64;  // of the warps' results, put together at a time

// Registers hold a tile's keys and values: 16 of them up to head dim 128.
constexpr std::array kTiles = {
    TileRow{128, {.block_m = kRows, .block_n = 16, .warps = 4, .register_dims = 128, .schedule = {0, 0, 0}}},
    TileRow{256, {.block_m = kRows, .block_n = 8, .warps = 4, .register_dims = 256, .schedule = {0, 0, 0}}},
};

TileTables tiles(const KernelSpec&) { return {TileTableList{kTiles}}; }

std::optional<std::string> check_tile(const KernelSpec& spec) {
  const TileConfig& tile = spec.tile;
  if (tile.block_m != kRows)
    return tile_name(spec) + " has " + std::to_string(tile.block_m) + " rows; accepted: " + std::to_string(kRows) +
           ", which its warps share";
  if (tile.block_n != 8 && tile.block_n != 16)
    return tile_name(spec) + " has " + std::to_string(tile.block_n) + " keys an iteration of a warp; accepted: 8 or 16";
  if (tile.register_dims != spec.padded_head_dim() || tile.schedule != LoopSchedule{0, 0, 0})
    return tile_name(spec) + " is for kind " + std::string(to_text(spec.kind)) + "; accepted: all " +
           std::to_string(spec.padded_head_dim()) + " head dims in registers, and 0 for its schedule";
  return std::nullopt;
}

int shared_bytes(const KernelSpec& spec) {
  return spec.tile.warps * kRows * ((kMergedDims + 4) * 4 + 8);  // O of each warp, then its row_max and row_sum
}

int registers(const KernelSpec& spec) {
  const int key_chunks = (spec.head_dim + 31) / 32, value_chunks = (spec.head_dim + 63) / 64;
  const int steps = spec.tile.block_n / 8;
  const int acc_o = 32 * value_chunks, queries = 2 * 4 * key_chunks;
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
                                              .check_tile = check_tile,
                                              .default_tiles = tiles,
                                              .space = {kColumns, kSchedules}};

}  // namespace flash_attn_jit
