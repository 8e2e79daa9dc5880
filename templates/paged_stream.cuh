// Tiles of keys that lie in pages: RegisterStagedStream (tile_copy.cuh), which looks every row's page up.
#pragma once

#include "key_rows.cuh"
#include "primitives.cuh"
#include "tile_copy.cuh"

template <class Traits, int kRows, int kDims, int kThreads>
class PagedStream {
  static constexpr int kChunksPerRow = kDims / kChunkDims;
  static constexpr int kChunks = kRows * kChunksPerRow;
  using Matrix = PagedMatrix<typename Traits::Stored>;

 public:
  static constexpr int kPasses = (kChunks + kThreads - 1) / kThreads;
  using InFlight = Vec16[kPasses];

  PagedStream() = default;
  __device__ __forceinline__ explicit PagedStream(const Matrix& matrix) : matrix_(matrix), first_row_(0) {}

  __device__ __forceinline__ void go_to(int tile) { first_row_ += tile * kRows; }
  __device__ __forceinline__ void advance() { first_row_ -= kRows; }

  __device__ __forceinline__ void prefetch(InFlight& chunks, SharedAddress slot) const {
    prefetch_bounded(chunks, slot, kRows);
  }

  __device__ __forceinline__ void prefetch_bounded(InFlight& chunks, SharedAddress /*slot*/, int rows) const {
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      chunks[pass] = Vec16{};
      if (!participates(pass) || chunk_row(pass) >= rows) continue;
      const int dim = chunk_dim(pass);
      load_chunk<Traits>(chunks[pass], matrix_.row_at(first_row_ + chunk_row(pass)) + dim, dim, 1);
    }
  }

  template <class Order>
  static __device__ __forceinline__ void commit(const InFlight& chunks, SharedAddress slot) {
    RegisterStagedStream<Traits, kRows, kDims, kThreads>::template commit<Order>(chunks, slot);
  }

 private:
  static __device__ __forceinline__ int chunk(int pass) { return thread_in_block() + pass * kThreads; }
  static __device__ __forceinline__ int chunk_row(int pass) { return chunk(pass) / kChunksPerRow; }
  static __device__ __forceinline__ int chunk_dim(int pass) { return chunk(pass) % kChunksPerRow * kChunkDims; }
  static __device__ __forceinline__ bool participates(int pass) {
    return kChunks % kThreads == 0 || chunk(pass) < kChunks;
  }

  Matrix matrix_;
  int first_row_;  // of the tile
};

struct PagedCopy {
  template <class Traits, int kRows, int kDims, int kThreads>
  using Stream = PagedStream<Traits, kRows, kDims, kThreads>;
};
