#include "generator/families/backward_gradients.h"

#include <algorithm>

#include "generator/tile_layout.h"
#include "generator/tile_rules.h"

namespace flash_attn_jit {
namespace {}  // namespace

int slots_bytes_of(const GradientLayout& layout, const KernelSpec& spec, int more_bytes) {
  const TileConfig& tile = spec.tile;
  const int dims = kernel_dims(spec), value_dims = kernel_value_dims(spec), splits = layout.output_splits(spec);
  const int slot = tile.block_n * (row_pitch(dims) + row_pitch(value_dims) + layout.statistics_bytes) + more_bytes;
  const int staged = std::max(staging_dims(dims / splits), layout.makes_dv ? staging_dims(value_dims / splits) : 0);
  const int staging = tile.block_m * row_pitch(staged);
  return std::max(3 * slot, staging);
}

int shared_bytes_of(const GradientLayout& layout, const KernelSpec& spec) {
  return slots_bytes_of(layout, spec) + shared_row_bytes(spec, kernel_dims(spec)) +
         shared_row_bytes(spec, kernel_value_dims(spec));
}

int registers_of(const GradientLayout& layout, const KernelSpec& spec) {
  const int m_tiles = row_tiles_of_warp(spec);
  const int dims = kernel_dims(spec), value_dims = kernel_value_dims(spec);
  const int gradients = m_tiles * (dims + (layout.makes_dv ? value_dims : 0)) / layout.output_splits(spec) / 2;
  const int scores = 2 * m_tiles * 4;  // S and dP of a step of 8 columns
  const int rows = (layout.keeps_s_rows ? row_registers(spec, dims) : 0) + row_registers(spec, value_dims);
  return gradients + rows + scores + kFragmentAndAddressRegisters;
}

std::optional<std::string> check_gradient_tile(const KernelSpec& spec) {
  if (auto reason = check_rows_of_warps(spec)) return reason;
  const TileConfig& tile = spec.tile;
  if (tile.block_n < 8 || tile.block_n > 64 || tile.block_n % 8 != 0)
    return tile_name(spec) + " has " + std::to_string(tile.block_n) +
           " columns an iteration; accepted: multiples of 8 up to 64";
  // The iteration's first step still reads the slot that the tile stored before the barrier goes into: see
  // FlashBwdTile.
  const LoopSchedule& at = tile.schedule;
  const int first_step_end = (64 + tile.block_n - 1) / tile.block_n;
  if (at.load < 0 || at.load >= at.barrier || at.barrier < first_step_end || at.barrier > 8 || at.first_keys != 8)
    return schedule_name(spec) + "loads before the barrier, the barrier at " + std::to_string(first_step_end) +
           " to 8, K fragments at 8";
  return check_register_dims(spec);
}

std::optional<std::string> check_key_gradient_tile(const KernelSpec& spec) {
  if (auto reason = check_gradient_tile(spec)) return reason;
  const TileConfig& tile = spec.tile;
  if (tile.block_n <= tile.threads()) return std::nullopt;
  return tile_name(spec) + " has " + std::to_string(tile.block_n) + " queries an iteration for " +
         std::to_string(tile.threads()) + " threads; accepted: at most one a thread";
}

}  // namespace flash_attn_jit
