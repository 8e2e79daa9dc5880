// A block mask: lists of the blocks of pairs that a block of rows sees, and the function that says which pairs of those
// that it sees in part. A kernel's rows lie in one block of the mask's, and the mask's columns are whole tiles.
//
// Tiles are gone over from the last position to the first, as without a mask, where position n is tile n. Here those of
// the blocks that are seen whole stand first:
//
//   position   0 ...              ... whole() ...               ... count()
//              | tiles of whole blocks  | tiles of blocks seen in part |
#pragma once

#include "accumulator.cuh"
#include "attention_params.cuh"
#include "primitives.cuh"
#include "user_functions.cuh"

template <int kTile>
class ListedTiles {
 public:
  ListedTiles() = default;

  // Of the rows from `row` on; stands at the last position, if there is one.
  template <class Sequence>
  __device__ __forceinline__ ListedTiles(const BlockMaskParams& mask, const Sequence& sequence, int head, int row)
      : of_block_(mask.column_block / kTile), last_block_(mask.column_blocks - 1) {
    const long long rows = sequence.batch() * mask.batch_stride + head * mask.head_stride + row / mask.row_block;
    partial_ = mask.partial.columns + rows * mask.partial.room;
    int partial = least(load_global_i32(mask.partial.counts + rows), mask.partial.room);
    if (mask.whole.counts != nullptr) {
      whole_ = mask.whole.columns + rows * mask.whole.room;
      whole_blocks_ = least(load_global_i32(mask.whole.counts + rows), mask.whole.room);
    }
    whole_blocks_ = whole_blocks_ < 0 ? 0 : whole_blocks_;
    blocks_ = whole_blocks_ + (partial < 0 ? 0 : partial);
    if (blocks_ == 0) return;
    block_ = blocks_;
    upcoming_ = first_tile(blocks_ - 1);
    enter_block();
    current_ = next_;
    find_next();
  }

  __device__ __forceinline__ int count() const { return blocks_ * of_block_; }
  __device__ __forceinline__ int whole() const { return whole_blocks_ * of_block_; }

  // The tiles of the position gone over, and of those behind and before it. Beyond the ends they are those at the ends.
  __device__ __forceinline__ int previous() const { return previous_; }
  __device__ __forceinline__ int current() const { return current_; }
  __device__ __forceinline__ int next() const { return next_; }

  // To the position before.
  __device__ __forceinline__ void step() {
    previous_ = current_;
    current_ = next_;
    find_next();
  }

 private:
  static __device__ __forceinline__ int least(int a, int b) { return a < b ? a : b; }

  // Of a block of either list, the first of its tiles. Whatever the lists say, none lies outside of the tensors.
  __device__ __forceinline__ int first_tile(int block) const {
    const int* const at = block < whole_blocks_ ? whole_ + block : partial_ + (block - whole_blocks_);
    const int column = load_global_i32(at);
    return (column < 0 ? 0 : least(column, last_block_)) * of_block_;
  }

  // The one before this block: where it lies is known, and for the one before that it is asked.
  __device__ __forceinline__ void enter_block() {
    --block_;
    next_ = upcoming_ + of_block_ - 1;
    before_ = of_block_ - 1;
    if (block_ > 0) upcoming_ = first_tile(block_ - 1);
  }

  __device__ __forceinline__ void find_next() {
    if (before_ > 0) {
      --before_;
      --next_;
    } else if (block_ > 0) {
      enter_block();
    }
  }

  const int* partial_;
  const int* whole_;
  int whole_blocks_ = 0, blocks_ = 0;
  int of_block_;  // tiles
  int last_block_;
  int block_, before_;  // of next_: its block's place in the lists, and the block's tiles before it
  int upcoming_;        // the first tile of the block before that one
  int previous_ = 0, current_ = 0, next_ = 0;
};

// A mask_mod with what it is asked about.
class PairMask {
 public:
  template <class Params, class Sequence>
  __device__ __forceinline__ void prepare(const Params& params, const Sequence& sequence, int head) {
    tensors_ = &params.user.tensors;
    batch_ = sequence.batch();
    head_ = head;
    mask_.prepare(*tensors_, batch_, head);
  }
  __device__ __forceinline__ bool shows(int query, int key) const {
    return mask_.shows(*tensors_, batch_, head_, query, key);
  }

 private:
  const UserTensors* tensors_;
  int batch_, head_;
  UserMask mask_;
};

// Scores of pairs that it hides become -inf. `query` and `key` are the lane's first row and column.
template <class Columns, int kMTiles, int kNTiles>
__device__ __forceinline__ void apply_mask(Accumulator<kMTiles, kNTiles>& acc_s, const PairMask& mask, int query,
                                           int key) {
#pragma unroll
  for (int m = 0; m < kMTiles; ++m)
#pragma unroll
    for (int n = 0; n < kNTiles; ++n)
#pragma unroll
      for (int c = 0; c < 4; ++c)
        if (!mask.shows(query + 16 * m + c / 2 * 8, key + Columns::kStep * n + c % 2)) acc_s[m][n][c] = -infinity();
}
