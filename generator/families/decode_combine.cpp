// Behind the decode kernel: the splits of a row, put together by a warp.
#include "generator/families/families.h"
#include "generator/tile_rules.h"

namespace flash_attn_jit {

constinit const KernelFamily kDecodeCombineFamily = {.word = "decode_combine",
                                                     .pack_group = "decode",
                                                     .template_file = "flash_decode_combine.cuh",
                                                     .function = "flash_decode_combine",
                                                     .params = "FlashDecodeParams",
                                                     .results = {.out = true},
                                                     .rows = RowSide::kQueries,
                                                     .reads_mask = false,
                                                     .reads_values_alone = true,
                                                     .registers = [](const KernelSpec&) { return 32; },
                                                     .is_tuned = false,
                                                     .check_tile = check_row_of_a_warp,
                                                     .default_tiles = row_of_a_warp_tiles};

}  // namespace flash_attn_jit
