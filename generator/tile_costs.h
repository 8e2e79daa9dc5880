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

// For the spec's kind, mask and head dim the cost of `tile`, or of the default with the nearest number of rows.
// Features change the cost of all tiles: those of plain kernels are taken. Throws Error for a kernel without a main
// loop.
const TileCost& nearest_cost(const KernelSpec& spec, const TileConfig& tile);

// That, for the rows, columns and warps that `tile` has.
TileCost tile_cost(const KernelSpec& spec, const TileConfig& tile);

}  // namespace flash_attn_jit
