// A user's functions of scores and pairs. The generator puts what was traced in the place of this file, which is that
// of a call without any, and says what is asked of it.
#pragma once

#include "attention_params.cuh"
#include "primitives.cuh"

// score_mod: b, h, q and k are the places of a pair in its batch, query heads and sequences, some of which may lie
// beyond the last.
struct UserScore {
  static constexpr bool kIsAdditive = true;      // it adds to the score something that the score has no part in
  static constexpr bool kIsLarge = false;        // what it makes may be so large that a product's own digits are gone
  static constexpr bool kHasDerivative = false;  // its derivative is not 1 everywhere

  // What depends on the batch and the head alone, once for a block. A score of 1 is `unit` of scaled_sum()'s.
  __device__ __forceinline__ void prepare(const UserTensors&, int /*b*/, int /*h*/, float /*unit*/) {}

  // What only adds: that alone, and its sum with a score in units.
  __device__ __forceinline__ float addend(const UserTensors&, int /*b*/, int /*h*/, int /*q*/, int /*k*/) const {
    return 0.0f;
  }
  __device__ __forceinline__ float scaled_sum(const UserTensors&, float score, int /*b*/, int /*h*/, int /*q*/,
                                              int /*k*/) const {
    return score;
  }
  // What does more.
  __device__ __forceinline__ float score(const UserTensors&, float score, int /*b*/, int /*h*/, int /*q*/,
                                         int /*k*/) const {
    return score;
  }
  __device__ __forceinline__ float score(const UserTensors&, float score, int /*b*/, int /*h*/, int /*q*/, int /*k*/,
                                         float& derivative) const {
    derivative = 1.0f;
    return score;
  }
};

// mask_mod, likewise.
struct UserMask {
  static constexpr bool kIsTrivial = true;  // it hides nothing

  __device__ __forceinline__ void prepare(const UserTensors&, int /*b*/, int /*h*/) {}
  __device__ __forceinline__ bool shows(const UserTensors&, int /*b*/, int /*h*/, int /*q*/, int /*k*/) const {
    return true;
  }
};
