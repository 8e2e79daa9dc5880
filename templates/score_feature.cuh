// What a score feature may do, and how features are put together. A feature is a class in a header of its own that
// derives from ScoreFeature and redefines the hooks it needs; score_variant.cuh lists it; its parameters are a struct
// in attention_params.cuh.
//
// On the way from a product q k to the exponent of its probability p, in both passes:
//
//   s = score(product)           forward:  exponent = bias(s) x softmax_scale_log2 - row_max
//                                backward: exponent = bias(s x softmax_scale_log2 - lse)
//
// and in backward, on the way from the gradient of s to the gradient of the product: gradient(ds, s), or, where a score
// does not tell its derivative, ds times what score() said of it: kHasDerivative.
//
// What bias() needs from memory is fetched ahead of it: of a query, for as many keys as a lane has. Where score() does
// nothing, products start from bias(0) then, so that what was fetched is used up before them: kStartsScores.
//
// A feature hides a pair with a score of -inf, anywhere; what is hidden by rows' bounds is mask.cuh's.
#pragma once

#include "accumulator.cuh"
#include "attention_params.cuh"
#include "primitives.cuh"

// Finite numbers beyond kMostBias, of either sign, count as that: in units of the smallest scale they stay finite, as
// nothing but -inf hides.
__device__ __forceinline__ float bounded_bias(float bias) {
  constexpr unsigned kSign = 0x80000000u;
  const unsigned bits = bits_of_float(bias);
  const float magnitude = float_of_bits(bits & ~kSign);
  const bool is_beyond = magnitude > kMostBias && magnitude < infinity();
  return float_of_bits(is_beyond ? (bits & kSign) | bits_of_float(kMostBias) : bits);
}

// The hooks, as they are where a feature does nothing.
struct ScoreFeature {
  // Whether the feature has score() and gradient(). One of a kernel's features may: only the last score is kept.
  static constexpr bool kIsNonlinear = false;
  static constexpr bool kHasDerivative = false;
  // Whether what score() makes is scaled already: its exponent is it x log2(e).
  static constexpr bool kScales = false;

  // Whether it may hide all keys of a row; and whether it reads a tensor of pairs.
  static constexpr bool kMayHideRows = false, kReadsPairs = false;
  static constexpr bool kIsOneRow = false;  // and it says the same of every query
  // Whether what it adds may be so large that a score's own digits are gone.
  static constexpr bool kIsLarge = false;
  static constexpr bool kStartsScores = false;
  // Whether what is fetched may say that a whole tile is hidden, which is then left out: shows(). Or whether keys are
  // hidden from all queries: shows_key().
  static constexpr bool kHidesTiles = false, kHidesKeys = false;
  template <int kCount, bool kAtOnce>
  struct Fetched {};
  template <class AnyFetched>
  static __device__ __forceinline__ constexpr bool shows(const AnyFetched&) {
    return true;
  }
  template <class Sequence>
  __device__ __forceinline__ bool shows_key(const Sequence&, int /*key*/) const {
    return true;
  }

  // Before the first score of a block's query head. A bias of `unit` adds 1 to the exponent, whose base is 2.
  template <class Params, class Sequence>
  __device__ __forceinline__ void prepare(const Params&, const Sequence&, int /*head*/, float /*unit*/) {}

