// Before a forward pass over a cache: new keys and values go into it, a row of a head for each warp.
#include "generator/families/families.h"
#include "generator/tile_rules.h"

namespace flash_attn_jit {
namespace {

constexpr std::array kTiles = {
    TileRow{256, {.block_m = 4, .block_n = 0, .warps = 4, .register_dims = 0, .schedule = {0, 0, 0}}},
};

TileTables tiles(const KernelSpec&) { return {TileTableList{kTiles}}; }

}  // namespace

constinit const KernelFamily kAppendFamily = {.word = "append",
                                              .pack_group = "decode",
                                              .template_file = "flash_append.cuh",
                                              .function = "flash_append",
                                              .params = "FlashAppendParams",
                                              .results = {.cache = true},
                                              .rows = RowSide::kKeys,
                                              .reads_mask = false,
                                              .registers = [](const KernelSpec&) { return 32; },
                                              .is_tuned = false,
                                              .check_tile = check_row_of_a_warp,
                                              .default_tiles = tiles};

}  // namespace flash_attn_jit
