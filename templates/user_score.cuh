// The score feature of a user's score_mod: s = score_mod(softmax_scale q k^T). Its derivative, where it is not 1, is
// made beside the score and kept until the gradient of that score is known.
//
// What only adds to a score is a bias; of what does more the score is scaled first.
#pragma once

#include "attention_params.cuh"
#include "primitives.cuh"
#include "score_feature.cuh"

template <class Score>
class UserScoreFeature : public ScoreFeature {
 public:
  static constexpr bool kIsNonlinear = !Score::kIsAdditive;
  static constexpr bool kMayHideRows = true;  // a score of -inf hides, too
  static constexpr bool kIsLarge = Score::kIsLarge;
  static constexpr bool kScales = !Score::kIsAdditive;
  static constexpr bool kHasDerivative = Score::kHasDerivative;

  template <class Params, class Sequence>
  __device__ __forceinline__ void prepare(const Params& params, const Sequence& sequence, int head, float unit) {
    user_ = &params.user;
    batch_ = sequence.batch();
    head_ = head;
    unit_ = unit * kLog2E;
    score_.prepare(user_->tensors, batch_, head_, unit_);
  }

  __device__ __forceinline__ float score(float product, int query, int key) const {
    if constexpr (Score::kIsAdditive) return product;
    return bounded(score_.score(user_->tensors, product * user_->product_scale, batch_, head_, query, key));
  }
  __device__ __forceinline__ float score(float product, int query, int key, float& derivative) const {
    if constexpr (kHasDerivative)
      return bounded(
          score_.score(user_->tensors, product * user_->product_scale, batch_, head_, query, key, derivative));
    else
      return score(product, query, key);
  }
  template <class AnyFetched, class Sequence>
  __device__ __forceinline__ float bias(float score, const AnyFetched&, int /*element*/, const Sequence&, int query,
                                        int key) const {
    if constexpr (Score::kIsAdditive && kIsLarge)
      return fma_rounded(bounded(score_.addend(user_->tensors, batch_, head_, query, key)), unit_, score);
    else if constexpr (Score::kIsAdditive)
      return score_.scaled_sum(user_->tensors, score, batch_, head_, query, key);
    else
      return score;
  }

 private:
  static __device__ __forceinline__ float bounded(float s) {
    if constexpr (kIsLarge) return bounded_bias(s);
    return s;
  }

  const UserParams* user_;
  int batch_, head_;
  float unit_;  // of what is added
  Score score_;
};
