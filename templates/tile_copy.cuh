// Copies between global and shared memory, in chunks of 16 bytes (8 head dims).
//
// A tile in shared memory is row-major with 16 bytes of padding a row, so that a row is an odd number of chunks long
// and the 8 rows that one ldmatrix phase reads lie in 8 different groups of 4 banks, whatever the head dim:
//
//   row 0   | c0 | c1 | ... | c7 | pad |
//   row 1   | c0 | c1 | ... | c7 | pad |      chunk (r, c) starts at 16 (r (kDims/8 + 1) + c)
#pragma once

#include "primitives.cuh"

constexpr int kChunkDims = 8;
constexpr int kChunkBytes = 16;

// Bytes from a row to the next of a tile with `dims` head dims.
constexpr int row_pitch(int dims) { return dims * 2 + kChunkBytes; }

// One chunk of a global row: dims [dim, dim + 8) at `row`; what lies beyond kHeadDim reads as zero.
template <class Traits>
__device__ __forceinline__ void load_chunk(Vec16& chunk, const unsigned short* row, int dim) {
  if (Traits::kVectorAccess) {
    if (Traits::kHeadDim % 16 == 0 || dim < Traits::kHeadDim)
      load_global_16B(chunk, row + dim);
    else
      chunk = Vec16{};
  } else {
#pragma unroll
    for (int i = 0; i < kChunkDims / 2; ++i) {
      const int d = dim + 2 * i;
      const unsigned lo = d < Traits::kHeadDim ? load_global_2B(row + d) : 0u;
      const unsigned hi = d + 1 < Traits::kHeadDim ? load_global_2B(row + d + 1) : 0u;
      chunk.word[i] = lo | hi << 16;
    }
  }
}

template <class Traits>
__device__ __forceinline__ void store_chunk(unsigned short* row, int dim, const Vec16& chunk) {
  if (Traits::kVectorAccess) {
    if (Traits::kHeadDim % 16 == 0 || dim < Traits::kHeadDim) store_global_16B(row + dim, chunk);
  } else {
#pragma unroll
    for (int i = 0; i < kChunkDims / 2; ++i) {
      const int d = dim + 2 * i;
      if (d < Traits::kHeadDim) store_global_2B(row + d, chunk.word[i]);
      if (d + 1 < Traits::kHeadDim) store_global_2B(row + d + 1, chunk.word[i] >> 16);
    }
  }
}

// Moves the tiles of K or V, kRows x kDims, from global to shared memory, last tile first. A tile is loaded into
// registers early and stored late, because sm_75 has no cp.async. Every thread moves kPasses chunks of a tile.
template <class Traits, int kRows, int kDims, int kThreads>
class TileStream {
 public:
  // `base` is row 0 of the sequence; the first load() reads tile `n_block`.
  __device__ __forceinline__ TileStream(const unsigned short* base, long long row_stride, int n_block)
      : tile_(base + n_block * kRows * row_stride), row_stride_(row_stride), n_block_(n_block) {}

  // Loads the next tile; rows from `seqlen` on read as zero. After tile 0 it loads tile 0 again, which nobody uses:
  // that costs less than a branch in the main loop.
  template <bool kBounded>
  __device__ __forceinline__ void load(int seqlen) {
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const int row = chunk_row(pass);
      if (!participates(pass)) continue;
      if (!kBounded || n_block_ * kRows + row < seqlen)
        load_chunk<Traits>(chunks_[pass], tile_ + row * row_stride_, chunk_dim(pass));
      else
        chunks_[pass] = Vec16{};
    }
    if (n_block_ > 0) {
      --n_block_;
      tile_ -= kRows * row_stride_;
    }
  }

  // Stores the tile that load() brought at `tile` in shared memory.
  __device__ __forceinline__ void store(SharedAddress tile) const {
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass)
      if (participates(pass))
        store_shared_16B(tile + chunk_row(pass) * row_pitch(kDims) + chunk_dim(pass) * 2, chunks_[pass]);
  }

 private:
  static constexpr int kChunksPerRow = kDims / kChunkDims;
  static constexpr int kChunks = kRows * kChunksPerRow;
  static constexpr int kPasses = (kChunks + kThreads - 1) / kThreads;

  static __device__ __forceinline__ int chunk(int pass) { return thread_in_block() + pass * kThreads; }
  static __device__ __forceinline__ int chunk_row(int pass) { return chunk(pass) / kChunksPerRow; }
  static __device__ __forceinline__ int chunk_dim(int pass) { return chunk(pass) % kChunksPerRow * kChunkDims; }
  static __device__ __forceinline__ bool participates(int pass) {
    return kChunks % kThreads == 0 || chunk(pass) < kChunks;
  }

  const unsigned short* tile_;
  long long row_stride_;
  int n_block_;
  Vec16 chunks_[kPasses];
};

// One warp copies kRows rows x kDims dims, starting at dim `dim`, from global to its own part of shared memory.
// Rows from `rows` on read as zero. `sign` flips the signs of the fp16 pairs.
template <class Traits, int kRows, int kDims>
__device__ __forceinline__ void load_warp_rows(SharedAddress tile, const unsigned short* base, long long row_stride,
                                               int rows, int dim, int lane, unsigned sign) {
  constexpr int kChunksPerRow = kDims / kChunkDims;
  constexpr int kPasses = kRows * kChunksPerRow / 32;
  static_assert(kRows * kChunksPerRow % 32 == 0, "a warp copies whole passes of 32 chunks");
  Vec16 chunks[kPasses];
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    const int row = (lane + pass * 32) / kChunksPerRow;
    const int chunk_dim = (lane + pass * 32) % kChunksPerRow * kChunkDims;
    chunks[pass] = Vec16{};
    if (row < rows) load_chunk<Traits>(chunks[pass], base + row * row_stride, dim + chunk_dim);
  }
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    const int row = (lane + pass * 32) / kChunksPerRow;
    const int chunk_dim = (lane + pass * 32) % kChunksPerRow * kChunkDims;
#pragma unroll
    for (int i = 0; i < 4; ++i) chunks[pass].word[i] ^= sign;
    store_shared_16B(tile + row * row_pitch(kDims) + chunk_dim * 2, chunks[pass]);
  }
}

// The way back: one warp writes kRows x kDims from its part of shared memory to dims [dim, dim + kDims) of `rows` rows.
template <class Traits, int kRows, int kDims>
__device__ __forceinline__ void store_warp_rows(unsigned short* base, long long row_stride, int rows, int dim,
                                                SharedAddress tile, int lane) {
  constexpr int kChunksPerRow = kDims / kChunkDims;
#pragma unroll
  for (int pass = 0; pass < kRows * kChunksPerRow / 32; ++pass) {
    const int row = (lane + pass * 32) / kChunksPerRow;
    const int chunk_dim = (lane + pass * 32) % kChunksPerRow * kChunkDims;
    if (row >= rows) continue;
    Vec16 chunk;
    load_shared_16B(chunk, tile + row * row_pitch(kDims) + chunk_dim * 2);
    store_chunk<Traits>(base + row * row_stride, dim + chunk_dim, chunk);
  }
}
