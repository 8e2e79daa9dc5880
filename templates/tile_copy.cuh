// Copies between global and shared memory, in chunks of 16 bytes (8 head dims).
//
// A tile in shared memory is row-major, a row an odd number of chunks long, so that the 8 rows that one ldmatrix phase
// reads lie in 8 different groups of 4 banks. Where the head dim has an even number, a chunk of padding is behind each:
//
//   row 0   | c0 | c1 | ... | c7 | pad |
//   row 1   | c0 | c1 | ... | c7 | pad |      chunk (r, c) starts at 16 (r (kDims/8 + 1) + c)
#pragma once

#include "lane_order.cuh"
#include "primitives.cuh"
#include "stored.cuh"

constexpr int kChunkDims = 8;
constexpr int kChunkBytes = 16;
constexpr int kElementBytes = kChunkBytes / kChunkDims;

// Bytes from a row to the next of a tile with `dims` head dims.
constexpr int row_pitch(int dims) { return (dims / kChunkDims | 1) * kChunkBytes; }

// One head of a tensor in global memory. Only element-wise loads know of a dim_stride other than 1.
template <class Stored>
struct GlobalMatrix {
  const typename Stored::Bits* base;  // of row 0
  long long row_stride;
  long long dim_stride = 1;
};

// Whether a kernel has dims beyond the caller's: zeros where they are read, nothing where they are written.
template <class Traits>
constexpr bool kHasPaddedDims = Traits::kTileDims != Traits::kHeadDim;

// Traits of what has v's head dim: v, out and their gradients.
template <class Traits>
struct OfValues : Traits {
  static constexpr int kHeadDim = Traits::kHeadDimV, kTileDims = Traits::kTileDimsV;
};

// Of kDims head dims of a row operand, those that registers hold: whole steps of 16, or all.
template <class Traits, int kDims>
constexpr int kRegisterDimsOf = Traits::kRegisterDims < kDims ? Traits::kRegisterDims / 16 * 16 : kDims;

// One chunk of a global row: dims [dim, dim + 8), the first of them at `at`; what lies beyond kHeadDim reads as zero.
template <class Traits>
__device__ __forceinline__ void load_chunk(Vec16& chunk, const typename Traits::Stored::Bits* at, int dim,
                                           long long dim_stride) {
  if constexpr (Traits::kVectorAccess) {
    if (!kHasPaddedDims<Traits> || dim < Traits::kHeadDim)
      load_global_16B(chunk, at);
    else
      chunk = Vec16{};
  } else {
#pragma unroll
    for (int i = 0; i < kChunkDims / 2; ++i) {
      const unsigned lo = dim + 2 * i < Traits::kHeadDim ? load_global_2B(at + 2 * i * dim_stride) : 0u;
      const unsigned hi = dim + 2 * i + 1 < Traits::kHeadDim ? load_global_2B(at + (2 * i + 1) * dim_stride) : 0u;
      chunk.word[i] = lo | hi << 16;
    }
  }
}

template <class Traits>
__device__ __forceinline__ void store_chunk(typename Traits::Stored::Bits* at, int dim, const Vec16& chunk) {
  if constexpr (Traits::kVectorAccess) {
    if (!kHasPaddedDims<Traits> || dim < Traits::kHeadDim) store_global_16B(at, chunk);
  } else {
#pragma unroll
    for (int i = 0; i < kChunkDims / 2; ++i) {
      if (dim + 2 * i < Traits::kHeadDim) store_global_2B(at + 2 * i, chunk.word[i]);
      if (dim + 2 * i + 1 < Traits::kHeadDim) store_global_2B(at + 2 * i + 1, chunk.word[i] >> 16);
    }
  }
}

// 8 dims of a row, each multiplied by `factor`, rounded to what is stored.
template <class Stored>
__device__ __forceinline__ void pack_chunk(Vec16& chunk, const float (&dims)[kChunkDims], float factor) {
#pragma unroll
  for (int i = 0; i < kChunkDims / 2; ++i) chunk.word[i] = Stored::pack(dims[2 * i] * factor, dims[2 * i + 1] * factor);
}

