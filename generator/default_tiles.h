// The default tiles: data with its source beside each row. The tuner's records will stand in front of it.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "generator/kernel_spec.h"
#include "generator/legality.h"

namespace flash_attn_jit {

// What decides between the rows of the table.
struct ProblemSize {
  std::int64_t seqlen_q = 0;
  std::int64_t batch_heads = 0;  // batch x num_heads
  int multiprocessors = 0;       // of the device
};

// Every default tile for `spec`'s kind, head dim and access on `arch`, the one for large problems first.
// `spec.tile` is not read.
std::vector<TileConfig> default_tiles(const KernelSpec& spec, const ArchLimits& arch);

// The row that applies: the first whose blocks fill the device, else the last. Throws UnsupportedError where the table
// has none (head dims above 256).
TileConfig choose_tile(const KernelSpec& spec, const ArchLimits& arch, const ProblemSize& size);

// The tile space: every tile that the tuner may try and the tests execute.
std::vector<TileConfig> tile_space(const KernelSpec& spec, const ArchLimits& arch);

}  // namespace flash_attn_jit
