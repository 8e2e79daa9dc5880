// Where the memory work of a main loop's iteration stands among the kProducts tensor instructions of what it
// accumulates (forward: O, backward: the gradients). ptxas keeps to barriers and volatile loads and moves nearly all
// else, so these points decide how it schedules the whole loop, unrolled, where a product's number is a constant.
#pragma once

template <class Traits, int kProducts>
struct Schedule {
  // The product that ends the first `eighths` eighths, counted from 0 and rounded up to a whole one; of none, the
  // first.
  static __device__ __forceinline__ constexpr int end_of(int eighths) {
    return eighths > 0 ? (kProducts * eighths + 7) / 8 - 1 : 0;
  }

  // After which product the next tiles are prefetched, are committed before the barrier, and (forward) the first
  // fragments of K are read for the next iteration.
  static constexpr int kPrefetch = end_of(Traits::kLoadEighth);
  static constexpr int kCommit = end_of(Traits::kBarrierEighth);
  static constexpr int kFirstKeys = end_of(Traits::kFirstKeysEighth);
};

// Is the barrier the last thing in an iteration?
template <class Traits>
constexpr bool kCommitsLast = Traits::kBarrierEighth == 8;
