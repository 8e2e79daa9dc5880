#include "generator/tile_table.h"

#include <algorithm>

namespace flash_attn_jit {

std::optional<TileConfig> find_tile(const TileTableList& tables, const KernelSpec& spec) {
  for (const TileTable rows : tables)
    for (const TileRow& row : rows)
      if (spec.padded_head_dim() <= row.max_head_dim) {
        TileConfig tile = row.tile;
        tile.register_dims = std::min(tile.register_dims, spec.padded_head_dim());
        return tile;
      }
  return std::nullopt;
}

}  // namespace flash_attn_jit
