// The score features of a kernel, in the order in which they are applied: one line each.
#pragma once

#include "alibi.cuh"
#include "pair_bias.cuh"
#include "score_feature.cuh"
#include "softcap.cuh"
#include "user_functions.cuh"
#include "user_score.cuh"

template <class Traits>
using ScoreVariant =
    ScoreFeatures<FeatureIf<Traits::kIsSoftcap, Softcap>, FeatureIf<Traits::kHasAlibi, Alibi>,
                  FeatureIf<Traits::kHasBias16,
                            PairBias<StoredBias<typename Traits::Stored>, Traits::kIsUnpaired, Traits::kIsOneRow>>,
                  FeatureIf<Traits::kHasBias32, PairBias<FloatBias, Traits::kIsUnpaired, Traits::kIsOneRow>>,
                  FeatureIf<Traits::kHasBoolMask, PairBias<BoolMask, Traits::kIsUnpaired, Traits::kIsOneRow>>,
                  FeatureIf<Traits::kHasUserScore || Traits::kHasUserBias, UserScoreFeature<UserScore>>>;

// Whether a lane should have neighbours in memory: see lane_order.cuh. With dropout they have to fill its cells.
template <class Traits>
constexpr bool kReadsNeighbours = ScoreVariant<Traits>::kReadsPairs && !Traits::kIsUnpaired &&
                                  !(Traits::kHasDropout && (Traits::kBlockN & (Traits::kBlockN - 1)) != 0);
