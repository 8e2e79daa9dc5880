// What the families of gradients, which share a template, have in common: a block keeps the gradients of its rows in
// registers while the other side's columns pass through shared memory in three slots.
#pragma once

#include <array>
#include <optional>
#include <string>

#include "generator/tile_table.h"

namespace flash_attn_jit {

// A block's gradients of one row: dQ, or dK and dV; and what a slot holds beside its two tiles.
struct GradientLayout {
  bool makes_dv;
  int statistics_bytes;  // a column's, in a slot: where columns are queries, their lse and delta
  int (*output_splits)(const KernelSpec&) = [](const KernelSpec&) { return 1; };
  bool keeps_s_rows = true;  // as many dims of S's rows in registers as the tile says, and not only of dP's
};

// The three slots, or where rows come in and gradients go out, which is the same memory. A slot has `more_bytes` beside
// its tiles and statistics.
int slots_bytes_of(const GradientLayout& layout, const KernelSpec& spec, int more_bytes = 0);

int shared_bytes_of(const GradientLayout& layout, const KernelSpec& spec);
int registers_of(const GradientLayout& layout, const KernelSpec& spec);

std::optional<std::string> check_gradient_tile(const KernelSpec& spec);
// The same where columns are queries: a block's threads fetch the statistics of a tile's, one each.
std::optional<std::string> check_key_gradient_tile(const KernelSpec& spec);

inline constexpr std::array kGradientColumns = {8, 16, 24, 32, 48};
inline constexpr std::array kGradientSchedules = {LoopSchedule{0, 4, 8}, LoopSchedule{2, 8, 8}};

// Loads of one element at a time: as in the forward pass.
inline constexpr std::array kElementGradients = {
    TileRow{128, {.block_m = 128, .block_n = 16, .warps = 8, .register_dims = 128, .schedule = {0, 8, 8}}},
};

// Of many rows with dims in registers.
constexpr TileRow of_64(int rows, int columns, LoopSchedule schedule) {
  return {64, {.block_m = rows, .block_n = columns, .warps = rows / 32, .register_dims = 64, .schedule = schedule}};
}
constexpr TileRow of_128(int columns, LoopSchedule schedule) {
  return {128, {.block_m = 128, .block_n = columns, .warps = 8, .register_dims = 128, .schedule = schedule}};
}

inline constexpr std::array kSmallGradients = {
    TileRow{96, {.block_m = 64, .block_n = 16, .warps = 4, .register_dims = 80, .schedule = {0, 8, 8}}},
    TileRow{128, {.block_m = 64, .block_n = 16, .warps = 4, .register_dims = 112, .schedule = {0, 8, 8}}},
    TileRow{256, {.block_m = 32, .block_n = 8, .warps = 2, .register_dims = 128, .schedule = {0, 8, 8}}},
};

}  // namespace flash_attn_jit
