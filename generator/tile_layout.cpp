#include "generator/tile_layout.h"

#include <algorithm>

#include "generator/families/families.h"

namespace flash_attn_jit {

namespace {

// The 8 dims that a tensor instruction consumes, or the 16 of a warp's part of them; 16 at the least.
int padded(const KernelSpec& spec, int head_dim) {
  const KernelFamily& family = family_of(spec.kind);
  const int step = (family.dim_splits > 1 ? 16 * family.dim_splits : 8) * family.output_splits(spec);
  return std::max(16, (head_dim + step - 1) / step * step);
}

}  // namespace

int register_dims(const KernelSpec& spec, int dims) {
  return spec.tile.register_dims < dims ? spec.tile.register_dims / 16 * 16 : dims;
}

int kernel_dims(const KernelSpec& spec) { return padded(spec, spec.head_dim); }
int kernel_value_dims(const KernelSpec& spec) { return padded(spec, spec.value_head_dim()); }
int greatest_kernel_dims(const KernelSpec& spec) { return padded(spec, spec.greatest_head_dim()); }

int rows_of_warp(const KernelSpec& spec) {
  const TileConfig& tile = spec.tile;
  const KernelFamily& family = family_of(spec.kind);
  if (!family.warps_share_rows) return tile.block_m * family.dim_splits / tile.warps;
  return std::min(tile.block_m, spec.greatest_head_dim() <= 128 ? 32 : 16);
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
  const auto steps_of_8 = [](int dims) { return (dims + 7) / 8; };
  const int of_values = family.value_products;
  const int steps =
      (family.products - of_values) * steps_of_8(spec.head_dim) + of_values * steps_of_8(spec.value_head_dim());
  // Blocks that share a row's output dims would, between them, need each product once.
  return m_tiles * (spec.tile.block_n / 8) * steps / (family.output_splits(spec) * family.dim_splits);
}

int product_dims(const KernelSpec& spec) {
  const KernelFamily& family = family_of(spec.kind);
  return (family.products - family.value_products) * spec.head_dim + family.value_products * spec.value_head_dim();
}

int row_pitch(int dims) { return (dims / 8 | 1) * 16; }

int staging_dims(int dims) { return dims % 32 == 0 ? 32 : 16; }

int shared_row_bytes(const KernelSpec& spec, int dims) {
  const int shared_dims = dims - register_dims(spec, dims);
  return shared_dims > 0 ? spec.tile.block_m * row_pitch(shared_dims) : 0;
}

int row_registers(const KernelSpec& spec, int dims) { return row_tiles_of_warp(spec) * register_dims(spec, dims) / 4; }

}  // namespace flash_attn_jit