  __device__ __forceinline__ float score(float product, int /*query*/, int /*key*/) const { return product; }
  // The same for backward; `derivative` is told where kHasDerivative.
  __device__ __forceinline__ float score(float product, int /*query*/, int /*key*/, float& /*derivative*/) const {
    return product;
  }
  // Of kCount keys: key + Keys::at(i). What does not exist is read as the last one that does.
  template <class Keys, int kCount, bool kQueryExists, bool kKeysExist, class Sequence>
  __device__ __forceinline__ void fetch(Fetched<kCount, Keys::kAtOnce>&, const Sequence&, int /*query*/,
                                        int /*key*/) const {}
  // `element`: which of the keys it is for which something was fetched.
  template <class AnyFetched, class Sequence>
  __device__ __forceinline__ float bias(float score, const AnyFetched&, int /*element*/, const Sequence&, int /*query*/,
                                        int /*key*/) const {
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
  static constexpr bool kScales = First::kScales || ScoreFeatures<Rest...>::kScales;
  static constexpr bool kHasDerivative = First::kHasDerivative || ScoreFeatures<Rest...>::kHasDerivative;
  static constexpr bool kMayHideRows = First::kMayHideRows || ScoreFeatures<Rest...>::kMayHideRows;
  static constexpr bool kReadsPairs = First::kReadsPairs || ScoreFeatures<Rest...>::kReadsPairs;
  static constexpr bool kIsOneRow = First::kIsOneRow || ScoreFeatures<Rest...>::kIsOneRow;
  static constexpr bool kIsLarge = First::kIsLarge || ScoreFeatures<Rest...>::kIsLarge;
  static constexpr bool kStartsScores = kReadsPairs && !kIsNonlinear;
  static constexpr bool kHidesTiles = First::kHidesTiles || ScoreFeatures<Rest...>::kHidesTiles;
  static constexpr bool kHidesKeys = First::kHidesKeys || ScoreFeatures<Rest...>::kHidesKeys;

  template <int kCount, bool kAtOnce>
  struct Fetched {
    typename First::template Fetched<kCount, kAtOnce> first;
    typename ScoreFeatures<Rest...>::template Fetched<kCount, kAtOnce> rest;
  };

  template <class Params, class Sequence>
  __device__ __forceinline__ void prepare(const Params& params, const Sequence& sequence, int head, float unit) {
    first_.prepare(params, sequence, head, unit);
    rest_.prepare(params, sequence, head, unit);
  }

  __device__ __forceinline__ float score(float product, int query, int key) const {
    return rest_.score(first_.score(product, query, key), query, key);
  }
  __device__ __forceinline__ float score(float product, int query, int key, float& derivative) const {
    return rest_.score(first_.score(product, query, key, derivative), query, key, derivative);
  }
  template <class Keys, int kCount, bool kQueryExists, bool kKeysExist, class Sequence>
  __device__ __forceinline__ void fetch(Fetched<kCount, Keys::kAtOnce>& fetched, const Sequence& sequence, int query,
                                        int key) const {
    first_.template fetch<Keys, kCount, kQueryExists, kKeysExist>(fetched.first, sequence, query, key);
    rest_.template fetch<Keys, kCount, kQueryExists, kKeysExist>(fetched.rest, sequence, query, key);
  }
  template <class AnyFetched>
  static __device__ __forceinline__ bool shows(const AnyFetched& fetched) {
    return First::shows(fetched.first) && ScoreFeatures<Rest...>::shows(fetched.rest);
  }
  template <class Sequence>
  __device__ __forceinline__ bool shows_key(const Sequence& sequence, int key) const {
    return first_.shows_key(sequence, key) && rest_.shows_key(sequence, key);
  }
  template <class AnyFetched, class Sequence>
  __device__ __forceinline__ float bias(float score, const AnyFetched& fetched, int element, const Sequence& sequence,
                                        int query, int key) const {
    return rest_.bias(first_.bias(score, fetched.first, element, sequence, query, key), fetched.rest, element, sequence,
                      query, key);
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

// What a lane fetches of a tile whose rows are queries.
template <int kMTiles, int kNTiles, class Features, class Columns>
using FetchedTile =
    typename Features::template Fetched<2 * kNTiles, Columns::Keys::kAtOnce>[Features::kIsOneRow ? 1 : 2 * kMTiles];

// What a score is multiplied by to become an exponent, in base 2.
template <class Features>
__device__ __forceinline__ float exponent_scale(const AttentionParams& params) {
  return Features::kScales ? kLog2E : params.softmax_scale_log2;
}

// Here and below, `query` and `key` are the lane's first row and column. `kIsWhole`: all keys of the tile exist.
template <bool kIsWhole, class Columns, int kMTiles, int kNTiles, class Features, class Sequence>
__device__ __forceinline__ void fetch_tile(FetchedTile<kMTiles, kNTiles, Features, Columns>& fetched,
                                           const Features& features, const Sequence& sequence, int query, int key) {
  if constexpr (Features::kReadsPairs)
#pragma unroll
    for (int r = 0; r < (Features::kIsOneRow ? 1 : 2 * kMTiles); ++r)
      features.template fetch<typename Columns::Keys, 2 * kNTiles, false, kIsWhole>(fetched[r], sequence, query + 8 * r,
                                                                                    key);
}

// Forward: products become scores, biases and all; or zeros what products start from.
template <class Columns, int kMTiles, int kNTiles, class Features, class Sequence>
__device__ __forceinline__ void to_scores(Accumulator<kMTiles, kNTiles>& acc, const Features& features,
                                          const FetchedTile<kMTiles, kNTiles, Features, Columns>& fetched,
                                          const Sequence& sequence, int query, int key) {
#pragma unroll
  for (int m = 0; m < kMTiles; ++m)
#pragma unroll
    for (int n = 0; n < kNTiles; ++n)
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int of_query = query + 16 * m + c / 2 * 8, of_key = key + Columns::kStep * n + c % 2;
        acc[m][n][c] =
            features.bias(features.score(acc[m][n][c], of_query, of_key),
                          fetched[Features::kIsOneRow ? 0 : 2 * m + c / 2], 2 * n + c % 2, sequence, of_query, of_key);
      }
}
