// Tables of default tiles: data, in the families' files.
#pragma once

#include <array>
#include <optional>
#include <span>

#include "generator/kernel_spec.h"

namespace flash_attn_jit {

// One row: for head dims, q's and v's, up to max_head_dim.
struct TileRow {
  int max_head_dim;
  TileConfig tile;  // register_dims is an upper bound: smaller head dims keep all of their rows in registers
};

// The tile of a row whose head dims the tables behind it serve.
inline constexpr TileConfig kElsewhere = {};

using TileTable = std::span<const TileRow>;

// Nothing in the kernel takes registers but attention itself.
inline bool is_plain(const KernelSpec& spec) {
  return spec.features.empty() && spec.mask != Mask::kWindow && spec.access == GlobalAccess::kVector16B;
}

// Of those, the ones that convert tensors on their way.
inline bool is_plain_bfloat16(const KernelSpec& spec) { return spec.dtype == DType::kBFloat16 && is_plain(spec); }

// Whether half the rows a block are for it: because such kernels are fast, or because a block mask wants them.
inline bool takes_medium(const KernelSpec& spec) {
  return is_plain(spec) || (spec.has(Feature::kBlockMask) && spec.access == GlobalAccess::kVector16B);
}

inline TileTable only_if(bool applies, TileTable table) { return applies ? table : TileTable{}; }

// That of the spec's mask, where it is one of plain bfloat16.
inline TileTable plain_bfloat16(const KernelSpec& spec, TileTable full, TileTable causal) {
  return only_if(is_plain_bfloat16(spec), spec.mask == Mask::kNone ? full : causal);
}

// A row for a head dim, its mask and features.
struct FeatureRow {
  FeatureSet features;
  Mask mask;
  bool in_groups;  // whether a kernel adds up the gradients of several query heads
  TileRow tile;    // for head dims that are computed as max_head_dim: the 8 up to it
};

inline constexpr bool kAlone = false, kInGroups = true;

// The tile of the row for the spec as a table, where its tensors are of bfloat16 and there is such a row.
// `in_groups` is that of the kernel.
TileTable bfloat16_of_features(std::span<const FeatureRow> rows, const KernelSpec& spec, bool in_groups = kAlone);

// Looked in one after the other; some may be empty. They are read at every launch, so nothing is allocated.
using TileTableList = std::array<TileTable, 8>;

// Tables of a family, from those for large problems to those for problems that do not fill the device.
using TileTables = std::array<TileTableList, 3>;

// The tile of the first table that has one for the spec's head dims, if there is one. The kernel computes with `dims`.
std::optional<TileConfig> find_tile(const TileTableList& tables, const KernelSpec& spec, int dims);

}  // namespace flash_attn_jit
