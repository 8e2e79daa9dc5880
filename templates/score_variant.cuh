// The score features of a kernel, in the order in which they are applied: one line each.
#pragma once

#include "alibi.cuh"
#include "score_feature.cuh"
#include "softcap.cuh"

template <class Traits>
using ScoreVariant = ScoreFeatures<FeatureIf<Traits::kIsSoftcap, Softcap>, FeatureIf<Traits::kHasAlibi, Alibi>>;
