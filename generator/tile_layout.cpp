#include "generator/tile_layout.h"

#include <algorithm>

namespace flash_attn_jit {
namespace {

// Bytes from a row of a shared-memory tile to the next: see templates/tile_copy.cuh.
int row_pitch(int dims) { return dims * 2 + 16; }

}  // namespace

int shared_bytes(const KernelSpec& spec) {
  const TileConfig& tile = spec.tile;
  const int dims = spec.padded_head_dim();
  const int q_shared_dims = dims - tile.q_register_dims;
  const int staging_dims = dims % 32 == 0 ? 32 : 16;
  const int slots = tile.schedule.barrier == 8 ? 4 : 5;
  const int slot_bytes = slots * tile.block_n * row_pitch(dims);
  const int staging = tile.block_m * row_pitch(staging_dims);
  return std::max(slot_bytes, staging) + (q_shared_dims > 0 ? tile.block_m * row_pitch(q_shared_dims) : 0);
}

int blocks_per_multiprocessor(const KernelSpec& spec) { return std::max(1, 8 / spec.tile.warps); }

int estimated_registers(const KernelSpec& spec) {
  const TileConfig& tile = spec.tile;
  const int m_tiles = tile.rows_per_warp() / 16;
  const int acc_o = m_tiles * spec.padded_head_dim() / 2;
  const int q = m_tiles * tile.q_register_dims / 4;
  const int scores = m_tiles * tile.block_n / 2;
  const int fragments_and_addresses = 24;
  return acc_o + q + 2 * scores + fragments_and_addresses;
}

int useful_mma_per_turn(const KernelSpec& spec) {
  const int m_tiles = spec.tile.rows_per_warp() / 16;
  const int steps_of_8_dims = (spec.head_dim + 7) / 8;
  return 2 * m_tiles * (spec.tile.block_n / 8) * steps_of_8_dims;
}

}  // namespace flash_attn_jit
