#include "generator/default_tiles.h"

#include <algorithm>
#include <array>
#include <optional>
#include <string>

#include "generator/errors.h"

namespace flash_attn_jit {
namespace {

// One row of a table: for head dims up to max_head_dim, padded to 16.
struct TileRow {
  int max_head_dim;
  TileConfig tile;  // register_dims is an upper bound: smaller head dims keep all of Q in registers
};

// Forward, sm_75 and above. The rows for large problems come from a search over schedules, with a cycle model of the T4
// as the first judge and times on a newer GPU that runs the same instructions as the second. Above 128 a warp has 16
// rows: 32 rows of O alone would take more registers than there are.
constexpr std::array kLargeFull = {
    TileRow{48, {.block_m = 256, .block_n = 32, .warps = 8, .register_dims = 48, .schedule = {2, 6, 8}}},
    TileRow{64, {.block_m = 256, .block_n = 32, .warps = 8, .register_dims = 64, .schedule = {2, 5, 7}}},
    TileRow{96, {.block_m = 256, .block_n = 16, .warps = 8, .register_dims = 80, .schedule = {2, 5, 7}}},
    TileRow{112, {.block_m = 256, .block_n = 16, .warps = 8, .register_dims = 64, .schedule = {1, 6, 8}}},
    TileRow{128, {.block_m = 256, .block_n = 16, .warps = 8, .register_dims = 64, .schedule = {2, 7, 7}}},
    TileRow{160, {.block_m = 128, .block_n = 16, .warps = 8, .register_dims = 160, .schedule = {0, 8, 8}}},
    TileRow{224, {.block_m = 128, .block_n = 16, .warps = 8, .register_dims = 192, .schedule = {2, 4, 4}}},
    TileRow{256, {.block_m = 128, .block_n = 16, .warps = 8, .register_dims = 160, .schedule = {0, 8, 8}}},
};

// The causal kernel is a different program to ptxas, with winners of its own.
constexpr std::array kLargeCausal = {
    TileRow{32, {.block_m = 128, .block_n = 32, .warps = 4, .register_dims = 32, .schedule = {0, 4, 7}}},
    TileRow{64, {.block_m = 256, .block_n = 32, .warps = 8, .register_dims = 64, .schedule = {2, 4, 4}}},
    TileRow{96, {.block_m = 256, .block_n = 16, .warps = 8, .register_dims = 80, .schedule = {2, 5, 7}}},
    TileRow{128, {.block_m = 256, .block_n = 16, .warps = 8, .register_dims = 64, .schedule = {5, 8, 8}}},
    TileRow{224, {.block_m = 128, .block_n = 16, .warps = 8, .register_dims = 192, .schedule = {2, 4, 4}}},
    TileRow{256, {.block_m = 128, .block_n = 16, .warps = 8, .register_dims = 208, .schedule = {3, 7, 7}}},
};

// Loads of one element at a time take registers for addresses, so that a warp has 16 rows at every head dim.
constexpr std::array kLargeElement = {
    TileRow{128, {.block_m = 128, .block_n = 16, .warps = 8, .register_dims = 128, .schedule = {2, 4, 7}}},
    TileRow{256, {.block_m = 128, .block_n = 16, .warps = 8, .register_dims = 208, .schedule = {2, 8, 8}}},
};

constexpr std::array kSmall = {
    TileRow{128, {.block_m = 64, .block_n = 16, .warps = 4, .register_dims = 128, .schedule = {2, 4, 7}}},
    TileRow{256, {.block_m = 64, .block_n = 16, .warps = 4, .register_dims = 192, .schedule = {2, 8, 8}}},
};

// Backward, chosen like forward's. 32 rows a warp halve the reads of shared memory, which bind it, as far as the
// registers hold their gradients and operands: dQ to 96, dK and dV, which are two gradients, to 64.
constexpr std::array kLargeDqFull = {
    TileRow{48, {.block_m = 256, .block_n = 32, .warps = 8, .register_dims = 48, .schedule = {0, 6, 8}}},
    TileRow{64, {.block_m = 256, .block_n = 24, .warps = 8, .register_dims = 64, .schedule = {0, 7, 8}}},
    TileRow{80, {.block_m = 256, .block_n = 16, .warps = 8, .register_dims = 80, .schedule = {0, 7, 8}}},
    TileRow{96, {.block_m = 256, .block_n = 16, .warps = 8, .register_dims = 96, .schedule = {4, 8, 8}}},
    TileRow{112, {.block_m = 128, .block_n = 32, .warps = 8, .register_dims = 112, .schedule = {0, 6, 8}}},
    TileRow{128, {.block_m = 128, .block_n = 16, .warps = 8, .register_dims = 128, .schedule = {2, 5, 8}}},
    TileRow{160, {.block_m = 128, .block_n = 16, .warps = 8, .register_dims = 160, .schedule = {0, 6, 8}}},
    TileRow{224, {.block_m = 128, .block_n = 8, .warps = 8, .register_dims = 192, .schedule = {0, 8, 8}}},
    TileRow{256, {.block_m = 64, .block_n = 8, .warps = 4, .register_dims = 112, .schedule = {0, 8, 8}}},
};
constexpr std::array kLargeDqCausal = {
    TileRow{48, {.block_m = 256, .block_n = 32, .warps = 8, .register_dims = 48, .schedule = {0, 6, 8}}},
    TileRow{64, {.block_m = 128, .block_n = 24, .warps = 4, .register_dims = 64, .schedule = {3, 6, 8}}},
    TileRow{80, {.block_m = 256, .block_n = 16, .warps = 8, .register_dims = 80, .schedule = {1, 7, 8}}},
    TileRow{96, {.block_m = 256, .block_n = 16, .warps = 8, .register_dims = 96, .schedule = {3, 8, 8}}},
    TileRow{112, {.block_m = 128, .block_n = 32, .warps = 8, .register_dims = 112, .schedule = {2, 5, 8}}},
    TileRow{128, {.block_m = 128, .block_n = 16, .warps = 8, .register_dims = 128, .schedule = {2, 5, 8}}},
    TileRow{160, {.block_m = 128, .block_n = 16, .warps = 8, .register_dims = 160, .schedule = {0, 6, 8}}},
    TileRow{224, {.block_m = 128, .block_n = 8, .warps = 8, .register_dims = 192, .schedule = {0, 8, 8}}},
    TileRow{256, {.block_m = 64, .block_n = 8, .warps = 4, .register_dims = 128, .schedule = {0, 8, 8}}},
};
constexpr std::array kLargeDkDvFull = {
    TileRow{32, {.block_m = 256, .block_n = 32, .warps = 8, .register_dims = 32, .schedule = {4, 6, 8}}},
    TileRow{48, {.block_m = 256, .block_n = 16, .warps = 8, .register_dims = 48, .schedule = {2, 6, 8}}},
    TileRow{64, {.block_m = 256, .block_n = 32, .warps = 8, .register_dims = 64, .schedule = {7, 8, 8}}},
    TileRow{80, {.block_m = 128, .block_n = 32, .warps = 8, .register_dims = 80, .schedule = {1, 5, 8}}},
    TileRow{96, {.block_m = 128, .block_n = 16, .warps = 8, .register_dims = 96, .schedule = {0, 6, 8}}},
    TileRow{128, {.block_m = 128, .block_n = 16, .warps = 8, .register_dims = 128, .schedule = {1, 8, 8}}},
    TileRow{160, {.block_m = 128, .block_n = 16, .warps = 8, .register_dims = 160, .schedule = {2, 6, 8}}},
    TileRow{192, {.block_m = 128, .block_n = 8, .warps = 8, .register_dims = 192, .schedule = {0, 8, 8}}},
    TileRow{224, {.block_m = 128, .block_n = 8, .warps = 8, .register_dims = 176, .schedule = {0, 8, 8}}},
    TileRow{256, {.block_m = 64, .block_n = 8, .warps = 4, .register_dims = 112, .schedule = {0, 8, 8}}},
};
constexpr std::array kLargeDkDvCausal = {
    TileRow{32, {.block_m = 256, .block_n = 32, .warps = 8, .register_dims = 32, .schedule = {4, 6, 8}}},
    TileRow{48, {.block_m = 256, .block_n = 16, .warps = 8, .register_dims = 48, .schedule = {2, 6, 8}}},
    TileRow{64, {.block_m = 256, .block_n = 32, .warps = 8, .register_dims = 64, .schedule = {1, 8, 8}}},
    TileRow{80, {.block_m = 128, .block_n = 32, .warps = 8, .register_dims = 80, .schedule = {2, 6, 8}}},
    TileRow{96, {.block_m = 128, .block_n = 16, .warps = 8, .register_dims = 96, .schedule = {0, 6, 8}}},
    TileRow{128, {.block_m = 128, .block_n = 16, .warps = 8, .register_dims = 128, .schedule = {3, 8, 8}}},
    TileRow{160, {.block_m = 128, .block_n = 16, .warps = 8, .register_dims = 160, .schedule = {2, 6, 8}}},
    TileRow{192, {.block_m = 128, .block_n = 8, .warps = 8, .register_dims = 192, .schedule = {0, 8, 8}}},
    TileRow{224, {.block_m = 128, .block_n = 8, .warps = 8, .register_dims = 176, .schedule = {0, 8, 8}}},
    TileRow{256, {.block_m = 64, .block_n = 8, .warps = 4, .register_dims = 112, .schedule = {0, 8, 8}}},
};
// Windows, softcap, ALiBi and cu_seqlens take registers too. Rows for what would spill with the tiles above.
constexpr std::array kLargeDqWindow = {
    TileRow{64, {.block_m = 256, .block_n = 16, .warps = 8, .register_dims = 64, .schedule = {0, 6, 8}}},
    TileRow{96, {.block_m = 256, .block_n = 16, .warps = 8, .register_dims = 80, .schedule = {4, 8, 8}}},
};
constexpr std::array kLargeDqVarlen = {
    TileRow{64, {.block_m = 256, .block_n = 16, .warps = 8, .register_dims = 64, .schedule = {0, 6, 8}}},
    TileRow{96, {.block_m = 256, .block_n = 16, .warps = 8, .register_dims = 96, .schedule = {3, 7, 8}}},
};
constexpr std::array kLargeDqSoftcapAlibi = {
    TileRow{64, {.block_m = 256, .block_n = 16, .warps = 8, .register_dims = 64, .schedule = {0, 6, 8}}},
    TileRow{96, {.block_m = 128, .block_n = 32, .warps = 8, .register_dims = 96, .schedule = {0, 6, 8}}},
};
constexpr std::array kLargeDkDvWindowAlibi = {
    TileRow{64, {.block_m = 128, .block_n = 32, .warps = 8, .register_dims = 64, .schedule = {1, 5, 8}}},
};
constexpr std::array kLargeDkDvSoftcapVarlen = {
    TileRow{48, {.block_m = 256, .block_n = 16, .warps = 8, .register_dims = 48, .schedule = {2, 6, 8}}},
    TileRow{64, {.block_m = 256, .block_n = 32, .warps = 8, .register_dims = 64, .schedule = {2, 8, 8}}},
};

// Loads of one element at a time: as in the forward pass.
constexpr std::array kElementBackward = {
    TileRow{128, {.block_m = 128, .block_n = 16, .warps = 8, .register_dims = 128, .schedule = {0, 8, 8}}},
};
constexpr std::array kSmallBackward = {
    TileRow{96, {.block_m = 64, .block_n = 16, .warps = 4, .register_dims = 80, .schedule = {0, 8, 8}}},
    TileRow{128, {.block_m = 64, .block_n = 16, .warps = 4, .register_dims = 112, .schedule = {0, 8, 8}}},
    TileRow{256, {.block_m = 32, .block_n = 8, .warps = 2, .register_dims = 128, .schedule = {0, 8, 8}}},
};
constexpr std::array kPreprocess = {
    TileRow{256, {.block_m = 64, .block_n = 0, .warps = 4, .register_dims = 0, .schedule = {0, 0, 0}}},
};

using Table = std::span<const TileRow>;

// Tables to look in, one after the other; some may be empty. Looked up at every launch: nothing is allocated.
using Tables = std::array<Table, 5>;

Table only_if(bool applies, Table table) { return applies ? table : Table{}; }

Tables large_forward(const KernelSpec& spec) {
  if (spec.access == GlobalAccess::kElement2B) return {kLargeElement};
  return {spec.mask == Mask::kNone ? Table(kLargeFull) : kLargeCausal};
}

Tables large_dq(const KernelSpec& spec) {
  return {only_if(spec.access == GlobalAccess::kElement2B, kElementBackward),
          only_if(spec.has(Feature::kSoftcap) || spec.has(Feature::kAlibi), kLargeDqSoftcapAlibi),
          only_if(spec.mask == Mask::kWindow, kLargeDqWindow),
          only_if(spec.has(Feature::kVarlen), kLargeDqVarlen),
          spec.mask == Mask::kNone ? Table(kLargeDqFull) : kLargeDqCausal};
}

Tables large_dkdv(const KernelSpec& spec) {
  return {only_if(spec.access == GlobalAccess::kElement2B, kElementBackward),
          only_if(spec.mask == Mask::kWindow || spec.has(Feature::kAlibi), kLargeDkDvWindowAlibi),
          only_if(spec.has(Feature::kSoftcap) || spec.has(Feature::kVarlen), kLargeDkDvSoftcapVarlen),
          spec.mask == Mask::kNone ? Table(kLargeDkDvFull) : kLargeDkDvCausal};
}

// For large problems.
Tables large_tiles(const KernelSpec& spec) {
  switch (spec.kind) {
    case KernelKind::kForward:
      return large_forward(spec);
    case KernelKind::kBackwardPreprocess:
      return {kPreprocess};
    case KernelKind::kBackwardDkDv:
      return large_dkdv(spec);
    case KernelKind::kBackwardDq:
      return large_dq(spec);
  }
  return {};
}

// For problems that do not fill the device.
Tables small_tiles(const KernelSpec& spec) {
  if (spec.kind == KernelKind::kBackwardPreprocess) return {};
  return {spec.kind == KernelKind::kForward ? Table(kSmall) : kSmallBackward};
}

// The first row of the tables that the spec's head dim fits, if there is one.
std::optional<TileConfig> find_row(const Tables& tables, const KernelSpec& spec) {
  for (const Table rows : tables)
    for (const TileRow& row : rows)
      if (spec.padded_head_dim() <= row.max_head_dim) {
        TileConfig tile = row.tile;
        tile.register_dims = std::min(tile.register_dims, spec.padded_head_dim());
        return tile;
      }
  return std::nullopt;
}

bool is_legal(const KernelSpec& spec, const TileConfig& tile, const ArchLimits& arch) {
  KernelSpec with_tile = spec;
  with_tile.tile = tile;
  return !check(with_tile, arch);
}

// Blocks that a tile makes of a problem.
std::int64_t blocks_of(const TileConfig& tile, const ProblemSize& size) {
  return (size.seqlen_q + tile.block_m - 1) / tile.block_m * size.batch_heads;
}

}  // namespace

std::vector<TileConfig> default_tiles(const KernelSpec& spec, const ArchLimits&) {
  std::vector<TileConfig> tiles;
  for (const Tables& tables : {large_tiles(spec), small_tiles(spec)})
    if (const auto tile = find_row(tables, spec)) tiles.push_back(*tile);
  return tiles;
}

TileConfig choose_tile(const KernelSpec& spec, const ArchLimits& arch, const ProblemSize& size) {
  const std::vector<TileConfig> tiles = default_tiles(spec, arch);
  require_head_dim(spec.head_dim);
  for (const TileConfig& tile : tiles)
    if (blocks_of(tile, size) >= size.multiprocessors) return tile;
  return tiles.back();
}

std::vector<TileConfig> tile_space(const KernelSpec& spec, const ArchLimits& arch) {
  const bool forward = spec.kind == KernelKind::kForward;
  const std::vector<LoopSchedule> schedules =
      forward ? std::vector{LoopSchedule{2, 4, 4}, LoopSchedule{2, 4, 7}, LoopSchedule{2, 8, 8}}
              : std::vector{LoopSchedule{0, 4, 8}, LoopSchedule{2, 8, 8}};
  const int dims = spec.padded_head_dim();
  std::vector<TileConfig> tiles = default_tiles(spec, arch);
  for (int warps : {2, 4, 8})
    for (int rows : {16, 32})
      for (int block_n : {8, 16, 24, 32})
        for (int register_dims : {dims, dims * 5 / 8 / 16 * 16})
          for (const LoopSchedule& schedule : schedules) {
            const TileConfig tile{warps * rows, block_n, warps, register_dims, schedule};
            if (is_legal(spec, tile, arch)) tiles.push_back(tile);
          }
  std::sort(tiles.begin(), tiles.end());
  tiles.erase(std::unique(tiles.begin(), tiles.end()), tiles.end());
  return tiles;
}

}  // namespace flash_attn_jit
