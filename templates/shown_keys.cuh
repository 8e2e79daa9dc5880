// What a mask of keys, the same for all queries, leaves of a block's work: padding on either side of a sequence costs
// next to nothing.
#pragma once

#include "primitives.cuh"
#include "sequence.cuh"

// The tiles of keys without those before the first key that is shown and behind the last one, in steps of as many keys
// as there are threads. Asking waits for memory at either end: not for a few keys.
template <class Traits, class Variant>
__device__ __forceinline__ TileRange shown_tiles(TileRange tiles, const Variant& variant,
                                                 const Sequence<Traits>& sequence) {
  if constexpr (Variant::kHidesKeys) {
    constexpr int kThreads = Traits::kNWarps * 32, kKeys = Traits::kBlockN, kTilesAtOnce = kThreads / kKeys;
    static_assert(kTilesAtOnce > 0, "a thread asks for a key");
    if (tiles.end - tiles.begin <= 2 * kTilesAtOnce) return tiles;
    const auto hides = [&](int tile) {
      const int i = reread_thread_in_block();
      return !any_in_block(i < kTilesAtOnce * kKeys && variant.shows_key(sequence, tile * kKeys + i));
    };
    while (tiles.end - kTilesAtOnce >= tiles.begin && hides(tiles.end - kTilesAtOnce)) tiles.end -= kTilesAtOnce;
    while (tiles.begin + kTilesAtOnce <= tiles.end && hides(tiles.begin)) tiles.begin += kTilesAtOnce;
    tiles.whole_begin = Sequence<Traits>::maximum(tiles.whole_begin, tiles.begin);
    tiles.whole_end = Sequence<Traits>::minimum(tiles.whole_end, tiles.end);
  }
  return tiles;
}
