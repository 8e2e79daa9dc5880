// Dropout: which probabilities a warp keeps of its tile, a bit for every pair of a query and a key. A bit is made of
// the seed and of the pair's place in the problem alone, so that every kernel on every tile finds the same.
//
// A cell is what 32 bits are made for at once: two queries, 8 apart, by 16 keys.
//
//     16 queries by 16 keys                      the word of cell i
//   +-----------------------+            bit  31            16 15             0
//   | query i      cell i   | i < 8          +----------------+----------------+
//   | query i + 8  cell i   |                | query i + 8:   | query i:       |
//   +-----------------------+                | keys 15 ... 0  | keys 15 ... 0  |
//                                            +----------------+----------------+
//
// A warp makes the words of its tile together, one a lane, and lanes ask each other for those that they need. Where a
// tile has fewer cells than there are lanes, 2 or 4 lanes share the work on one.
#pragma once

#include "attention_params.cuh"
#include "primitives.cuh"

// Philox4x32 of 7 rounds: J. K. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011, where 7 is the
// fewest that pass BigCrush. The multipliers and the steps of the key are theirs.
struct Philox {
  static constexpr int kRounds = 7;

  unsigned key[2];

  // Puts a counter's 128 random bits in its place.
  __device__ __forceinline__ void randomize(unsigned (&counter)[4]) const {
#pragma unroll
    for (unsigned round = 0; round < kRounds; ++round) {
      const unsigned long long a = 0xd2511f53ull * counter[0], b = 0xcd9e8d57ull * counter[2];
      counter[0] = static_cast<unsigned>(b >> 32) ^ counter[1] ^ (key[0] + round * 0x9e3779b9u);
      counter[1] = static_cast<unsigned>(b);
      counter[2] = static_cast<unsigned>(a >> 32) ^ counter[3] ^ (key[1] + round * 0xbb67ae85u);
      counter[3] = static_cast<unsigned>(a);
    }
  }
};

// 32 bits, each 1 as often as a number below 1 says, whose binary digits come in one by one with a random word each,
// the last digit first: a digit of 1 makes "or" of its word and of what came before, one of 0 "and". Before the first
// digit stands 0. Lanes that share a cell have some of the digits each, and so keep what those make of a 1 as well.
struct KeptBits {
  unsigned of_0 = 0u, of_1 = ~0u;

  // `digit` is all ones or all zeros: each bit becomes what two of three say.
  __device__ __forceinline__ void add(unsigned random, unsigned digit) {
    of_0 = (of_0 & random) | (of_0 & digit) | (random & digit);
    of_1 = (of_1 & random) | (of_1 & digit) | (random & digit);
  }
  // What the digits before these make.
  __device__ __forceinline__ void follow(const KeptBits& before) {
    const unsigned later_of_0 = of_0, later_of_1 = of_1;
    of_0 = (before.of_0 & later_of_1) | later_of_0;
    of_1 = (before.of_1 & later_of_1) | later_of_0;
  }
};

// Of a warp's tile of kMTiles x 16 rows by kNTiles x 8 columns, one of the two being queries. kNeighbours: a lane's
// keys are neighbours (see lane_order.cuh).
template <bool kColumnsAreQueries, int kMTiles, int kNTiles, bool kNeighbours>
class DropoutTile {
  static constexpr bool kNeighbourColumns = kNeighbours && !kColumnsAreQueries;
  static constexpr bool kNeighbourRows = kNeighbours && kColumnsAreQueries;
  static_assert(!kNeighbourColumns || (kNTiles & (kNTiles - 1)) == 0,
                "neighbours fill cells, or cells fill neighbours");

  // A slot is 8 cells: a tile of rows by a group of 16 columns.
  static constexpr int kGroups = (kNTiles + 1) / 2;
  static constexpr bool kIsHalved = kNTiles % 2 == 1;  // every other tile begins in the middle of a group
  static constexpr int kCells = 8 * kMTiles * kGroups;
  static constexpr int kWords = (kCells + 31) / 32;  // of a lane
  static constexpr int kLanesOfCell = kCells <= 8 ? 4 : kCells <= 16 ? 2 : 1;
  static constexpr int kLanes = kLanesOfCell > 1 ? kCells : 32;  // as many have different cells
  static constexpr int kFirstLane = 32 - kLanes;                 // of those that have all digits of theirs
  static constexpr int kCalls = kDropoutDigits / 4 / kLanesOfCell;

  static constexpr int kRowWords = kNeighbourRows ? 1 : kMTiles,
                       kColumnWords = kColumnsAreQueries ? 2 : 1;  // of a group

  // A lane's columns are in all groups, or where they are neighbours in kOwnGroups of its own.
  static constexpr int kOwnGroups = kNTiles < 8 ? 1 : kNTiles / 8;

 public:
  static constexpr int kLaneGroups = kNeighbourColumns ? kOwnGroups : kGroups;

  // What a lane keeps of a group of its columns.
  struct Kept {
    unsigned word[kColumnWords][kRowWords];
  };

  __device__ __forceinline__ void prepare(const DropoutParams& params, int batch_head) {
    params_ = &params;
    batch_head_ = static_cast<unsigned>(batch_head);
    for (int i = 0; i < 2; ++i) philox_.key[i] = static_cast<unsigned>(load_global_i32(params.seed + i));
  }

