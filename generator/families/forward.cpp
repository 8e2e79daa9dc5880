// Forward: S = Q K^T, O += P V.
#include <algorithm>

#include "generator/families/families.h"
#include "generator/tile_layout.h"
#include "generator/tile_rules.h"

namespace flash_attn_jit {
namespace {

// Forward, sm_75 and above. The rows for large problems come from a search over schedules, with a cycle model of the T4
// as the first judge and times on a newer GPU that runs the same instructions as the second (see tools/tile_search).
// Above 128 a warp has 16 rows: 32 rows of O alone would take more registers than there are.
constexpr std::array kLargeFull = {
    TileRow{48, {.block_m = 256, .block_n = 32, .warps = 8, .register_dims = 48, .schedule = {2, 6, 8}}},
    TileRow{64, {.block_m = 256, .block_n = 32, .warps = 8, .register_dims = 64, .schedule = {2, 5, 7}}},
    TileRow{96, {.block_m = 256, .block_n = 16, .warps = 8, .register_dims = 80, .schedule = {2, 5, 7}}},
    TileRow{112, {.block_m = 256, .block_n = 16, .warps = 8, .register_dims = 64, .schedule = {1, 6, 8}}},
    TileRow{128, {.block_m = 256, .block_n = 16, .warps = 8, .register_dims = 64, .schedule = {2, 7, 7}}},
    TileRow{160, {.block_m = 128, .block_n = 32, .warps = 8, .register_dims = 160, .schedule = {0, 3, 3}}},
    TileRow{192, {.block_m = 128, .block_n = 32, .warps = 8, .register_dims = 192, .schedule = {0, 8, 8}}},
    TileRow{224, {.block_m = 128, .block_n = 16, .warps = 8, .register_dims = 224, .schedule = {0, 4, 4}}},
    TileRow{256, {.block_m = 128, .block_n = 16, .warps = 8, .register_dims = 160, .schedule = {0, 8, 8}}},
};

// The causal kernel is a different program to ptxas, with winners of its own.
constexpr std::array kLargeCausal = {
    TileRow{32, {.block_m = 128, .block_n = 32, .warps = 4, .register_dims = 32, .schedule = {0, 4, 7}}},
    TileRow{64, {.block_m = 256, .block_n = 32, .warps = 8, .register_dims = 64, .schedule = {2, 4, 4}}},
    TileRow{96, {.block_m = 256, .block_n = 16, .warps = 8, .register_dims = 80, .schedule = {2, 5, 7}}},
    TileRow{112, {.block_m = 256, .block_n = 16, .warps = 8, .register_dims = 64, .schedule = {5, 8, 8}}},
    TileRow{120, {.block_m = 256, .block_n = 16, .warps = 8, .register_dims = 64, .schedule = {0, 2, 2}}},
    TileRow{128, {.block_m = 256, .block_n = 16, .warps = 8, .register_dims = 64, .schedule = {5, 8, 8}}},
    TileRow{160, {.block_m = 128, .block_n = 32, .warps = 8, .register_dims = 160, .schedule = {0, 7, 7}}},
    TileRow{224, {.block_m = 128, .block_n = 16, .warps = 8, .register_dims = 192, .schedule = {2, 4, 4}}},
    TileRow{256, {.block_m = 128, .block_n = 16, .warps = 8, .register_dims = 208, .schedule = {3, 7, 7}}},
};

// A window has masked iterations at both ends, which take registers.
constexpr std::array kLargeWindow = {
    TileRow{64, kElsewhere},
    TileRow{96, {.block_m = 256, .block_n = 16, .warps = 8, .register_dims = 80, .schedule = {0, 1, 1}}},
    TileRow{112, {.block_m = 256, .block_n = 16, .warps = 8, .register_dims = 64, .schedule = {0, 3, 3}}},
    TileRow{128, {.block_m = 256, .block_n = 16, .warps = 8, .register_dims = 64, .schedule = {5, 8, 8}}},
    TileRow{192, {.block_m = 128, .block_n = 16, .warps = 8, .register_dims = 192, .schedule = {2, 4, 4}}},
    TileRow{224, {.block_m = 128, .block_n = 16, .warps = 8, .register_dims = 192, .schedule = {0, 8, 8}}},
};

// Where a score takes its key's position in.
constexpr std::array kLargePositions = {
    TileRow{32, {.block_m = 256, .block_n = 32, .warps = 8, .register_dims = 32, .schedule = {2, 4, 7}}},
    TileRow{64, {.block_m = 256, .block_n = 32, .warps = 8, .register_dims = 64, .schedule = {2, 5, 8}}},
    TileRow{96, {.block_m = 256, .block_n = 16, .warps = 8, .register_dims = 80, .schedule = {2, 5, 7}}},
    TileRow{112, {.block_m = 256, .block_n = 16, .warps = 8, .register_dims = 64, .schedule = {2, 7, 7}}},
    TileRow{128, {.block_m = 256, .block_n = 16, .warps = 8, .register_dims = 64, .schedule = {2, 6, 8}}},
};
constexpr std::array kLargeMaskedPositions = {
    TileRow{32, {.block_m = 128, .block_n = 32, .warps = 4, .register_dims = 32, .schedule = {0, 4, 7}}},
    TileRow{64, {.block_m = 256, .block_n = 32, .warps = 8, .register_dims = 64, .schedule = {2, 5, 8}}},
    TileRow{96, {.block_m = 256, .block_n = 16, .warps = 8, .register_dims = 80, .schedule = {2, 5, 7}}},
    TileRow{128, {.block_m = 256, .block_n = 16, .warps = 8, .register_dims = 64, .schedule = {2, 7, 7}}},
};
constexpr std::array kLargeWindowPositions = {
    TileRow{112, kElsewhere},
    TileRow{128, {.block_m = 128, .block_n = 16, .warps = 8, .register_dims = 128, .schedule = {2, 5, 7}}},
};

// A user's functions: ALiBi and a softcap were what these were judged by. With a block mask a block has the rows of one
// of the mask's.
constexpr std::array kLargeUserBias = {
    TileRow{48, kElsewhere},
    TileRow{64, {.block_m = 256, .block_n = 32, .warps = 8, .register_dims = 64, .schedule = {2, 4, 7}}},
    TileRow{112, kElsewhere},
    TileRow{128, {.block_m = 256, .block_n = 16, .warps = 8, .register_dims = 64, .schedule = {2, 5, 7}}},
};
constexpr std::array kLargeUserScore = {
    TileRow{48, kElsewhere},
    TileRow{64, {.block_m = 256, .block_n = 32, .warps = 8, .register_dims = 64, .schedule = {2, 8, 8}}},
    TileRow{112, kElsewhere},
    TileRow{128, {.block_m = 256, .block_n = 16, .warps = 8, .register_dims = 64, .schedule = {0, 1, 5}}},
};
constexpr std::array kMediumBlockMask = {
    TileRow{48, kElsewhere},
    TileRow{64, {.block_m = 128, .block_n = 32, .warps = 4, .register_dims = 64, .schedule = {2, 8, 8}}},
};

// Where a feature gains so much from other schedules that it has rows of its own.
constexpr std::array kLargeFullSoftcap = {
    TileRow{56, kElsewhere},
    TileRow{64, {.block_m = 256, .block_n = 32, .warps = 8, .register_dims = 64, .schedule = {0, 3, 3}}},
    TileRow{80, {.block_m = 256, .block_n = 16, .warps = 8, .register_dims = 80, .schedule = {0, 1, 1}}},
    TileRow{112, kElsewhere},
    TileRow{128, {.block_m = 256, .block_n = 16, .warps = 8, .register_dims = 64, .schedule = {0, 1, 5}}},
};
constexpr std::array kLargeCausalSoftcap = {
    TileRow{56, kElsewhere},
    TileRow{64, {.block_m = 256, .block_n = 32, .warps = 8, .register_dims = 64, .schedule = {0, 3, 3}}},
    TileRow{80, {.block_m = 256, .block_n = 16, .warps = 8, .register_dims = 80, .schedule = {0, 2, 2}}},
    TileRow{96, kElsewhere},
    TileRow{112, {.block_m = 256, .block_n = 16, .warps = 8, .register_dims = 64, .schedule = {0, 2, 2}}},
};
constexpr std::array kLargeFullVarlen = {
    TileRow{64, kElsewhere},
    TileRow{80, {.block_m = 256, .block_n = 16, .warps = 8, .register_dims = 80, .schedule = {0, 1, 1}}},
    TileRow{96, kElsewhere},
    TileRow{112, {.block_m = 256, .block_n = 16, .warps = 8, .register_dims = 64, .schedule = {0, 2, 2}}},
};

// Where a number is read for every pair, which waits in registers.
constexpr std::array kLargeFullBias = {
    TileRow{112, kElsewhere},
    TileRow{128, {.block_m = 256, .block_n = 16, .warps = 8, .register_dims = 80, .schedule = {0, 3, 3}}},
};
constexpr std::array kLargeFullBoolMask = {
    TileRow{112, kElsewhere},
    TileRow{128, {.block_m = 256, .block_n = 16, .warps = 8, .register_dims = 64, .schedule = {5, 8, 8}}},
};

constexpr std::array kLargeFullKeyMask = {
    TileRow{112, kElsewhere},
    TileRow{128, {.block_m = 256, .block_n = 16, .warps = 8, .register_dims = 64, .schedule = {2, 4, 7}}},
};

// Where random words are made beside the products.
constexpr std::array kLargeDropout = {
    TileRow{48, kElsewhere},
    TileRow{64, {.block_m = 256, .block_n = 32, .warps = 8, .register_dims = 48, .schedule = {2, 5, 8}}},
    TileRow{112, kElsewhere},
    TileRow{128, {.block_m = 128, .block_n = 32, .warps = 8, .register_dims = 128, .schedule = {0, 8, 8}}},
};

// Where K and V are converted on their way: a search over schedules with the model of a T4, at 128 times beside it. Up
// to 12 bytes spill.
constexpr std::array kLargeFullBFloat16 = {
    TileRow{32, {.block_m = 128, .block_n = 32, .warps = 4, .register_dims = 32, .schedule = {2, 4, 8}}},
    TileRow{40, {.block_m = 256, .block_n = 32, .warps = 8, .register_dims = 40, .schedule = {2, 4, 8}}},
    TileRow{48, {.block_m = 256, .block_n = 32, .warps = 8, .register_dims = 32, .schedule = {0, 3, 8}}},
    TileRow{64, {.block_m = 256, .block_n = 32, .warps = 8, .register_dims = 64, .schedule = {0, 2, 8}}},
    TileRow{72, {.block_m = 256, .block_n = 16, .warps = 8, .register_dims = 48, .schedule = {2, 5, 8}}},
    TileRow{80, {.block_m = 256, .block_n = 16, .warps = 8, .register_dims = 80, .schedule = {2, 7, 8}}},
    TileRow{88, {.block_m = 256, .block_n = 16, .warps = 8, .register_dims = 80, .schedule = {0, 1, 8}}},
    TileRow{96, {.block_m = 256, .block_n = 16, .warps = 8, .register_dims = 96, .schedule = {0, 1, 8}}},
    TileRow{104, {.block_m = 256, .block_n = 16, .warps = 8, .register_dims = 64, .schedule = {2, 6, 8}}},
    TileRow{112, {.block_m = 256, .block_n = 16, .warps = 8, .register_dims = 112, .schedule = {0, 2, 8}}},
    TileRow{128, {.block_m = 256, .block_n = 16, .warps = 8, .register_dims = 64, .schedule = {0, 2, 8}}},
    TileRow{160, {.block_m = 128, .block_n = 32, .warps = 8, .register_dims = 160, .schedule = {2, 8, 8}}},
    TileRow{192, kElsewhere},
    TileRow{224, {.block_m = 128, .block_n = 16, .warps = 8, .register_dims = 224, .schedule = {2, 8, 8}}},
};
constexpr std::array kLargeCausalBFloat16 = {
    TileRow{32, {.block_m = 128, .block_n = 32, .warps = 4, .register_dims = 32, .schedule = {2, 6, 8}}},
    TileRow{40, {.block_m = 256, .block_n = 32, .warps = 8, .register_dims = 40, .schedule = {0, 3, 8}}},
    TileRow{48, {.block_m = 256, .block_n = 32, .warps = 8, .register_dims = 48, .schedule = {2, 5, 8}}},
    TileRow{64, {.block_m = 256, .block_n = 32, .warps = 8, .register_dims = 64, .schedule = {2, 3, 8}}},
    TileRow{72, {.block_m = 256, .block_n = 16, .warps = 8, .register_dims = 80, .schedule = {0, 1, 8}}},
    TileRow{80, {.block_m = 256, .block_n = 16, .warps = 8, .register_dims = 80, .schedule = {2, 3, 8}}},
    TileRow{88, {.block_m = 256, .block_n = 16, .warps = 8, .register_dims = 80, .schedule = {0, 1, 8}}},
    TileRow{96, {.block_m = 256, .block_n = 16, .warps = 8, .register_dims = 96, .schedule = {0, 1, 8}}},
    TileRow{104, {.block_m = 256, .block_n = 16, .warps = 8, .register_dims = 64, .schedule = {2, 4, 8}}},
    TileRow{112, {.block_m = 256, .block_n = 16, .warps = 8, .register_dims = 64, .schedule = {2, 3, 8}}},
    TileRow{120, {.block_m = 256, .block_n = 16, .warps = 8, .register_dims = 64, .schedule = {2, 8, 8}}},
    TileRow{128, {.block_m = 256, .block_n = 16, .warps = 8, .register_dims = 64, .schedule = {0, 2, 8}}},
    TileRow{160, {.block_m = 128, .block_n = 32, .warps = 8, .register_dims = 160, .schedule = {2, 4, 8}}},
    TileRow{192, {.block_m = 128, .block_n = 32, .warps = 8, .register_dims = 176, .schedule = {2, 8, 8}}},
    TileRow{224, {.block_m = 128, .block_n = 16, .warps = 8, .register_dims = 192, .schedule = {0, 1, 8}}},
    TileRow{256, {.block_m = 128, .block_n = 16, .warps = 8, .register_dims = 160, .schedule = {2, 8, 8}}},
};
// The same for half the rows a block, with a mask and without.
constexpr std::array kMediumBFloat16 = {
    TileRow{32, kElsewhere},
    TileRow{48, {.block_m = 128, .block_n = 32, .warps = 4, .register_dims = 48, .schedule = {0, 1, 8}}},
    TileRow{64, {.block_m = 128, .block_n = 32, .warps = 4, .register_dims = 64, .schedule = {0, 2, 8}}},
    TileRow{80, {.block_m = 128, .block_n = 16, .warps = 4, .register_dims = 80, .schedule = {2, 4, 8}}},
    TileRow{96, {.block_m = 128, .block_n = 16, .warps = 4, .register_dims = 96, .schedule = {2, 4, 8}}},
    TileRow{112, kElsewhere},
    TileRow{128, {.block_m = 128, .block_n = 32, .warps = 8, .register_dims = 128, .schedule = {0, 1, 8}}},
};

constexpr TileRow of_64(LoopSchedule schedule) {
  return {64, {.block_m = 256, .block_n = 32, .warps = 8, .register_dims = 64, .schedule = schedule}};
}
constexpr TileRow of_128(LoopSchedule schedule) {
  return {128, {.block_m = 256, .block_n = 16, .warps = 8, .register_dims = 64, .schedule = schedule}};
}

// The same with features. At 128 up to 92 bytes spill.
constexpr std::array kBFloat16Features = {
    FeatureRow{{Feature::kBias16}, Mask::kNone, kAlone, of_64({0, 4, 8})},
    FeatureRow{{Feature::kBoolMask}, Mask::kNone, kAlone, of_64({0, 7, 8})},
    FeatureRow{{Feature::kBoolMask, Feature::kOneRow}, Mask::kNone, kAlone, of_64({0, 8, 8})},
    FeatureRow{{Feature::kSoftcap}, Mask::kNone, kAlone, of_64({0, 1, 8})},
    FeatureRow{{Feature::kVarlen}, Mask::kNone, kAlone, of_64({0, 4, 8})},
    FeatureRow{{Feature::kAlibi}, Mask::kCausal, kAlone, of_64({0, 4, 8})},
    FeatureRow{{Feature::kBias16}, Mask::kCausal, kAlone, of_64({0, 4, 8})},
    FeatureRow{{Feature::kBoolMask}, Mask::kCausal, kAlone, of_64({0, 1, 8})},
    FeatureRow{{Feature::kBoolMask, Feature::kOneRow}, Mask::kCausal, kAlone, of_64({0, 8, 8})},
    FeatureRow{{Feature::kSoftcap}, Mask::kCausal, kAlone, of_64({0, 1, 8})},
    FeatureRow{{Feature::kVarlen}, Mask::kCausal, kAlone, of_64({0, 5, 8})},
    FeatureRow{{Feature::kBoolMask}, Mask::kNone, kAlone, of_128({0, 7, 8})},
    FeatureRow{{Feature::kVarlen}, Mask::kNone, kAlone, of_128({0, 1, 8})},
    FeatureRow{{Feature::kAlibi}, Mask::kCausal, kAlone, of_128({0, 2, 8})},
    FeatureRow{{Feature::kBias16}, Mask::kCausal, kAlone, of_128({0, 4, 8})},
    FeatureRow{{Feature::kBoolMask, Feature::kOneRow}, Mask::kCausal, kAlone, of_128({0, 4, 8})},
    FeatureRow{{Feature::kDropout}, Mask::kCausal, kAlone, of_128({0, 8, 8})},
    FeatureRow{{Feature::kSoftcap}, Mask::kCausal, kAlone, of_128({0, 1, 8})},
    FeatureRow{{}, Mask::kWindow, kAlone, of_128({0, 2, 8})},
};

TileTable one_feature(const KernelSpec& spec) {
  const bool full = spec.mask == Mask::kNone;
  if (spec.features.only(Feature::kSoftcap) && spec.mask != Mask::kWindow)
    return full ? TileTable(kLargeFullSoftcap) : kLargeCausalSoftcap;
  if (spec.has(Feature::kUserBias)) return kLargeUserBias;
  if (spec.has(Feature::kUserScore)) return kLargeUserScore;
  if (full && spec.has(Feature::kBoolMask))
    return spec.has(Feature::kOneRow) ? TileTable(kLargeFullKeyMask) : kLargeFullBoolMask;
  if (full && spec.features.read_pairs()) return kLargeFullBias;
  if (spec.features.only(Feature::kDropout) && spec.mask != Mask::kWindow) return kLargeDropout;
  return only_if(full && spec.features.only(Feature::kVarlen), kLargeFullVarlen);
}

// Loads of one element at a time take registers for addresses, so that a warp has 16 rows at every head dim.
constexpr std::array kLargeElement = {
    TileRow{128, {.block_m = 128, .block_n = 16, .warps = 8, .register_dims = 128, .schedule = {2, 4, 7}}},
    TileRow{256, {.block_m = 128, .block_n = 16, .warps = 8, .register_dims = 208, .schedule = {2, 8, 8}}},
};

// Half the rows a block, where 256 would stand half empty: as many a warp up to head dim 112.
constexpr std::array kMedium = {
    TileRow{32, {.block_m = 128, .block_n = 32, .warps = 4, .register_dims = 32, .schedule = {2, 4, 4}}},
    TileRow{64, {.block_m = 128, .block_n = 32, .warps = 4, .register_dims = 64, .schedule = {2, 7, 8}}},
    TileRow{80, {.block_m = 128, .block_n = 16, .warps = 4, .register_dims = 80, .schedule = {2, 5, 8}}},
    TileRow{96, {.block_m = 128, .block_n = 16, .warps = 4, .register_dims = 80, .schedule = {2, 6, 8}}},
    TileRow{112, {.block_m = 128, .block_n = 16, .warps = 4, .register_dims = 64, .schedule = {2, 8, 8}}},
    TileRow{128, {.block_m = 128, .block_n = 32, .warps = 8, .register_dims = 128, .schedule = {2, 8, 8}}},
};

constexpr std::array kSmall = {
    TileRow{128, {.block_m = 64, .block_n = 16, .warps = 4, .register_dims = 128, .schedule = {2, 4, 7}}},
    TileRow{256, {.block_m = 64, .block_n = 16, .warps = 4, .register_dims = 192, .schedule = {2, 8, 8}}},
};

// With a window, positions in scores or cu_seqlens some large tiles spill at head dims 112 and 128, up to 100 bytes,
// and with positions at 192 (full: 16 bytes; NVRTC 12.9).
TileTables tiles(const KernelSpec& spec) {
  if (spec.access == GlobalAccess::kElement2B) return {TileTableList{kLargeElement}, TileTableList{kSmall}};
  const bool masked = spec.mask != Mask::kNone, window = spec.mask == Mask::kWindow,
             positions = spec.features.need_positions();
  return {TileTableList{bfloat16_of_features(kBFloat16Features, spec),
                        plain_bfloat16(spec, kLargeFullBFloat16, kLargeCausalBFloat16), one_feature(spec),
                        only_if(positions && window, kLargeWindowPositions),
                        only_if(positions, masked ? TileTable(kLargeMaskedPositions) : kLargePositions),
                        only_if(window, kLargeWindow), masked ? TileTable(kLargeCausal) : kLargeFull},
          TileTableList{only_if(spec.has(Feature::kBlockMask), kMediumBlockMask),
                        only_if(is_plain_bfloat16(spec), kMediumBFloat16), only_if(takes_medium(spec), kMedium)},
          TileTableList{kSmall}};
}

std::optional<std::string> check_tile(const KernelSpec& spec) {
  if (auto reason = check_rows_of_warps(spec)) return reason;
  const TileConfig& tile = spec.tile;
  if (tile.block_n < 16 || tile.block_n > 64 || tile.block_n % 16 != 0)
    return tile_name(spec) + " has " + std::to_string(tile.block_n) + " keys an iteration; accepted: 16, 32, 48 or 64";
  const LoopSchedule& at = tile.schedule;
  if (at.load < 0 || at.load >= at.barrier || at.barrier > at.first_keys || at.first_keys > 8)
    return schedule_name(spec) + "0 to 8, loads before the barrier, K fragments at it or after";
  return check_register_dims(spec);
}

// Slots for tiles of K and V, through which Q and out pass too, then the rows of Q that registers do not hold.
int shared_bytes(const KernelSpec& spec) {
  const int dims = kernel_dims(spec), value_dims = kernel_value_dims(spec);
  const int staging = spec.tile.block_m * row_pitch(staging_dims(value_dims));
  const int key_slots = 2, value_slots = spec.tile.schedule.barrier == 8 ? 2 : 3;
  const int row_of_slots = key_slots * row_pitch(dims) + value_slots * row_pitch(value_dims);
  return std::max(spec.tile.block_n * row_of_slots, staging) + shared_row_bytes(spec, dims);
}

int registers(const KernelSpec& spec) {
  const int m_tiles = row_tiles_of_warp(spec);
  const int acc_o = m_tiles * kernel_value_dims(spec) / 2;
  const int scores = m_tiles * spec.tile.block_n / 2;
  return acc_o + row_registers(spec, kernel_dims(spec)) + 2 * scores + kFragmentAndAddressRegisters;
}

constexpr std::array kColumns = {16, 32, 48};
constexpr std::array kSchedules = {LoopSchedule{2, 4, 4}, LoopSchedule{2, 4, 7}, LoopSchedule{2, 8, 8}};

}  // namespace

constinit const KernelFamily kForwardFamily = {.word = "fwd",
                                               .pack_group = "fwd",
                                               .template_file = "flash_fwd.cuh",
                                               .function = "flash_fwd",
                                               .params = "FlashFwdParams",
                                               .tile = "FlashFwdTile",
                                               .results = {.out = true},
                                               .rows = RowSide::kQueries,
                                               .reads_mask = true,
                                               .products = 2,
                                               .value_products = 1,
                                               .shared_bytes = shared_bytes,
                                               .registers = registers,
                                               .check_tile = check_tile,
                                               .default_tiles = tiles,
                                               .space = {kColumns, kSchedules}};

}  // namespace flash_attn_jit
