// lse and delta of queries, as the kernels of gradients read them: from global memory, one query a thread, and where
// queries are the columns of a tile, from shared memory, two of them a lane.
#pragma once

#include "flash_bwd_params.cuh"
#include "primitives.cuh"

// Of a query, or of none: there P and dS come out as 0.
template <class Variant>
__device__ __forceinline__ void load_statistics(const FlashBwdParams& params, long long offset, bool exists, float& lse,
                                                float& delta) {
  lse = infinity();
  delta = 0.0f;
  if (exists) {
    lse = load_global_f32(params.softmax_lse + offset);
    delta = load_global_f32(params.delta + offset);
    if (Variant::kIsLarge && lse < kLeastLse) lse = infinity();
  }
}

// Of the two queries that an accumulator's pair of scores belongs to.
struct Statistics {
  float lse[2], delta[2];
};

constexpr int kStatisticsBytes = 8;  // of a query in shared memory

// Two queries' numbers lie together, the lse of both first: one 16-byte read fetches what a lane needs.
__device__ __forceinline__ void store_statistics(SharedAddress begin, int query, float lse, float delta) {
  const SharedAddress at = begin + query / 2 * 16 + query % 2 * 4;
  store_shared_f32(at, lse);
  store_shared_f32(at + 8, delta);
}

__device__ __forceinline__ Statistics load_statistics_pair(SharedAddress begin, int pair) {
  Vec16 four;
  load_shared_16B(four, begin + pair * 16);
  return {{float_of_bits(four.word[0]), float_of_bits(four.word[1])},
          {float_of_bits(four.word[2]), float_of_bits(four.word[3])}};
}