  // The words of the tile that begins at a row, a multiple of 16, and at a column, a multiple of 8.
  __device__ __forceinline__ void make(int first_row, int first_column, int lane) {
    begins_in_middle_ = first_column % 16 != 0;
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      const int slot = 4 * w + lane % kLanes / 8;
      const int rows = first_row / 16 + (kColumnsAreQueries ? slot % kMTiles : slot / kGroups);
      const int columns = first_column / 16 + group_of_slot(slot);
      words_[w] = word(8 * (kColumnsAreQueries ? columns : rows) + lane % 8, kColumnsAreQueries ? rows : columns, lane);
    }
  }

  // Group g of kLaneGroups.
  __device__ __forceinline__ Kept get(int g, int lane) const {
    Kept kept;
#pragma unroll
    for (int c = 0; c < kColumnWords; ++c)
#pragma unroll
      for (int m = 0; m < kRowWords; ++m) {
        const int i = kColumnsAreQueries ? lane % 4 * 2 + c : lane / 4;
        unsigned all = ask(m, g, i, lane);
        if constexpr (kIsHalved) all = behind_middle(all, ask(m, g + 1 < kGroups ? g + 1 : g, i, lane));
        kept.word[c][m] = all >> first_key(lane) % 16;
      }
    return kept;
  }

  // Column tile n is in this group, and whether it is the group's first.
  static __device__ __forceinline__ constexpr int group(int n) { return kNeighbourColumns ? n / 8 : n / 2; }
  static __device__ __forceinline__ constexpr bool begins_group(int n) { return n == 0 || group(n) != group(n - 1); }

  // Of the lane's row r and of its column c of column tile n, whose group `kept` is.
  static __device__ __forceinline__ bool keeps(const Kept& kept, int r, int n, int c) {
    const int key = kNeighbourRows       ? r
                    : kColumnsAreQueries ? r % 2 * 8
                    : kNeighbourColumns  ? n % 8 * 2 + c
                                         : n % 2 * 8 + c;
    const int half = kColumnsAreQueries ? n % 2 : r % 2;
    const unsigned word = kept.word[kColumnsAreQueries ? c : 0][kNeighbourRows ? 0 : r / 2];
    return (word & 1u << (16 * half + key)) != 0;
  }

 private:
  // ---- slots: in an order in which that of a lane lies in a word known when this is compiled ----

  static __device__ __forceinline__ int group_of_slot(int slot) {
    if constexpr (kColumnsAreQueries) return slot / kMTiles;
    const int x = slot % kGroups;
    return kNeighbourColumns && kGroups >= 4 ? x % 4 * kOwnGroups + x / 4 : x;
  }

  // The first of the lane's neighbouring keys, or its own key of 16.
  static __device__ __forceinline__ int first_key(int lane) {
    if (kNeighbourRows) return lane / 4 * 2 * kMTiles;
    if (kNeighbourColumns) return lane % 4 * 2 * kNTiles;
    return kColumnsAreQueries ? lane / 4 : lane % 4 * 2;
  }

  // The word of cell i of the lane's row tile m and group g.
  __device__ __forceinline__ unsigned ask(int m, int g, int i, int lane) const {
    const int of_lane = kNeighbourRows || (kNeighbourColumns && kGroups < 4) ? first_key(lane) / 16
                        : kNeighbourColumns                                  ? lane % 4
                                                                             : 0;
    const int slot = kNeighbourRows       ? g * kMTiles
                     : kColumnsAreQueries ? g * kMTiles + m
                                          : m * kGroups + (kNeighbourColumns ? 4 * g : g);
    return shuffle(words_[slot / 4], kFirstLane + 8 * (slot % 4 + of_lane) + i);
  }

  // 16 columns that begin in the middle of one group and end in that of the next.
  __device__ __forceinline__ unsigned behind_middle(unsigned group, unsigned next) const {
    return select_bytes(group, next, !begins_in_middle_ ? 0x3210 : kColumnsAreQueries ? 0x5432 : 0x6341);
  }

  // ---- a word ----

  // Of the lanes that share it, those of share 0 have the last digits. Those of the last share get it.
  __device__ __forceinline__ unsigned word(int query_cell, int key_group, int lane) const {
    const int share = lane / kLanes;
    KeptBits bits;
#pragma unroll
    for (int call = 0; call < kCalls; ++call) {
      unsigned random[4] = {static_cast<unsigned>(key_group), static_cast<unsigned>(query_cell), batch_head_,
                            static_cast<unsigned>(share * kCalls + call)};
      philox_.randomize(random);
#pragma unroll
      for (int i = 0; i < 4; ++i) bits.add(random[i], params_->digits[4 * (share * kCalls + call) + i]);
    }
#pragma unroll
    for (int distance = kLanes; distance < 32; distance *= 2)
      bits.follow({shuffle(bits.of_0, lane ^ distance), shuffle(bits.of_1, lane ^ distance)});
    return bits.of_0;
  }

  Philox philox_;
  const DropoutParams* params_;
  unsigned batch_head_;
  bool begins_in_middle_;
  unsigned words_[kWords];
};

// Where there is none.
struct NoDropout {
  static constexpr int kLaneGroups = 1;
  struct Kept {};
  static __device__ __forceinline__ constexpr int group(int) { return 0; }
  static __device__ __forceinline__ constexpr bool keeps(const Kept&, int, int, int) { return true; }
};

template <bool kIsOn, class Tile>
struct DropoutOrNone {
  using Type = Tile;
};
template <class Tile>
struct DropoutOrNone<false, Tile> {
  using Type = NoDropout;
};
template <class Traits, bool kColumnsAreQueries, int kMTiles, int kNTiles, bool kNeighbours>
using DropoutOf =
    typename DropoutOrNone<Traits::kHasDropout, DropoutTile<kColumnsAreQueries, kMTiles, kNTiles, kNeighbours>>::Type;