// Bytes between chunks of one tile: 32 bits with vector access, where the launch plan sees to it that a tile spans less
// than 2 GiB, because the main loop is short of registers.
template <bool kVectorAccess>
struct TileOffset {
  using Type = int;
};
template <>
struct TileOffset<false> {
  using Type = long long;
};

// A copy policy's Stream moves the tiles of a matrix, kRows x kDims, from global to shared memory, last tile first:
// prefetch() begins with a tile for a slot, behind products, and commit() ends; a block barrier has to follow. What
// arrives is converted there, and not before, where that would wait for it.
//
// Here a tile waits in registers until commit(), because sm_75 has no cp.async. Every thread moves kPasses chunks of
// it.
template <class Traits, int kRows, int kDims, int kThreads>
class RegisterStagedStream {
  static constexpr int kChunksPerRow = kDims / kChunkDims;
  static constexpr int kChunks = kRows * kChunksPerRow;
  using Bits = typename Traits::Stored::Bits;
  using Matrix = GlobalMatrix<typename Traits::Stored>;

 public:
  static constexpr int kPasses = (kChunks + kThreads - 1) / kThreads;
  using InFlight = Vec16[kPasses];  // what a thread has of a tile between prefetch() and commit()

  RegisterStagedStream() = default;

  // Stands at tile 0 of the matrix.
  __device__ __forceinline__ explicit RegisterStagedStream(const Matrix& matrix)
      : row_stride_(matrix.row_stride), dim_stride_(Traits::kVectorAccess ? 1 : matrix.dim_stride) {
    chunk_0_ = matrix.base + chunk_row(0) * row_stride_ + chunk_dim(0) * dim_stride_;
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass)
      offset_[pass] =
          kElementBytes * (static_cast<Offset>(chunk_row(pass) - chunk_row(0)) * static_cast<Offset>(row_stride_) +
                           (chunk_dim(pass) - chunk_dim(0)) * static_cast<Offset>(dim_stride_));
  }

  // From tile 0.
  __device__ __forceinline__ void go_to(int tile) { chunk_0_ += tile * kRows * row_stride_; }

  // To the tile before.
  __device__ __forceinline__ void advance() { chunk_0_ -= kRows * row_stride_; }

  // The whole tile.
  __device__ __forceinline__ void prefetch(InFlight& chunks, SharedAddress /*slot*/) const {
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass)
      if (participates(pass))
        load_pass(chunks[pass], pass);
      else if constexpr (kConverts<Traits>)
        chunks[pass] = Vec16{};
  }

  // The tile's first `rows` rows; the others are zero.
  __device__ __forceinline__ void prefetch_bounded(InFlight& chunks, SharedAddress /*slot*/, int rows) const {
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      chunks[pass] = Vec16{};
      if (participates(pass) && chunk_row(pass) < rows) load_pass(chunks[pass], pass);
    }
  }

  // `Order`: where rows are stored, see lane_order.cuh. `kHow` and `factor`: of to_elements().
  template <class Order, Conversion kHow = Conversion::kPlain, class... Factor>
  static __device__ __forceinline__ void commit(const InFlight& chunks, SharedAddress slot, Factor... factor) {
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      Vec16 chunk = chunks[pass];
      // By every thread: a branch around it would end what ptxas schedules at once.
      to_elements<Traits, kHow>(chunk, factor...);
      if (participates(pass))
        store_shared_16B(slot + stored_row<Order>(pass) * row_pitch(kDims) + chunk_dim(pass) * kElementBytes, chunk);
    }
  }

 private:
  using Offset = typename TileOffset<Traits::kVectorAccess>::Type;

  static __device__ __forceinline__ int chunk(int pass) { return thread_in_block() + pass * kThreads; }
  static __device__ __forceinline__ int chunk_row(int pass) { return chunk(pass) / kChunksPerRow; }
  static __device__ __forceinline__ int chunk_dim(int pass) { return chunk(pass) % kChunksPerRow * kChunkDims; }
  static __device__ __forceinline__ bool participates(int pass) {
    return kChunks % kThreads == 0 || chunk(pass) < kChunks;
  }
  template <class Order>
  static __device__ __forceinline__ int stored_row(int pass) {
    if constexpr (Order::kMoves) return Order::position(chunk_row(pass));
    return chunk_row(pass);
  }

  __device__ __forceinline__ void load_pass(Vec16& chunk, int pass) const {
    const char* at = reinterpret_cast<const char*>(chunk_0_) + offset_[pass];
    load_chunk<Traits>(chunk, reinterpret_cast<const Bits*>(at), chunk_dim(pass), dim_stride_);
  }

  const Bits* chunk_0_;  // this thread's first chunk of the tile
  long long row_stride_, dim_stride_;
  Offset offset_[kPasses];  // of its chunks from the first
};

