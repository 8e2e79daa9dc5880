// Before a forward pass over a cache: new keys and values go into it, a row of a head for each warp.
#include "generator/families/families.h"
#include "generator/tile_rules.h"

namespace flash_attn_jit {

constinit const KernelFamily kAppendFamily = {.word = "append",
                                              .pack_group = "decode",
                                              .template_file = "flash_append.cuh",
                                              .function = "flash_append",
                                              .params = "FlashAppendParams",
                                              .results = {.cache = true},
                                              .rows = RowSide::kKeys,
                                              .reads_mask = false,
                                              .most_head_dim = kMostHeadDim,
                                              .registers = [](const KernelSpec&) { return 32; },
                                              .is_tuned = false,
                                              .check_tile = check_row_of_a_warp,
                                              .default_tiles = row_of_a_warp_tiles};

}  // namespace flash_attn_jit
