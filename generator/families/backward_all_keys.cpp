// Backward where a block has all keys of a sequence: dK and dV as in their own kernel, and with them delta and dQ,
// whose dS is there anyway: five products in the place of seven, one kernel in the place of three.
#include "generator/families/backward_gradients.h"
#include "generator/families/families.h"
#include "generator/tile_layout.h"
#include "generator/tile_rules.h"

namespace flash_attn_jit {
namespace {

// By what the model says of 384 heads with 128 queries and 128 keys on a T4: a block stands alone on its
// multiprocessor, so that eight warps of 16 keys go before four of 32, and above head dim 64 shared memory leaves no
// room for 16 queries. At 128 a causal kernel spills 4 bytes, one with a window 8.
constexpr std::array kLarge = {
    TileRow{32, {.block_m = 128, .block_n = 32, .warps = 8, .register_dims = 32, .schedule = {0, 5, 8}}},
    TileRow{64, {.block_m = 128, .block_n = 16, .warps = 8, .register_dims = 64, .schedule = {0, 4, 8}}},
    TileRow{128, {.block_m = 128, .block_n = 8, .warps = 8, .register_dims = 128, .schedule = {0, 8, 8}}},
};
constexpr std::array kSmall = {
    TileRow{64, {.block_m = 64, .block_n = 16, .warps = 4, .register_dims = 64, .schedule = {0, 8, 8}}},
    TileRow{128, {.block_m = 64, .block_n = 8, .warps = 4, .register_dims = 128, .schedule = {0, 8, 8}}},
};

// K is all in shared memory, so that a block's keys are bounded.
TileTables tiles(const KernelSpec&) { return {TileTableList{kLarge}, TileTableList{}, TileTableList{kSmall}}; }

// K lies in shared memory whatever the tile says, which speaks of V alone.
constexpr GradientLayout kLayout = {.makes_dv = true, .statistics_bytes = 8, .keeps_s_rows = false};

// dS beside a slot's tiles, K, and where dQ passes through: see AllKeysDq.
int shared_bytes(const KernelSpec& spec) {
  const TileConfig& tile = spec.tile;
  const int dims = kernel_dims(spec), steps = tile.block_n / 8;
  const int steps_of_part = (dims + 15) / 16 >= tile.warps ? steps : 1;
  return slots_bytes_of(kLayout, spec, steps * tile.block_m * 16) + tile.block_m * row_pitch(dims) +
         shared_row_bytes(spec, kernel_value_dims(spec)) + tile.warps * steps_of_part * 8 * row_pitch(16);
}

int registers(const KernelSpec& spec) { return registers_of(kLayout, spec); }

std::optional<std::string> check_tile(const KernelSpec& spec) {
  const TileConfig& tile = spec.tile;
  if (tile.block_m % 32 != 0)
    return tile_name(spec) + " has " + std::to_string(tile.block_m) + " keys; accepted: multiples of 32";
  return check_key_gradient_tile(spec);
}

}  // namespace

constinit const KernelFamily kBackwardAllKeysFamily = {
    .word = "bwd_all_keys",
    .pack_group = "bwd",
    .template_file = "flash_bwd.cuh",
    .function = "flash_bwd",
    .params = "FlashBwdParams",
    .tile = "FlashBwdTile",
    .trait = "  static constexpr RowSide kRowSide = RowSide::kAllKeys;\n",
    .results = {.delta = true, .dq = true, .dkdv = true},
    .rows = RowSide::kKeys,
    .reads_mask = true,
    .has_all_rows = true,
    .most_head_dim = 128,
    .products = 5,
    .value_products = 2,
    .shared_bytes = shared_bytes,
    .registers = registers,
    .check_tile = check_tile,
    .default_tiles = tiles,
    .space = {kGradientColumns, kGradientSchedules}};

}  // namespace flash_attn_jit
