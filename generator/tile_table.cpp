#include "generator/tile_table.h"

#include <algorithm>

namespace flash_attn_jit {

TileTable bfloat16_of_features(std::span<const FeatureRow> rows, const KernelSpec& spec, bool in_groups) {
  if (spec.dtype != DType::kBFloat16 || spec.access != GlobalAccess::kVector16B) return {};
  const FeatureSet features = spec.features.of_main_loop();
  const int head_dim = spec.greatest_head_dim();
  const auto row = std::ranges::find_if(rows, [&](const FeatureRow& each) {
    return each.features == features && each.mask == spec.mask && each.in_groups == in_groups &&
           head_dim <= each.tile.max_head_dim && head_dim > each.tile.max_head_dim - 8;
  });
  return row == rows.end() ? TileTable{} : TileTable(&row->tile, 1);
}

std::optional<TileConfig> find_tile(const TileTableList& tables, const KernelSpec& spec, int dims) {
  const int head_dim = spec.greatest_head_dim();
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
