// The tiles that a search tries, in the order in which it does without a model.
#pragma once

#include <vector>

#include "generator/kernel_spec.h"
#include "generator/legality.h"
#include "runtime/tuner/problem_class.h"

namespace flash_attn_jit {

// The tiles of the tile space that are for every problem of the class, the default tile first, then by how little a
// tile differs from one of the default tiles: what is near a good tile is likely to be good. Tiles that differ by as
// much are in the order of their names.
std::vector<TileConfig> tiles_to_try(const ProblemClass& problem, const TileConfig& default_tile,
                                     const ArchLimits& arch);

// How much two tiles differ, in factors of two and, within a tile's rows and columns, shares of the whole.
double tile_distance(const TileConfig& a, const TileConfig& b);

}  // namespace flash_attn_jit
