#include "generator/tile_rules.h"

#include <array>

#include "generator/tile_layout.h"

namespace flash_attn_jit {
namespace {

constexpr std::array kRowsOfFourWarps = {
    TileRow{kMostHeadDim, {.block_m = 4, .block_n = 0, .warps = 4, .register_dims = 0, .schedule = {0, 0, 0}}},
};

}  // namespace

std::string quoted(const std::string& text) { return "'" + text + "'"; }

std::string tile_name(const KernelSpec& spec) { return "tile " + quoted(spec.tile.text()); }

std::string schedule_name(const KernelSpec& spec) {
  const LoopSchedule& at = spec.tile.schedule;
  return tile_name(spec) + " has its loads, barrier and first K fragments at " + std::to_string(at.load) + ", " +
         std::to_string(at.barrier) + " and " + std::to_string(at.first_keys) + " eighths; accepted: ";
}

std::optional<std::string> check_rows_of_warps(const KernelSpec& spec) {
  const TileConfig& tile = spec.tile;
  if (tile.block_m == tile.warps * 16 || tile.block_m == tile.warps * 32) return std::nullopt;
  return tile_name(spec) + " has " + std::to_string(tile.block_m) + " rows for " + std::to_string(tile.warps) +
         " warps; accepted: 16 or 32 rows a warp";
}

std::optional<std::string> check_register_dims(const KernelSpec& spec) {
  const int dims = spec.tile.register_dims;
  const int most = greatest_kernel_dims(spec);
  if (dims == most || (dims >= 0 && dims < most && dims % 16 == 0)) return std::nullopt;
  return tile_name(spec) + " keeps " + std::to_string(dims) +
         " head dims in registers; accepted: multiples of 16 below " + std::to_string(most) + ", or all " +
         std::to_string(most);
}

std::optional<std::string> check_rows_alone(const KernelSpec& spec) {
  if (auto reason = check_rows_of_warps(spec)) return reason;
  const TileConfig& tile = spec.tile;
  if (tile.block_n == 0 && tile.register_dims == 0 && tile.schedule == LoopSchedule{0, 0, 0}) return std::nullopt;
  return tile_name(spec) + " is for kind " + std::string(to_text(spec.kind)) +
         "; accepted: 0 for all but its rows and warps, as in " + quoted("m64n0w4q0l0b0k0");
}

std::optional<std::string> check_row_of_a_warp(const KernelSpec& spec) {
  const TileConfig& tile = spec.tile;
  if (tile == TileConfig{tile.warps, 0, tile.warps, 0, {0, 0, 0}}) return std::nullopt;
  return tile_name(spec) + " is for kind " + std::string(to_text(spec.kind)) +
         "; accepted: a row for each warp, and 0 for all else, as in " + quoted("m4n0w4q0l0b0k0");
}

TileTables row_of_a_warp_tiles(const KernelSpec&) { return {TileTableList{kRowsOfFourWarps}}; }

}  // namespace flash_attn_jit
