// Forward of head dims above 256: four warps share 32 rows, each with a quarter of the head dims.
#include <algorithm>

#include "generator/families/families.h"
#include "generator/tile_layout.h"
#include "generator/tile_rules.h"

namespace flash_attn_jit {
namespace {

constexpr int kSharers = 4;  // the trait kDimSplits

// 64 rows are what a multiprocessor's registers hold. At 512 the main loop spills (7 loads an iteration; NVRTC 12.9).
constexpr std::array kLarge = {
    TileRow{320, {.block_m = 64, .block_n = 8, .warps = 8, .register_dims = 80, .schedule = {4, 4, 8}}},
    TileRow{384, {.block_m = 64, .block_n = 8, .warps = 8, .register_dims = 96, .schedule = {4, 4, 8}}},
    TileRow{448, {.block_m = 64, .block_n = 8, .warps = 8, .register_dims = 112, .schedule = {4, 4, 8}}},
    TileRow{512, {.block_m = 64, .block_n = 8, .warps = 8, .register_dims = 128, .schedule = {4, 4, 8}}},
};

TileTables tiles(const KernelSpec&) { return {TileTableList{kLarge}}; }

int dims_of_warp(const KernelSpec& spec) { return kernel_dims(spec) / kSharers; }

std::optional<std::string> check_tile(const KernelSpec& spec) {
  const TileConfig& tile = spec.tile;
  if (tile.warps % kSharers != 0 || tile.block_m != 8 * tile.warps)
    return tile_name(spec) + " has " + std::to_string(tile.block_m) + " rows for " + std::to_string(tile.warps) +
           " warps; accepted: 32 rows for every four warps";
  if (tile.block_n != 8)
    return tile_name(spec) + " has " + std::to_string(tile.block_n) + " keys an iteration; accepted: 8";
  const LoopSchedule& at = tile.schedule;
  if (at.barrier < 0 || at.barrier > at.load || at.load > 8 || at.first_keys < 0 || at.first_keys > 8)
    return schedule_name(spec) + "0 to 8, tiles stored where the next are loaded or before, 8 for K fragments";
  if (const int dims = tile.register_dims; dims < 0 || dims > dims_of_warp(spec) || dims % 16 != 0)
    return tile_name(spec) + " keeps " + std::to_string(dims) +
           " head dims in registers; accepted: multiples of 16 up to " + std::to_string(dims_of_warp(spec));
  return std::nullopt;
}

// Twice: a tile of K, one of V, and what sharers hand each other of each warp's rows, nine words a lane, and a number
// for each of them; then the rows of Q that registers do not hold.
int shared_bytes(const KernelSpec& spec) {
  const TileConfig& tile = spec.tile;
  const int exchange = tile.warps * (kSharers * 2 + 1) * 32 * 4 + tile.block_m * 4;
  const int shared_dims = dims_of_warp(spec) - tile.register_dims;
  const int query_bytes = shared_dims > 0 ? tile.warps * rows_of_warp(spec) * row_pitch(shared_dims) : 0;
  return 2 * (2 * tile.block_n * row_pitch(kernel_dims(spec)) + exchange) + query_bytes;
}

int registers(const KernelSpec& spec) {
  const int m_tiles = row_tiles_of_warp(spec);
  const int acc_o = m_tiles * dims_of_warp(spec) / 2, scores = m_tiles * spec.tile.block_n / 2;
  return acc_o + row_registers(spec, dims_of_warp(spec)) + 2 * scores + kFragmentAndAddressRegisters;
}

}  // namespace

constinit const KernelFamily kForwardWideFamily = {.word = "fwd_wide",
                                                   .pack_group = "fwd",
                                                   .template_file = "flash_fwd_wide.cuh",
                                                   .function = "flash_fwd_wide",
                                                   .params = "FlashFwdParams",
                                                   .tile = "FlashFwdWideTile",
                                                   .trait = "  static constexpr int kDimSplits = 4;\n",
                                                   .results = {.out = true},
                                                   .rows = RowSide::kQueries,
                                                   .reads_mask = true,
                                                   .dim_splits = kSharers,
                                                   .least_head_dim = kMostNarrowHeadDim + 1,
                                                   .most_head_dim = kMostHeadDim,
                                                   .products = 2,
                                                   .value_products = 1,
                                                   .shared_bytes = shared_bytes,
                                                   .registers = registers,
                                                   .is_tuned = false,
                                                   .check_tile = check_tile,
                                                   .default_tiles = tiles};

}  // namespace flash_attn_jit
