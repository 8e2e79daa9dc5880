// Backward: dK and dV of a block's keys; S = K Q^T, dP = V dO^T, dV += P dO, dK += dS Q.
#include "generator/families/backward_gradients.h"
#include "generator/families/families.h"

namespace flash_attn_jit {
namespace {

// Chosen like forward's. 32 rows a warp halve the reads of shared memory, which bind it, as far as the registers hold
// its gradients, which are two, and operands: to head dim 64. What spills is in tools/tile_search/records, at 56 and
// 128 with the causal mask and above 192; with groups of 2 some bytes do at 64.
constexpr std::array kLargeFull = {
    TileRow{32, {.block_m = 128, .block_n = 24, .warps = 4, .register_dims = 32, .schedule = {5, 7, 8}}},
    TileRow{48, {.block_m = 256, .block_n = 24, .warps = 8, .register_dims = 48, .schedule = {3, 6, 8}}},
    TileRow{64, {.block_m = 256, .block_n = 32, .warps = 8, .register_dims = 64, .schedule = {0, 8, 8}}},
    TileRow{80, {.block_m = 128, .block_n = 24, .warps = 8, .register_dims = 80, .schedule = {3, 6, 8}}},
    TileRow{96, {.block_m = 128, .block_n = 16, .warps = 8, .register_dims = 96, .schedule = {2, 6, 8}}},
    TileRow{128, {.block_m = 128, .block_n = 16, .warps = 8, .register_dims = 128, .schedule = {0, 7, 8}}},
    TileRow{160, {.block_m = 128, .block_n = 16, .warps = 8, .register_dims = 160, .schedule = {0, 4, 8}}},
    TileRow{192, {.block_m = 128, .block_n = 8, .warps = 8, .register_dims = 192, .schedule = {2, 8, 8}}},
    TileRow{224, {.block_m = 128, .block_n = 8, .warps = 8, .register_dims = 176, .schedule = {3, 8, 8}}},
    TileRow{256, {.block_m = 64, .block_n = 8, .warps = 4, .register_dims = 112, .schedule = {6, 8, 8}}},
};
constexpr std::array kLargeCausal = {
    TileRow{32, {.block_m = 256, .block_n = 32, .warps = 8, .register_dims = 32, .schedule = {3, 6, 8}}},
    TileRow{40, {.block_m = 256, .block_n = 32, .warps = 8, .register_dims = 40, .schedule = {4, 6, 8}}},
    TileRow{48, {.block_m = 256, .block_n = 32, .warps = 8, .register_dims = 48, .schedule = {0, 3, 8}}},
    TileRow{56, {.block_m = 256, .block_n = 32, .warps = 8, .register_dims = 56, .schedule = {1, 7, 8}}},
    TileRow{64, {.block_m = 256, .block_n = 32, .warps = 8, .register_dims = 64, .schedule = {1, 8, 8}}},
    TileRow{80, {.block_m = 128, .block_n = 24, .warps = 8, .register_dims = 80, .schedule = {2, 7, 8}}},
    TileRow{96, {.block_m = 128, .block_n = 16, .warps = 8, .register_dims = 96, .schedule = {0, 6, 8}}},
    TileRow{112, {.block_m = 128, .block_n = 16, .warps = 8, .register_dims = 112, .schedule = {3, 7, 8}}},
    TileRow{128, {.block_m = 128, .block_n = 16, .warps = 8, .register_dims = 128, .schedule = {3, 8, 8}}},
    TileRow{160, {.block_m = 128, .block_n = 16, .warps = 8, .register_dims = 160, .schedule = {5, 8, 8}}},
    TileRow{192, {.block_m = 128, .block_n = 8, .warps = 8, .register_dims = 192, .schedule = {0, 8, 8}}},
    TileRow{224, {.block_m = 128, .block_n = 8, .warps = 8, .register_dims = 176, .schedule = {0, 8, 8}}},
    TileRow{256, {.block_m = 64, .block_n = 8, .warps = 4, .register_dims = 112, .schedule = {0, 8, 8}}},
};

// Half the rows a block, as many a warp.
constexpr std::array kMedium = {
    TileRow{32, {.block_m = 128, .block_n = 24, .warps = 4, .register_dims = 32, .schedule = {3, 6, 8}}},
    TileRow{48, {.block_m = 128, .block_n = 16, .warps = 4, .register_dims = 48, .schedule = {1, 7, 8}}},
};
// With the causal mask all that are as fast spill.
constexpr std::array kMediumFull = {
    TileRow{64, {.block_m = 128, .block_n = 16, .warps = 4, .register_dims = 64, .schedule = {7, 8, 8}}},
};

// Windows and features take registers too: rows for what would spill with the tiles above. Some do all the same, up to
// 16 bytes at 48 and 64, and are faster than all that do not.
constexpr std::array kLargeWindow = {
    TileRow{32, {.block_m = 128, .block_n = 24, .warps = 4, .register_dims = 32, .schedule = {3, 6, 8}}},
    TileRow{48, {.block_m = 128, .block_n = 32, .warps = 4, .register_dims = 48, .schedule = {3, 8, 8}}},
    TileRow{64, {.block_m = 128, .block_n = 16, .warps = 4, .register_dims = 64, .schedule = {1, 8, 8}}},
    TileRow{80, {.block_m = 128, .block_n = 24, .warps = 8, .register_dims = 80, .schedule = {2, 6, 8}}},
    TileRow{96, {.block_m = 128, .block_n = 16, .warps = 8, .register_dims = 96, .schedule = {0, 6, 8}}},
    TileRow{112, {.block_m = 128, .block_n = 16, .warps = 8, .register_dims = 112, .schedule = {3, 8, 8}}},
    TileRow{128, {.block_m = 128, .block_n = 16, .warps = 8, .register_dims = 128, .schedule = {5, 8, 8}}},
};
// With scores that are computed on, or the loop over a group, a window leaves still fewer.
constexpr std::array kLargeCrowdedWindow = {
    TileRow{48, kElsewhere},
    TileRow{64, {.block_m = 128, .block_n = 32, .warps = 8, .register_dims = 64, .schedule = {2, 6, 8}}},
};
constexpr std::array kLargePositions = {
    TileRow{32, {.block_m = 128, .block_n = 32, .warps = 4, .register_dims = 32, .schedule = {3, 8, 8}}},
    TileRow{48, {.block_m = 128, .block_n = 16, .warps = 4, .register_dims = 48, .schedule = {1, 8, 8}}},
    TileRow{64, {.block_m = 128, .block_n = 16, .warps = 4, .register_dims = 64, .schedule = {1, 8, 8}}},
};
constexpr std::array kLargeFeatures = {
    TileRow{32, {.block_m = 128, .block_n = 24, .warps = 4, .register_dims = 32, .schedule = {5, 7, 8}}},
    TileRow{48, {.block_m = 128, .block_n = 16, .warps = 4, .register_dims = 48, .schedule = {1, 8, 8}}},
    TileRow{64, {.block_m = 256, .block_n = 32, .warps = 8, .register_dims = 64, .schedule = {1, 8, 8}}},
};

// One feature alone without a mask. Above 128 what is fastest spills up to 80 bytes.
constexpr std::array kLargeFullSoftcap = {
    TileRow{32, kElsewhere},
    TileRow{48, {.block_m = 256, .block_n = 24, .warps = 8, .register_dims = 48, .schedule = {1, 4, 8}}},
    TileRow{96, kElsewhere},
    TileRow{112, {.block_m = 128, .block_n = 32, .warps = 8, .register_dims = 112, .schedule = {1, 7, 8}}},
    TileRow{128, kElsewhere},
    TileRow{160, {.block_m = 128, .block_n = 24, .warps = 8, .register_dims = 160, .schedule = {0, 7, 8}}},
};
constexpr std::array kLargeFullAlibi = {
    TileRow{32, {.block_m = 256, .block_n = 48, .warps = 8, .register_dims = 32, .schedule = {3, 5, 8}}},
    TileRow{160, kElsewhere},
    TileRow{192, {.block_m = 128, .block_n = 8, .warps = 8, .register_dims = 192, .schedule = {7, 8, 8}}},
};
constexpr std::array kLargeFullVarlen = {
    TileRow{112, kElsewhere},
    TileRow{128, {.block_m = 128, .block_n = 16, .warps = 8, .register_dims = 128, .schedule = {7, 8, 8}}},
    TileRow{160, {.block_m = 128, .block_n = 24, .warps = 8, .register_dims = 160, .schedule = {3, 5, 8}}},
    TileRow{192, kElsewhere},
    TileRow{224, {.block_m = 128, .block_n = 8, .warps = 8, .register_dims = 176, .schedule = {0, 8, 8}}},
};

// Where something is read for every pair, which waits in registers: what is fastest spills, at 128 up to 290 bytes.
constexpr std::array kLargeFullBias = {
    TileRow{48, kElsewhere},
    TileRow{64, {.block_m = 256, .block_n = 32, .warps = 8, .register_dims = 64, .schedule = {5, 6, 8}}},
};
constexpr std::array kLargeFullBoolMask = {
    TileRow{48, kElsewhere},
    TileRow{64, {.block_m = 256, .block_n = 32, .warps = 8, .register_dims = 64, .schedule = {1, 6, 8}}},
};
constexpr std::array kLargeFullPairs = {
    TileRow{112, kElsewhere},
    TileRow{128, {.block_m = 128, .block_n = 32, .warps = 8, .register_dims = 128, .schedule = {7, 8, 8}}},
};

constexpr std::array kLargeFullKeyMask = {
    TileRow{48, kElsewhere},
    TileRow{64, {.block_m = 256, .block_n = 32, .warps = 8, .register_dims = 64, .schedule = {3, 8, 8}}},
    TileRow{112, kElsewhere},
    TileRow{128, {.block_m = 128, .block_n = 32, .warps = 8, .register_dims = 128, .schedule = {7, 8, 8}}},
};

// A user's functions, judged as forward's. Their tiles spill up to 80 bytes, as much as all that are as fast.
constexpr std::array kLargeUserScores = {
    TileRow{112, kElsewhere},
    TileRow{128, {.block_m = 128, .block_n = 16, .warps = 8, .register_dims = 128, .schedule = {7, 8, 8}}},
};
constexpr std::array kLargeBlockMask = {
    TileRow{48, kElsewhere},
    TileRow{64, {.block_m = 128, .block_n = 32, .warps = 4, .register_dims = 64, .schedule = {0, 4, 8}}},
    TileRow{112, kElsewhere},
    TileRow{128, {.block_m = 128, .block_n = 32, .warps = 8, .register_dims = 128, .schedule = {0, 7, 8}}},
};

TileTable full_feature(const FeatureSet& features) {
  if (features.has(Feature::kBoolMask))
    return features.has(Feature::kOneRow) ? TileTable(kLargeFullKeyMask) : kLargeFullBoolMask;
  if (features.read_pairs()) return kLargeFullBias;
  if (features.has(Feature::kBlockMask)) return kLargeBlockMask;
  if (features.are_users()) return kLargeUserScores;
  if (features.only(Feature::kSoftcap)) return kLargeFullSoftcap;
  if (features.only(Feature::kAlibi)) return kLargeFullAlibi;
  return only_if(features.only(Feature::kVarlen), kLargeFullVarlen);
}

// Where Q and dO are converted on their way: a search over schedules with the model of a T4. Up to 32 bytes spill, at
// 224 60.
constexpr std::array kLargeFullBFloat16 = {
    TileRow{16, {.block_m = 128, .block_n = 32, .warps = 4, .register_dims = 32, .schedule = {2, 4, 8}}},
    TileRow{24, {.block_m = 128, .block_n = 32, .warps = 4, .register_dims = 32, .schedule = {3, 6, 8}}},
    TileRow{32, {.block_m = 128, .block_n = 32, .warps = 4, .register_dims = 32, .schedule = {2, 4, 8}}},
    TileRow{40, {.block_m = 128, .block_n = 24, .warps = 4, .register_dims = 48, .schedule = {3, 6, 8}}},
    TileRow{48, {.block_m = 256, .block_n = 24, .warps = 8, .register_dims = 48, .schedule = {0, 6, 8}}},
    TileRow{56, {.block_m = 256, .block_n = 32, .warps = 8, .register_dims = 64, .schedule = {0, 6, 8}}},
    TileRow{72, kElsewhere},
    TileRow{80, {.block_m = 128, .block_n = 24, .warps = 8, .register_dims = 80, .schedule = {2, 6, 8}}},
    TileRow{88, kElsewhere},
    TileRow{96, {.block_m = 128, .block_n = 32, .warps = 8, .register_dims = 96, .schedule = {3, 4, 8}}},
    TileRow{104, {.block_m = 128, .block_n = 16, .warps = 8, .register_dims = 112, .schedule = {1, 5, 8}}},
    TileRow{112, {.block_m = 128, .block_n = 16, .warps = 8, .register_dims = 112, .schedule = {2, 5, 8}}},
    TileRow{120, {.block_m = 128, .block_n = 16, .warps = 8, .register_dims = 128, .schedule = {3, 7, 8}}},
    TileRow{128, {.block_m = 128, .block_n = 16, .warps = 8, .register_dims = 128, .schedule = {1, 7, 8}}},
    TileRow{160, {.block_m = 128, .block_n = 24, .warps = 8, .register_dims = 160, .schedule = {0, 8, 8}}},
    TileRow{192, kElsewhere},
    TileRow{224, {.block_m = 128, .block_n = 8, .warps = 8, .register_dims = 160, .schedule = {2, 8, 8}}},
};
constexpr std::array kLargeCausalBFloat16 = {
    TileRow{16, {.block_m = 128, .block_n = 24, .warps = 4, .register_dims = 32, .schedule = {0, 6, 8}}},
    TileRow{24, {.block_m = 128, .block_n = 16, .warps = 4, .register_dims = 32, .schedule = {3, 4, 8}}},
    TileRow{32, {.block_m = 128, .block_n = 24, .warps = 4, .register_dims = 32, .schedule = {0, 6, 8}}},
    TileRow{40, {.block_m = 256, .block_n = 32, .warps = 8, .register_dims = 48, .schedule = {0, 8, 8}}},
    TileRow{48, {.block_m = 256, .block_n = 32, .warps = 8, .register_dims = 48, .schedule = {3, 7, 8}}},
    TileRow{56, {.block_m = 256, .block_n = 32, .warps = 8, .register_dims = 64, .schedule = {2, 5, 8}}},
    TileRow{64, {.block_m = 256, .block_n = 32, .warps = 8, .register_dims = 64, .schedule = {0, 6, 8}}},
    TileRow{80, {.block_m = 128, .block_n = 24, .warps = 8, .register_dims = 80, .schedule = {0, 3, 8}}},
    TileRow{112, kElsewhere},
    TileRow{120, {.block_m = 128, .block_n = 16, .warps = 8, .register_dims = 128, .schedule = {3, 6, 8}}},
    TileRow{128, {.block_m = 128, .block_n = 16, .warps = 8, .register_dims = 128, .schedule = {0, 8, 8}}},
    TileRow{160, {.block_m = 128, .block_n = 24, .warps = 8, .register_dims = 160, .schedule = {0, 8, 8}}},
    TileRow{192, kElsewhere},
    TileRow{224, {.block_m = 128, .block_n = 8, .warps = 8, .register_dims = 160, .schedule = {2, 8, 8}}},
};
// With a mask and without.
constexpr std::array kMediumBFloat16 = {
    TileRow{32, {.block_m = 128, .block_n = 24, .warps = 4, .register_dims = 32, .schedule = {0, 8, 8}}},
    TileRow{48, {.block_m = 128, .block_n = 16, .warps = 4, .register_dims = 48, .schedule = {2, 4, 8}}},
};

// The same with features, or where a group's gradients are added up. Up to 28 bytes spill, with a window at 64 108, and
// where something is read for every pair up to 208.
constexpr std::array kBFloat16Features = {
    FeatureRow{{Feature::kAlibi}, Mask::kNone, kAlone, of_64(128, 16, {3, 8, 8})},
    FeatureRow{{Feature::kBias16}, Mask::kNone, kAlone, of_64(256, 32, {2, 6, 8})},
    FeatureRow{{Feature::kBoolMask}, Mask::kNone, kAlone, of_64(256, 32, {1, 8, 8})},
    FeatureRow{{Feature::kBoolMask, Feature::kOneRow}, Mask::kNone, kAlone, of_64(256, 32, {1, 6, 8})},
    FeatureRow{{Feature::kVarlen}, Mask::kNone, kAlone, of_64(256, 32, {0, 4, 8})},
    FeatureRow{{Feature::kBias16}, Mask::kCausal, kAlone, of_64(256, 32, {3, 8, 8})},
    FeatureRow{{Feature::kBoolMask}, Mask::kCausal, kAlone, of_64(128, 16, {2, 8, 8})},
    FeatureRow{{Feature::kBoolMask, Feature::kOneRow}, Mask::kCausal, kAlone, of_64(256, 32, {0, 8, 8})},
    FeatureRow{{Feature::kSoftcap}, Mask::kCausal, kAlone, of_64(256, 32, {0, 4, 8})},
    FeatureRow{{Feature::kVarlen}, Mask::kCausal, kAlone, of_64(256, 32, {1, 6, 8})},
    FeatureRow{{}, Mask::kWindow, kAlone, of_64(256, 32, {1, 6, 8})},
    FeatureRow{{}, Mask::kNone, kInGroups, of_64(256, 32, {1, 6, 8})},
    FeatureRow{{Feature::kVarlen}, Mask::kNone, kInGroups, of_64(256, 32, {2, 4, 8})},
    FeatureRow{{}, Mask::kCausal, kInGroups, of_64(256, 32, {3, 8, 8})},
    FeatureRow{{Feature::kVarlen}, Mask::kCausal, kInGroups, of_64(256, 32, {2, 6, 8})},
    FeatureRow{{Feature::kAlibi}, Mask::kNone, kAlone, of_128(16, {0, 8, 8})},
    FeatureRow{{Feature::kBias16}, Mask::kNone, kAlone, of_128(16, {1, 4, 8})},
    FeatureRow{{Feature::kBias32}, Mask::kNone, kAlone, of_128(16, {3, 4, 8})},
    FeatureRow{{Feature::kBoolMask}, Mask::kNone, kAlone, of_128(16, {2, 8, 8})},
    FeatureRow{{Feature::kBoolMask, Feature::kOneRow}, Mask::kNone, kAlone, of_128(16, {0, 7, 8})},
    FeatureRow{{Feature::kDropout}, Mask::kNone, kAlone, of_128(16, {2, 4, 8})},
    FeatureRow{{Feature::kSoftcap}, Mask::kNone, kAlone, of_128(16, {0, 4, 8})},
    FeatureRow{{Feature::kVarlen}, Mask::kNone, kAlone, of_128(16, {0, 6, 8})},
    FeatureRow{{Feature::kBias16}, Mask::kCausal, kAlone, of_128(16, {1, 4, 8})},
    FeatureRow{{Feature::kBias32}, Mask::kCausal, kAlone, of_128(16, {3, 6, 8})},
    FeatureRow{{Feature::kBoolMask, Feature::kOneRow}, Mask::kCausal, kAlone, of_128(16, {2, 8, 8})},
    FeatureRow{{Feature::kDropout}, Mask::kCausal, kAlone, of_128(16, {3, 4, 8})},
    FeatureRow{{Feature::kSoftcap}, Mask::kCausal, kAlone, of_128(16, {2, 6, 8})},
    FeatureRow{{}, Mask::kWindow, kAlone, of_128(16, {0, 8, 8})},
    FeatureRow{{}, Mask::kNone, kInGroups, of_128(16, {2, 6, 8})},
    FeatureRow{{}, Mask::kCausal, kInGroups, of_128(16, {1, 6, 8})},
    FeatureRow{{Feature::kVarlen}, Mask::kCausal, kInGroups, of_128(16, {0, 8, 8})},
    FeatureRow{{}, Mask::kWindow, kInGroups, of_128(16, {3, 6, 8})},
};

TileTables tiles(const KernelSpec& spec) {
  const bool window = spec.mask == Mask::kWindow, crowded = spec.features.change_scores() || spec.group_size > 1;
  const bool roomy = spec.mask == Mask::kNone && spec.group_size == 1;
  return {TileTableList{bfloat16_of_features(kBFloat16Features, spec, spec.group_size > 1),
                        spec.access == GlobalAccess::kElement2B
                            ? TileTable(kElementGradients)
                            : plain_bfloat16(spec, kLargeFullBFloat16, kLargeCausalBFloat16),
                        only_if(window, crowded ? TileTable(kLargeCrowdedWindow) : kLargeWindow),
                        only_if(roomy, full_feature(spec.features)),
                        only_if(roomy && spec.features.read_pairs(), kLargeFullPairs),
                        only_if(window || spec.features.need_positions(), kLargePositions),
                        only_if(!spec.features.empty(), kLargeFeatures),
                        spec.mask == Mask::kNone ? TileTable(kLargeFull) : kLargeCausal},
          TileTableList{only_if(is_plain_bfloat16(spec), kMediumBFloat16), only_if(takes_medium(spec), kMedium),
                        only_if(takes_medium(spec) && spec.mask == Mask::kNone, kMediumFull)},
          TileTableList{kSmallGradients}};
}

// Two blocks make half of each gradient's dims above 128, or where both have more than 256: 16 rows of both would take
// all of a thread's registers.
constexpr GradientLayout kLayout = {
    .makes_dv = true, .statistics_bytes = 8, .output_splits = [](const KernelSpec& spec) {
      return spec.head_dim + spec.value_head_dim() > 256 ? 2 : 1;
    }};

int shared_bytes(const KernelSpec& spec) { return shared_bytes_of(kLayout, spec); }
int registers(const KernelSpec& spec) { return registers_of(kLayout, spec); }

}  // namespace

constinit const KernelFamily kBackwardDkDvFamily = {.word = "bwd_dkdv",
                                                    .pack_group = "bwd",
                                                    .template_file = "flash_bwd.cuh",
                                                    .function = "flash_bwd",
                                                    .params = "FlashBwdParams",
                                                    .tile = "FlashBwdTile",
                                                    .trait = "  static constexpr RowSide kRowSide = RowSide::kKeys;\n",
                                                    .results = {.dkdv = true},
                                                    .rows = RowSide::kKeys,
                                                    .reads_mask = true,
                                                    .products = 4,
                                                    .value_products = 2,
                                                    .output_splits = kLayout.output_splits,
                                                    .shared_bytes = shared_bytes,
                                                    .registers = registers,
                                                    .check_tile = check_key_gradient_tile,
                                                    .default_tiles = tiles,
                                                    .space = {kGradientColumns, kGradientSchedules}};

}  // namespace flash_attn_jit
