// Backward: the gradient of an attn_bias of numbers; S = K Q^T, dP = V dO^T, of every sequence and head that the bias
// is broadcast over.
#include <array>

#include "generator/families/families.h"
#include "generator/tile_layout.h"
#include "generator/tile_rules.h"

namespace flash_attn_jit {
namespace {

constexpr LoopSchedule kNoSchedule = {0, 0, 0};

// By what the model says of a T4: to head dim 64 two blocks stand on a multiprocessor, and one works while the other
// waits for new keys. Above, more queries a block, which would read keys less often, spill.
constexpr std::array kRows = {
    TileRow{64, {.block_m = 64, .block_n = 64, .warps = 4, .register_dims = 64, .schedule = kNoSchedule}},
    TileRow{128, {.block_m = 128, .block_n = 48, .warps = 8, .register_dims = 128, .schedule = kNoSchedule}},
    TileRow{192, {.block_m = 128, .block_n = 32, .warps = 8, .register_dims = 160, .schedule = kNoSchedule}},
    TileRow{256, {.block_m = 64, .block_n = 24, .warps = 4, .register_dims = 192, .schedule = kNoSchedule}},
};

TileTables tiles(const KernelSpec&) { return {TileTableList{kRows}}; }

// A tile of Q, one of dO, lse and delta of its queries; then of each warp its rows of K and of V that registers do not
// hold, and where they come in: see FlashBwdBiasTile.
int shared_bytes(const KernelSpec& spec) {
  const TileConfig& tile = spec.tile;
  const int dims = kernel_dims(spec), value_dims = kernel_value_dims(spec);
  return tile.block_n * (row_pitch(dims) + row_pitch(value_dims) + 8) + shared_row_bytes(spec, dims) +
         shared_row_bytes(spec, value_dims) + tile.block_m * row_pitch(16);
}

int registers(const KernelSpec& spec) {
  const int m_tiles = row_tiles_of_warp(spec);
  const int steps = spec.has(Feature::kOneRow) ? 1 : spec.tile.block_n / 8;
  const int scores = 2 * m_tiles * 4;  // S and dP of a step of 8 queries
  const int rows = row_registers(spec, kernel_dims(spec)) + row_registers(spec, kernel_value_dims(spec));
  return m_tiles * steps * 4 + scores + rows + kFragmentAndAddressRegisters;
}

std::optional<std::string> check_tile(const KernelSpec& spec) {
  if (auto reason = check_rows_of_warps(spec)) return reason;
  const TileConfig& tile = spec.tile;
  if (tile.block_n < 8 || tile.block_n > 64 || tile.block_n % 8 != 0 || tile.block_n > tile.threads())
    return tile_name(spec) + " has " + std::to_string(tile.block_n) + " queries for " + std::to_string(tile.threads()) +
           " threads; accepted: multiples of 8 up to 64, at most one a thread";
  if (tile.schedule != kNoSchedule)
    return schedule_name(spec) + "0, 0 and 0 with kind " + std::string(to_text(spec.kind));
  return check_register_dims(spec);
}

}  // namespace

constinit const KernelFamily kBackwardBiasFamily = {.word = "bwd_dbias",
                                                    .pack_group = "bwd",
                                                    .template_file = "flash_bwd_bias.cuh",
                                                    .function = "flash_bwd_bias",
                                                    .params = "FlashBwdParams",
                                                    .tile = "FlashBwdBiasTile",
                                                    .results = {.dbias = true},
                                                    .rows = RowSide::kKeys,
                                                    .reads_mask = true,
                                                    .products = 2,
                                                    .value_products = 1,
                                                    .shared_bytes = shared_bytes,
                                                    .registers = registers,
                                                    .is_tuned = false,
                                                    .check_tile = check_tile,
                                                    .default_tiles = tiles};

}  // namespace flash_attn_jit
