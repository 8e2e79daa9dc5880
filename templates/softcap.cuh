// Softcap: a score is softcap x tanh(softmax_scale q k / softcap). Kernels keep the tanh alone; softmax_scale_log2
// carries the cap.
#pragma once

#include "attention_params.cuh"
#include "primitives.cuh"
#include "score_feature.cuh"

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
  // tanh, to about 2^-21 of its value, where the hardware's own approximation is off by up to 2^-11: near 0 the first
  // terms of its series, which the exponential would cancel.
  static __device__ __forceinline__ float tanh_of(float x) {
    const float square = x * x;
    float series = fma_rounded(square, -17.0f / 315, 2.0f / 15);
    series = fma_rounded(square, series, -1.0f / 3);
    series = fma_rounded(square * x, series, x);
    const float by_exponential = fma_rounded(-2.0f, reciprocal(1.0f + exp2_approx(x * (2 * kLog2E))), 1.0f);
    return square < 0.04f ? series : by_exponential;
  }

  float product_scale_;
};
