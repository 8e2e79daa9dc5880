#include "generator/tile_layout.h"

#include <algorithm>

#include "generator/families/families.h"

namespace flash_attn_jit {

int kernel_dims(const KernelSpec& spec) {
  const KernelFamily& family = family_of(spec.kind);
  const int step = (family.dim_splits > 1 ? 16 * family.dim_splits : 8) * family.output_splits(spec);
  return (spec.padded_head_dim() + step - 1) / step * step;
}

int rows_of_warp(const KernelSpec& spec) {
  const TileConfig& tile = spec.tile;
  const KernelFamily& family = family_of(spec.kind);
  if (!family.warps_share_rows) return tile.block_m * family.dim_splits / tile.warps;
  return std::min(tile.block_m, spec.head_dim <= 128 ? 32 : 16);
}

int row_tiles_of_warp(const KernelSpec& spec) { return rows_of_warp(spec) / 16; }

int columns_of_iteration(const KernelSpec& spec) {
  const TileConfig& tile = spec.tile;
  return family_of(spec.kind).warps_share_rows ? tile.block_n * tile.warps * rows_of_warp(spec) / tile.block_m
                                               : tile.block_n;
}

int blocks_per_multiprocessor(const TileConfig& tile) { return std::max(1, 8 / tile.warps); }

int useful_mma_per_iteration(const KernelSpec& spec) {
  const KernelFamily& family = family_of(spec.kind);
  const int m_tiles = row_tiles_of_warp(spec);
  const int steps_of_8_dims = (spec.head_dim + 7) / 8;
  // Blocks that share a row's output dims would, between them, need each product once.
  return family.products * m_tiles * (spec.tile.block_n / 8) * steps_of_8_dims /
         (family.output_splits(spec) * family.dim_splits);
}

int row_pitch(int dims) { return (dims / 8 | 1) * 16; }

int staging_dims(int dims) { return dims % 32 == 0 ? 32 : 16; }

int shared_row_bytes(const KernelSpec& spec) {
  const int shared_dims = kernel_dims(spec) - spec.tile.register_dims;
  return shared_dims > 0 ? spec.tile.block_m * row_pitch(shared_dims) : 0;
}

int row_registers(const KernelSpec& spec) { return row_tiles_of_warp(spec) * spec.tile.register_dims / 4; }

}  // namespace flash_attn_jit
