// The tiles that a search tries, and in which order.
#pragma once

#include <vector>

#include "generator/kernel_spec.h"
#include "generator/legality.h"
#include "runtime/tuner/problem_class.h"

namespace flash_attn_jit {

// The tiles of the tile space that are for every problem of the class, the default tile first, then the likely ones:
// by promising_cycles() of the problem, where those are equal by their names.
std::vector<TileConfig> tiles_to_try(const ProblemClass& of, const Problem& problem, const TileConfig& default_tile,
                                     const ArchLimits& arch);

// What the card's model expects before a kernel is compiled: expected_cycles(), and more the further a tile lies from
// the default tiles, by whose costs that goes.
double promising_cycles(const KernelSpec& spec, const TileConfig& tile, const Problem& problem);

// How much two tiles differ, in factors of two and, within a tile's rows and columns, shares of the whole.
double tile_distance(const TileConfig& a, const TileConfig& b);

}  // namespace flash_attn_jit
