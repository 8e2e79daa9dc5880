// ALiBi: a score is lowered by the head's slope times the key's distance from the query's place on the diagonal, on
// either side of it.
#pragma once

#include "attention_params.cuh"
#include "primitives.cuh"
#include "score_feature.cuh"

class Alibi : public ScoreFeature {
 public:
  template <class Params, class Sequence>
  __device__ __forceinline__ void prepare(const Params& params, const Sequence& sequence, int head, float unit) {
    const AlibiParams& alibi = params.alibi;
    slope_ = -load_global_f32(alibi.slopes + sequence.batch() * alibi.batch_stride + head) * kLog2E * unit;
  }

  template <class AnyFetched, class Sequence>
  __device__ __forceinline__ float bias(float score, const AnyFetched&, int /*element*/, const Sequence& sequence,
                                        int query, int key) const {
    const int distance = query + sequence.diagonal() - key;
    return fma_rounded(slope_, static_cast<float>(distance < 0 ? -distance : distance), score);
  }

 private:
  float slope_;  // of what is added, minus the caller's
};
