// What blocks cost on a Turing multiprocessor, in cycles, as the card's model says of every default tile: by this the
// library chooses among them. Data, made by tools/tile_costs.
#pragma once

#include "generator/kernel_spec.h"

namespace flash_attn_jit {

struct BlockCycles {
  int block = 0, iteration = 0, masked_iteration = 0;
};

struct TileCost {
  int block_m = 0, block_n = 0, warps = 0;  // of the tile
  int resident = 0;                         // blocks that share a multiprocessor
  BlockCycles alone, sharing;               // of a block that has it to itself, and of each of `resident`
};

// Of `tile` for the spec's kind, mask and head dim. Features change the cost of all tiles: those of plain kernels are
// taken. A tile that has no cost is given that of the default with the nearest number of rows. Throws Error for a
// kernel without a main loop.
const TileCost& tile_cost(const KernelSpec& spec, const TileConfig& tile);

}  // namespace flash_attn_jit