struct RegisterStagedCopy {
  template <class Traits, int kRows, int kDims, int kThreads>
  using Stream = RegisterStagedStream<Traits, kRows, kDims, kThreads>;
};

// What one warp copies at a time between global memory and its own part of shared memory: kRows x kDims.
template <class Traits, int kRows, int kDims>
struct WarpRows {
  static constexpr int kChunksPerRow = kDims / kChunkDims;
  static constexpr int kChunks = kRows * kChunksPerRow;
  static constexpr int kPasses = (kChunks + 31) / 32;
  using Chunks = Vec16[kPasses];
  using Bits = typename Traits::Stored::Bits;

  static __device__ __forceinline__ int row(int pass, int lane) { return (lane + pass * 32) / kChunksPerRow; }
  static __device__ __forceinline__ int dim(int pass, int lane) {
    return (lane + pass * 32) % kChunksPerRow * kChunkDims;
  }
  static __device__ __forceinline__ bool participates(int pass, int lane) {
    return kChunks % 32 == 0 || lane + pass * 32 < kChunks;
  }
  static __device__ __forceinline__ SharedAddress address(SharedAddress tile, int pitch, int pass, int lane) {
    return tile + row(pass, lane) * pitch + dim(pass, lane) * kElementBytes;
  }

  // Dims [first_dim, first_dim + kDims) of the first `rows` rows from `first_row` on; the other rows read as zero.
  static __device__ __forceinline__ void load(Chunks& chunks, const GlobalMatrix<typename Traits::Stored>& matrix,
                                              int first_row, int rows, int first_dim, int lane) {
    const long long dim_stride = Traits::kVectorAccess ? 1 : matrix.dim_stride;
    const Bits* first = matrix.base + first_row * matrix.row_stride;
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const int d = first_dim + dim(pass, lane);
      chunks[pass] = Vec16{};
      if (participates(pass, lane) && row(pass, lane) < rows)
        load_chunk<Traits>(chunks[pass], first + row(pass, lane) * matrix.row_stride + d * dim_stride, d, dim_stride);
    }
  }

  // Stores them at `tile` in shared memory, rows `pitch` bytes apart, the signs of their pairs flipped by `sign`.
  // `factor`: of to_elements().
  template <class Order, class... Factor>
  static __device__ __forceinline__ void store_shared(SharedAddress tile, int pitch, const Chunks& chunks, int lane,
                                                      unsigned sign, Factor... factor) {
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      if (!participates(pass, lane)) continue;
      Vec16 chunk = chunks[pass];
#pragma unroll
      for (int i = 0; i < 4; ++i) chunk.word[i] ^= sign;
      to_elements<Traits>(chunk, factor...);
      if constexpr (Order::kMoves)
        store_shared_16B(tile + Order::position(row(pass, lane)) * pitch + dim(pass, lane) * kElementBytes, chunk);
      else
        store_shared_16B(address(tile, pitch, pass, lane), chunk);
    }
  }

  // The way back, from `tile` with rows `pitch` bytes apart to dims [first_dim, first_dim + kDims) of the first `rows`
  // rows from `base` on.
  static __device__ __forceinline__ void write_back(Bits* base, long long row_stride, int rows, int first_dim,
                                                    SharedAddress tile, int pitch, int lane) {
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      if (!participates(pass, lane) || row(pass, lane) >= rows) continue;
      const int d = first_dim + dim(pass, lane);
      Vec16 chunk;
      load_shared_16B(chunk, address(tile, pitch, pass, lane));
      store_chunk<Traits>(base + row(pass, lane) * row_stride + d, d, chunk);
    }
  }
};
