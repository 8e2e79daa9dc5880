// Backward, first kernel: delta = rowsum(out * dout), one number a query row.
#include "generator/families/families.h"
#include "generator/tile_rules.h"

namespace flash_attn_jit {
namespace {

constexpr std::array kRows = {
    TileRow{256, {.block_m = 64, .block_n = 0, .warps = 4, .register_dims = 0, .schedule = {0, 0, 0}}},
};

TileTables tiles(const KernelSpec&) { return {TileTableList{kRows}}; }

}  // namespace

constinit const KernelFamily kBackwardPreprocessFamily = {.word = "bwd_preprocess",
                                                          .pack_group = "bwd",
                                                          .template_file = "flash_bwd_preprocess.cuh",
                                                          .function = "flash_bwd_preprocess",
                                                          .params = "FlashBwdParams",
                                                          .results = {.delta = true},
                                                          .rows = RowSide::kQueries,
                                                          .reads_mask = false,
                                                          .reads_values_alone = true,
                                                          .registers = [](const KernelSpec&) { return 32; },
                                                          .check_tile = check_rows_alone,
                                                          .default_tiles = tiles};

}  // namespace flash_attn_jit
