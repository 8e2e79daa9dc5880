// Backward, first kernel: delta = rowsum(out * dout), one number a query row.
#include "generator/families/families.h"
#include "generator/tile_rules.h"

namespace flash_attn_jit {
namespace {

constexpr std::array kRows = {
    TileRow{256, {.block_m = 64, .block_n = 0, .warps = 4, .register_dims = 0, .schedule = {0, 0, 0}}},
};

TileTables tiles(const KernelSpec&) { return {TileTableList{kRows}}; }

std::optional<std::string> check_tile(const KernelSpec& spec) {
  const TileConfig& tile = spec.tile;
  if (tile.block_n == 0 && tile.register_dims == 0 && tile.schedule == LoopSchedule{0, 0, 0}) return std::nullopt;
  return tile_name(spec) + " is for kind bwd_preprocess; accepted: 0 for all but its rows and warps, as in " +
         quoted("m64n0w4q0l0b0k0");
}

}  // namespace

const KernelFamily kBackwardPreprocessFamily = {.pack_group = "bwd",
                                                .template_file = "flash_bwd_preprocess.cuh",
                                                .function = "flash_bwd_preprocess",
                                                .params = "FlashBwdParams",
                                                .tile = "",
                                                .trait = "",
                                                .rows = RowSide::kQueries,
                                                .reads_mask = false,
                                                .products = 0,
                                                .output_splits = [](const KernelSpec&) { return 1; },
                                                .shared_bytes = [](const KernelSpec&) { return 0; },
                                                .registers = [](const KernelSpec&) { return 32; },
                                                .check_tile = check_tile,
                                                .default_tiles = tiles,
                                                .schedules = {}};

}  // namespace flash_attn_jit
