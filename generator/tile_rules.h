// Rules of tiles that several families share, with the words of their reasons.
#pragma once

#include <optional>
#include <string>

#include "generator/kernel_spec.h"
#include "generator/tile_table.h"

namespace flash_attn_jit {

std::string quoted(const std::string& text);        // 'text'
std::string tile_name(const KernelSpec& spec);      // "tile 'm256...'"
std::string schedule_name(const KernelSpec& spec);  // "tile '...' has its loads, ... at 2, 4 and 7 eighths; accepted: "

std::optional<std::string> check_rows_of_warps(const KernelSpec& spec);  // 16 or 32 each
std::optional<std::string> check_register_dims(const KernelSpec& spec);
std::optional<std::string> check_rows_alone(const KernelSpec& spec);     // of a kernel without a main loop
std::optional<std::string> check_row_of_a_warp(const KernelSpec& spec);  // the same, where a warp has one row
TileTables row_of_a_warp_tiles(const KernelSpec& spec);                  // four warps, for any head dim

}  // namespace flash_attn_jit
