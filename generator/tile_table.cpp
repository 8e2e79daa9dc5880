#include "generator/tile_table.h"

#include <algorithm>

#include "generator/tile_layout.h"

namespace flash_attn_jit {

std::optional<TileConfig> find_tile(const TileTableList& tables, const KernelSpec& spec) {
  const int head_dim = spec.padded_head_dim(), dims = kernel_dims(spec);
  for (const TileTable rows : tables) {
    const auto row = std::ranges::find_if(rows, [&](const TileRow& each) { return head_dim <= each.max_head_dim; });
    if (row == rows.end() || row->tile == kElsewhere) continue;
    TileConfig tile = row->tile;
    tile.register_dims = std::min(tile.register_dims, dims);
    return tile;
  }
  return std::nullopt;
}

}  // namespace flash_attn_jit
