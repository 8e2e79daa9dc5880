// What a score feature may do, and how features are put together. A feature is a class in a header of its own that
// derives from ScoreFeature and redefines the hooks it needs; score_variant.cuh lists it; its parameters are a struct
// in attention_params.cuh.
//
// On the way from a product q k to the exponent of its probability p, in both passes:
//
//   s = score(product)           forward:  exponent = bias(s) x softmax_scale_log2 - row_max
//                                backward: exponent = bias(s x softmax_scale_log2 - lse)
//
// and in backward, on the way from the gradient of s to the gradient of the product: gradient(ds, s).
//
// A feature hides a pair with a score of -inf, anywhere; what is hidden by rows' bounds is mask.cuh's.
#pragma once

#include "accumulator.cuh"
#include "attention_params.cuh"
#include "primitives.cuh"

// The hooks, as they are where a feature does nothing.
struct ScoreFeature {
  // Whether the feature has score() and gradient(). One of a kernel's features may: only the last score is kept.
  static constexpr bool kIsNonlinear = false;

  // Before the first score of a block's query head. A bias of `unit` adds 1 to the exponent, whose base is 2.
  template <class Sequence>
  __device__ __forceinline__ void prepare(const AttentionParams&, const Sequence&, int /*head*/, float /*unit*/) {}

  __device__ __forceinline__ float score(float product) const { return product; }
  template <class Sequence>
  __device__ __forceinline__ float bias(float score, const Sequence&, int /*query*/, int /*key*/) const {
    return score;
  }
  __device__ __forceinline__ float gradient(float dscore, float /*score*/) const { return dscore; }
};

// Features one after the other.
template <class... Features>
struct ScoreFeatures : ScoreFeature {};

template <class First, class... Rest>
class ScoreFeatures<First, Rest...> {
  static_assert(!First::kIsNonlinear || !ScoreFeatures<Rest...>::kIsNonlinear, "gradient() knows the last score alone");

 public:
  static constexpr bool kIsNonlinear = First::kIsNonlinear || ScoreFeatures<Rest...>::kIsNonlinear;

  template <class Sequence>
  __device__ __forceinline__ void prepare(const AttentionParams& params, const Sequence& sequence, int head,
                                          float unit) {
    first_.prepare(params, sequence, head, unit);
    rest_.prepare(params, sequence, head, unit);
  }

  __device__ __forceinline__ float score(float product) const { return rest_.score(first_.score(product)); }
  template <class Sequence>
  __device__ __forceinline__ float bias(float score, const Sequence& sequence, int query, int key) const {
    return rest_.bias(first_.bias(score, sequence, query, key), sequence, query, key);
  }
  __device__ __forceinline__ float gradient(float dscore, float score) const {
    return first_.gradient(rest_.gradient(dscore, score), score);
  }

 private:
  First first_;
  ScoreFeatures<Rest...> rest_;
};

// A feature that a kernel has or has not.
template <bool kIsOn, class Feature>
struct OptionalFeature {
  using Type = Feature;
};
template <class Feature>
struct OptionalFeature<false, Feature> {
  using Type = ScoreFeature;
};
template <bool kIsOn, class Feature>
using FeatureIf = typename OptionalFeature<kIsOn, Feature>::Type;

// Forward: products become scores, biases and all. `query` and `key` are the lane's first row and column.
template <int kMTiles, int kNTiles, class Features, class Sequence>
__device__ __forceinline__ void to_scores(Accumulator<kMTiles, kNTiles>& acc, const Features& features,
                                          const Sequence& sequence, int query, int key) {
#pragma unroll
  for (int m = 0; m < kMTiles; ++m)
#pragma unroll
    for (int n = 0; n < kNTiles; ++n)
#pragma unroll
      for (int c = 0; c < 4; ++c)
        acc[m][n][c] =
            features.bias(features.score(acc[m][n][c]), sequence, query + 16 * m + c / 2 * 8, key + 8 * n + c % 2);
}
