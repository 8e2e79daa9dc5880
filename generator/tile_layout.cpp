#include "generator/tile_layout.h"

#include <algorithm>

namespace flash_attn_jit {
namespace {

// Bytes from a row of a shared-memory tile to the next: see templates/tile_copy.cuh.
int row_pitch(int dims) { return dims * 2 + 16; }

int staging_dims(int dims) { return dims % 32 == 0 ? 32 : 16; }

// Head dims of the gradients that one block makes.
int output_dims(const KernelSpec& spec) { return kernel_dims(spec) / output_splits(spec); }

}  // namespace

int kernel_dims(const KernelSpec& spec) {
  const int step = 16 * output_splits(spec);
  return (spec.head_dim + step - 1) / step * step;
}

int shared_bytes(const KernelSpec& spec) {
  const TileConfig& tile = spec.tile;
  if (spec.kind == KernelKind::kBackwardPreprocess) return 0;
  const int dims = kernel_dims(spec);
  const int shared_dims = dims - tile.register_dims;
  const int rows = shared_dims > 0 ? tile.block_m * row_pitch(shared_dims) : 0;
  const int tile_bytes = tile.block_n * row_pitch(dims);
  if (spec.kind == KernelKind::kForward) {
    const int staging = tile.block_m * row_pitch(staging_dims(dims));
    const int slots = tile.schedule.barrier == 8 ? 4 : 5;
    return std::max(slots * tile_bytes, staging) + rows;
  }
  const int staging = tile.block_m * row_pitch(std::max(staging_dims(output_dims(spec)), 16));
  const int statistics = spec.kind == KernelKind::kBackwardDkDv ? tile.block_n * 8 : 0;
  return std::max(3 * (2 * tile_bytes + statistics), staging) + 2 * rows;
}

int output_splits(const KernelSpec& spec) {
  return spec.kind == KernelKind::kBackwardDkDv && spec.padded_head_dim() > 128 ? 2 : 1;
}

int blocks_per_multiprocessor(const KernelSpec& spec) { return std::max(1, 8 / spec.tile.warps); }

int estimated_registers(const KernelSpec& spec) {
  const TileConfig& tile = spec.tile;
  if (spec.kind == KernelKind::kBackwardPreprocess) return 32;
  const int m_tiles = tile.rows_per_warp() / 16;
  const int rows = m_tiles * tile.register_dims / 4;
  const int fragments_and_addresses = 24;
  if (spec.kind == KernelKind::kForward) {
    const int acc_o = m_tiles * spec.padded_head_dim() / 2;
    const int scores = m_tiles * tile.block_n / 2;
    return acc_o + rows + 2 * scores + fragments_and_addresses;
  }
  const int gradients = (spec.kind == KernelKind::kBackwardDkDv ? 2 : 1) * m_tiles * output_dims(spec) / 2;
  const int scores = 2 * m_tiles * 4;  // S and dP of a step of 8 columns
  return gradients + 2 * rows + scores + fragments_and_addresses;
}

int useful_mma_per_turn(const KernelSpec& spec) {
  if (spec.kind == KernelKind::kBackwardPreprocess) return 0;
  int products = 2;
  if (spec.kind == KernelKind::kBackwardDq) products = 3;
  if (spec.kind == KernelKind::kBackwardDkDv) products = 4;
  const int m_tiles = spec.tile.rows_per_warp() / 16;
  const int steps_of_8_dims = (spec.head_dim + 7) / 8;
  // Blocks that share a row's output dims would, between them, need each product once.
  return products * m_tiles * (spec.tile.block_n / 8) * steps_of_8_dims / output_splits(spec);
}

}  // namespace flash_attn_jit
