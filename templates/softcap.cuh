// Softcap: a score is softcap x tanh(softmax_scale q k / softcap). Kernels keep the tanh alone; softmax_scale_log2
// carries the cap.
#pragma once

#include "attention_params.cuh"
#include "primitives.cuh"
#include "score_feature.cuh"
#include "transcendental.cuh"

class Softcap : public ScoreFeature {
 public:
  static constexpr bool kIsNonlinear = true;

  template <class Params, class Sequence>
  __device__ __forceinline__ void prepare(const Params& params, const Sequence&, int, float) {
    product_scale_ = params.softcap.product_scale;
  }

  __device__ __forceinline__ float score(float product, int /*query*/, int /*key*/) const {
    return tanh_of(product * product_scale_);
  }
  __device__ __forceinline__ float score(float product, int query, int key, float& /*derivative*/) const {
    return score(product, query, key);
  }

  // Masked scores are -inf, for which no tanh stands.
  __device__ __forceinline__ float gradient(float dscore, float score) const {
    return dscore * max_ignoring_nan(fma_rounded(-score, score, 1.0f), 0.0f);
  }

 private:
  float product_scale_;
};
