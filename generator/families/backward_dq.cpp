// Backward: dQ of a block's queries; S = Q K^T, dP = dO V^T, dQ += dS K.
#include "generator/families/backward_gradients.h"
#include "generator/families/families.h"

namespace flash_attn_jit {
namespace {

// Chosen like forward's. 32 rows a warp halve the reads of shared memory, which bind it, as far as the registers hold
// its gradients and operands: to head dim 96.
constexpr std::array kLargeFull = {
    TileRow{32, {.block_m = 128, .block_n = 24, .warps = 4, .register_dims = 32, .schedule = {0, 5, 8}}},
    TileRow{48, {.block_m = 256, .block_n = 32, .warps = 8, .register_dims = 48, .schedule = {0, 6, 8}}},
    TileRow{64, {.block_m = 256, .block_n = 24, .warps = 8, .register_dims = 64, .schedule = {0, 7, 8}}},
    TileRow{80, {.block_m = 256, .block_n = 16, .warps = 8, .register_dims = 80, .schedule = {0, 7, 8}}},
    TileRow{96, {.block_m = 256, .block_n = 16, .warps = 8, .register_dims = 96, .schedule = {4, 8, 8}}},
    TileRow{112, {.block_m = 128, .block_n = 32, .warps = 8, .register_dims = 112, .schedule = {0, 6, 8}}},
    TileRow{128, {.block_m = 128, .block_n = 16, .warps = 8, .register_dims = 128, .schedule = {2, 5, 8}}},
    TileRow{160, {.block_m = 128, .block_n = 16, .warps = 8, .register_dims = 160, .schedule = {0, 6, 8}}},
    TileRow{224, {.block_m = 128, .block_n = 8, .warps = 8, .register_dims = 192, .schedule = {0, 8, 8}}},
    TileRow{256, {.block_m = 64, .block_n = 8, .warps = 4, .register_dims = 112, .schedule = {0, 8, 8}}},
};
constexpr std::array kLargeCausal = {
    TileRow{32, {.block_m = 128, .block_n = 24, .warps = 4, .register_dims = 32, .schedule = {1, 8, 8}}},
    TileRow{48, {.block_m = 256, .block_n = 32, .warps = 8, .register_dims = 48, .schedule = {0, 6, 8}}},
    TileRow{64, {.block_m = 128, .block_n = 24, .warps = 4, .register_dims = 64, .schedule = {3, 6, 8}}},
    TileRow{80, {.block_m = 256, .block_n = 16, .warps = 8, .register_dims = 80, .schedule = {1, 7, 8}}},
    TileRow{96, {.block_m = 256, .block_n = 16, .warps = 8, .register_dims = 96, .schedule = {3, 8, 8}}},
    TileRow{112, {.block_m = 128, .block_n = 32, .warps = 8, .register_dims = 112, .schedule = {2, 5, 8}}},
    TileRow{128, {.block_m = 128, .block_n = 16, .warps = 8, .register_dims = 128, .schedule = {2, 5, 8}}},
    TileRow{160, {.block_m = 128, .block_n = 16, .warps = 8, .register_dims = 160, .schedule = {0, 6, 8}}},
    TileRow{224, {.block_m = 128, .block_n = 8, .warps = 8, .register_dims = 192, .schedule = {0, 8, 8}}},
    TileRow{256, {.block_m = 64, .block_n = 8, .warps = 4, .register_dims = 128, .schedule = {0, 8, 8}}},
};

// Half the rows a block, as many a warp.
constexpr std::array kMedium = {
    TileRow{48, {.block_m = 128, .block_n = 24, .warps = 4, .register_dims = 48, .schedule = {3, 6, 8}}},
    TileRow{64, {.block_m = 128, .block_n = 16, .warps = 4, .register_dims = 64, .schedule = {0, 5, 8}}},
    TileRow{80, {.block_m = 128, .block_n = 16, .warps = 4, .register_dims = 80, .schedule = {1, 5, 8}}},
};

// One gradient leaves registers for all dims.
constexpr std::array kSmall = {
    TileRow{128, {.block_m = 64, .block_n = 16, .warps = 4, .register_dims = 128, .schedule = {0, 8, 8}}},
};

// Windows and features take registers too. Rows for what would spill with the tiles above, or is faster with others
// (up to 40 bytes spill at 80 and 96 all the same).
constexpr std::array kLargeWindow = {
    TileRow{32, {.block_m = 128, .block_n = 16, .warps = 4, .register_dims = 32, .schedule = {3, 5, 8}}},
    TileRow{48, {.block_m = 256, .block_n = 32, .warps = 8, .register_dims = 48, .schedule = {3, 7, 8}}},
    TileRow{64, {.block_m = 128, .block_n = 16, .warps = 4, .register_dims = 64, .schedule = {0, 5, 8}}},
    TileRow{96, {.block_m = 256, .block_n = 16, .warps = 8, .register_dims = 80, .schedule = {4, 8, 8}}},
    TileRow{112, {.block_m = 128, .block_n = 16, .warps = 8, .register_dims = 112, .schedule = {3, 5, 8}}},
};
constexpr std::array kLargeVarlen = {
    TileRow{32, {.block_m = 128, .block_n = 24, .warps = 4, .register_dims = 32, .schedule = {1, 8, 8}}},
    TileRow{48, {.block_m = 256, .block_n = 32, .warps = 8, .register_dims = 48, .schedule = {3, 7, 8}}},
    TileRow{64, {.block_m = 128, .block_n = 16, .warps = 4, .register_dims = 64, .schedule = {0, 4, 8}}},
    TileRow{96, {.block_m = 256, .block_n = 16, .warps = 8, .register_dims = 96, .schedule = {3, 7, 8}}},
};
constexpr std::array kLargeScores = {
    TileRow{32, {.block_m = 128, .block_n = 24, .warps = 4, .register_dims = 32, .schedule = {0, 5, 8}}},
    TileRow{48, {.block_m = 256, .block_n = 32, .warps = 8, .register_dims = 48, .schedule = {5, 8, 8}}},
    TileRow{64, {.block_m = 128, .block_n = 16, .warps = 4, .register_dims = 64, .schedule = {0, 4, 8}}},
    TileRow{80, {.block_m = 256, .block_n = 16, .warps = 8, .register_dims = 80, .schedule = {0, 6, 8}}},
    TileRow{96, {.block_m = 128, .block_n = 32, .warps = 8, .register_dims = 96, .schedule = {0, 6, 8}}},
};

constexpr std::array kLargeFullScores = {
    TileRow{80, kElsewhere},
    TileRow{96, {.block_m = 256, .block_n = 16, .warps = 8, .register_dims = 96, .schedule = {3, 7, 8}}},
};
constexpr std::array kLargeWindowScores = {
    TileRow{64, kElsewhere},
    TileRow{80, {.block_m = 256, .block_n = 24, .warps = 8, .register_dims = 80, .schedule = {0, 6, 8}}},
};

constexpr std::array kLargeFullBias = {
    TileRow{48, kElsewhere},
    TileRow{64, {.block_m = 128, .block_n = 16, .warps = 4, .register_dims = 64, .schedule = {3, 5, 8}}},
};

// A user's functions, judged as forward's. With a block mask what is fastest at 128 spills 80 bytes.
constexpr std::array kLargeUserScores = {
    TileRow{48, kElsewhere},
    TileRow{64, {.block_m = 128, .block_n = 16, .warps = 4, .register_dims = 64, .schedule = {2, 5, 8}}},
    TileRow{112, kElsewhere},
    TileRow{128, {.block_m = 128, .block_n = 16, .warps = 8, .register_dims = 128, .schedule = {0, 5, 8}}},
};
constexpr std::array kLargeBlockMask = {
    TileRow{48, kElsewhere},
    TileRow{64, {.block_m = 128, .block_n = 32, .warps = 4, .register_dims = 64, .schedule = {0, 4, 8}}},
    TileRow{112, kElsewhere},
    TileRow{128, {.block_m = 128, .block_n = 32, .warps = 8, .register_dims = 128, .schedule = {0, 8, 8}}},
};

TileTable one_feature(const KernelSpec& spec) {
  if (spec.has(Feature::kBlockMask)) return kLargeBlockMask;
  if (spec.features.are_users()) return kLargeUserScores;
  return only_if(spec.mask == Mask::kNone && spec.features.read_numbers(), kLargeFullBias);
}

// Where K and V are converted on their way: a search over schedules with the model of a T4. Up to 20 bytes spill, at
// 80 56.
constexpr std::array kLargeFullBFloat16 = {
    TileRow{24, {.block_m = 128, .block_n = 24, .warps = 4, .register_dims = 32, .schedule = {1, 8, 8}}},
    TileRow{32, {.block_m = 128, .block_n = 24, .warps = 4, .register_dims = 32, .schedule = {2, 8, 8}}},
    TileRow{48, {.block_m = 256, .block_n = 32, .warps = 8, .register_dims = 48, .schedule = {0, 4, 8}}},
    TileRow{64, {.block_m = 256, .block_n = 24, .warps = 8, .register_dims = 64, .schedule = {0, 5, 8}}},
    TileRow{72, kElsewhere},
    TileRow{80, {.block_m = 256, .block_n = 24, .warps = 8, .register_dims = 80, .schedule = {0, 4, 8}}},
    TileRow{88, kElsewhere},
    TileRow{96, {.block_m = 256, .block_n = 16, .warps = 8, .register_dims = 96, .schedule = {2, 8, 8}}},
    TileRow{104, kElsewhere},
    TileRow{112, {.block_m = 128, .block_n = 32, .warps = 8, .register_dims = 112, .schedule = {1, 4, 8}}},
    TileRow{128, kElsewhere},
    TileRow{160, {.block_m = 128, .block_n = 24, .warps = 8, .register_dims = 160, .schedule = {2, 4, 8}}},
    TileRow{192, {.block_m = 128, .block_n = 16, .warps = 8, .register_dims = 192, .schedule = {3, 4, 8}}},
};
constexpr std::array kLargeCausalBFloat16 = {
    TileRow{16, {.block_m = 128, .block_n = 24, .warps = 4, .register_dims = 32, .schedule = {2, 8, 8}}},
    TileRow{24, {.block_m = 128, .block_n = 32, .warps = 4, .register_dims = 32, .schedule = {0, 6, 8}}},
    TileRow{32, {.block_m = 128, .block_n = 32, .warps = 4, .register_dims = 32, .schedule = {3, 8, 8}}},
    TileRow{40, {.block_m = 256, .block_n = 32, .warps = 8, .register_dims = 48, .schedule = {0, 4, 8}}},
    TileRow{48, kElsewhere},
    TileRow{64, {.block_m = 256, .block_n = 24, .warps = 8, .register_dims = 64, .schedule = {1, 3, 8}}},
    TileRow{80, {.block_m = 256, .block_n = 16, .warps = 8, .register_dims = 80, .schedule = {1, 4, 8}}},
    TileRow{88, kElsewhere},
    TileRow{96, {.block_m = 256, .block_n = 16, .warps = 8, .register_dims = 96, .schedule = {2, 4, 8}}},
    TileRow{104, kElsewhere},
    TileRow{112, {.block_m = 128, .block_n = 32, .warps = 8, .register_dims = 112, .schedule = {0, 4, 8}}},
    TileRow{128, kElsewhere},
    TileRow{160, {.block_m = 128, .block_n = 24, .warps = 8, .register_dims = 160, .schedule = {2, 4, 8}}},
    TileRow{192, {.block_m = 128, .block_n = 16, .warps = 8, .register_dims = 192, .schedule = {3, 4, 8}}},
};
constexpr std::array kMediumBFloat16 = {
    TileRow{48, {.block_m = 128, .block_n = 24, .warps = 4, .register_dims = 48, .schedule = {3, 8, 8}}},
    TileRow{64, {.block_m = 128, .block_n = 16, .warps = 4, .register_dims = 64, .schedule = {3, 8, 8}}},
    TileRow{80, {.block_m = 128, .block_n = 16, .warps = 4, .register_dims = 80, .schedule = {1, 7, 8}}},
};

// The same with features. With ALiBi 8 bytes spill at 64.
constexpr std::array kBFloat16Features = {
    FeatureRow{{Feature::kAlibi}, Mask::kNone, kAlone, of_64(256, 24, {1, 3, 8})},
    FeatureRow{{Feature::kBias16}, Mask::kNone, kAlone, of_64(128, 16, {3, 7, 8})},
    FeatureRow{{Feature::kBoolMask}, Mask::kNone, kAlone, of_64(128, 16, {3, 7, 8})},
    FeatureRow{{Feature::kVarlen}, Mask::kNone, kAlone, of_64(256, 24, {0, 3, 8})},
    FeatureRow{{Feature::kAlibi}, Mask::kCausal, kAlone, of_64(256, 24, {1, 5, 8})},
    FeatureRow{{Feature::kBias16}, Mask::kCausal, kAlone, of_64(128, 16, {0, 7, 8})},
    FeatureRow{{Feature::kVarlen}, Mask::kCausal, kAlone, of_64(256, 24, {1, 3, 8})},
    FeatureRow{{Feature::kAlibi}, Mask::kNone, kAlone, of_128(16, {2, 4, 8})},
    FeatureRow{{Feature::kBias16}, Mask::kNone, kAlone, of_128(16, {3, 4, 8})},
    FeatureRow{{Feature::kBoolMask}, Mask::kNone, kAlone, of_128(16, {3, 5, 8})},
    FeatureRow{{Feature::kBoolMask, Feature::kOneRow}, Mask::kNone, kAlone, of_128(16, {1, 4, 8})},
    FeatureRow{{Feature::kDropout}, Mask::kNone, kAlone, of_128(16, {0, 4, 8})},
    FeatureRow{{Feature::kSoftcap}, Mask::kNone, kAlone, of_128(16, {0, 4, 8})},
    FeatureRow{{Feature::kVarlen}, Mask::kNone, kAlone, of_128(16, {1, 4, 8})},
    FeatureRow{{Feature::kAlibi}, Mask::kCausal, kAlone, of_128(16, {0, 4, 8})},
    FeatureRow{{Feature::kBias16}, Mask::kCausal, kAlone, of_128(16, {2, 4, 8})},
    FeatureRow{{Feature::kBoolMask}, Mask::kCausal, kAlone, of_128(16, {3, 5, 8})},
    FeatureRow{{Feature::kBoolMask, Feature::kOneRow}, Mask::kCausal, kAlone, of_128(16, {1, 4, 8})},
    FeatureRow{{Feature::kDropout}, Mask::kCausal, kAlone, of_128(16, {0, 4, 8})},
    FeatureRow{{Feature::kSoftcap}, Mask::kCausal, kAlone, of_128(16, {0, 4, 8})},
    FeatureRow{{Feature::kVarlen}, Mask::kCausal, kAlone, of_128(16, {0, 4, 8})},
    FeatureRow{{}, Mask::kWindow, kAlone, of_128(16, {0, 6, 8})},
};

TileTables tiles(const KernelSpec& spec) {
  const bool scores = spec.features.change_scores(), window = spec.mask == Mask::kWindow;
  return {TileTableList{
              bfloat16_of_features(kBFloat16Features, spec),
              spec.access == GlobalAccess::kElement2B ? TileTable(kElementGradients)
                                                      : plain_bfloat16(spec, kLargeFullBFloat16, kLargeCausalBFloat16),
              one_feature(spec),
              only_if(scores && spec.mask != Mask::kCausal, window ? TileTable(kLargeWindowScores) : kLargeFullScores),
              only_if(scores, kLargeScores), only_if(window, kLargeWindow),
              only_if(spec.has(Feature::kVarlen), kLargeVarlen),
              spec.mask == Mask::kNone ? TileTable(kLargeFull) : kLargeCausal},
          TileTableList{only_if(is_plain_bfloat16(spec), kMediumBFloat16), only_if(takes_medium(spec), kMedium)},
          TileTableList{kSmall, kSmallGradients}};
}

constexpr GradientLayout kLayout = {.makes_dv = false, .statistics_bytes = 0};

int shared_bytes(const KernelSpec& spec) { return shared_bytes_of(kLayout, spec); }
int registers(const KernelSpec& spec) { return registers_of(kLayout, spec); }

}  // namespace

constinit const KernelFamily kBackwardDqFamily = {.word = "bwd_dq",
                                                  .pack_group = "bwd",
                                                  .template_file = "flash_bwd.cuh",
                                                  .function = "flash_bwd",
                                                  .params = "FlashBwdParams",
                                                  .tile = "FlashBwdTile",
                                                  .trait = "  static constexpr RowSide kRowSide = RowSide::kQueries;\n",
                                                  .results = {.dq = true},
                                                  .rows = RowSide::kQueries,
                                                  .reads_mask = true,
                                                  .products = 3,
                                                  .value_products = 1,
                                                  .output_splits = kLayout.output_splits,
                                                  .shared_bytes = shared_bytes,
                                                  .registers = registers,
                                                  .check_tile = check_gradient_tile,
                                                  .default_tiles = tiles,
                                                  .space = {kGradientColumns, kGradientSchedules}};

}  // namespace flash_attn_jit
