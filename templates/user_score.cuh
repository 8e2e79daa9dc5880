// The score feature of a user's score_mod: s = score_mod(softmax_scale q k^T), in natural units, so that
// softmax_scale_log2 is log2(e). Its derivative, where it is not 1, is made beside the score and kept until the gradient
// of that score is known.
#pragma once

#include "attention_params.cuh"
#include "primitives.cuh"
#include "score_feature.cuh"
#include "user_functions.cuh"

class UserScoreFeature : public ScoreFeature {
 public:
  static constexpr bool kIsNonlinear = true;
  static constexpr bool kMayHideRows = true;  // a score of -inf hides, too
  static constexpr bool kIsLarge = true;
  static constexpr bool kHasDerivative = UserScore::kHasDerivative;

  template <class Params, class Sequence>
  __device__ __forceinline__ void prepare(const Params& params, const Sequence& sequence, int head, float /*unit*/) {
    user_ = &params.user;
    batch_ = sequence.batch();
    head_ = head;
    product_scale_ = user_->product_scale;
    score_.prepare(user_->tensors, batch_, head);
  }

  __device__ __forceinline__ float score(float product, int query, int key) const {
    if constexpr (UserScore::kIsAdditive)
      return fma_rounded(product, product_scale_, score_.addend(user_->tensors, batch_, head_, query, key));
    else
      return score_.score(user_->tensors, product * product_scale_, batch_, head_, query, key);
  }
  __device__ __forceinline__ float score(float product, int query, int key, float& derivative) const {
    if constexpr (kHasDerivative)
      return score_.score(user_->tensors, product * product_scale_, batch_, head_, query, key, derivative);
    else
      return score(product, query, key);
  }

 private:
  const UserParams* user_;
  int batch_, head_;
  float product_scale_;
  UserScore score_;
};
