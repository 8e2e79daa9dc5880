// What a block that has all keys of a sequence makes beside dK and dV: delta of its queries before the main loop, and
// after each tile of queries their dQ, out of the dS that all warps have left in shared memory.
//
//   dQ^T (dims x 8 queries) += K^T (dims x keys) dS (keys x 8 queries)
//
// K lies in shared memory, a row a key; dS beside the tile of queries, for each 8 of them a matrix of 16-byte rows:
//
//   step 0   | key 0: queries 0-7 | key 1: queries 0-7 | ... |
//   step 1   | key 0: queries 8-15 | ...
//
// A warp makes a part: 16 dims, of all the tile's queries where there are as many such parts as warps, else of 8
// queries. The last 16 dims are the last part, though it may have 8 of them in common with the one before. Where a warp
// has one part alone and registers to spare, it keeps the part's K^T in them.
#pragma once

#include "accumulator.cuh"
#include "flash_bwd_side.cuh"
#include "primitives.cuh"
#include "row_delta.cuh"
#include "sequence.cuh"
#include "tile_copy.cuh"

// Tile is the kernel's FlashBwdTile: it says where the rows of K lie.
template <class Traits, class Tile>
class AllKeysDq {
  using Element = typename Traits::Element;
  using Stored = typename Traits::Stored;
  using Matrix = GlobalMatrix<Stored>;
  // Out of Traits: Tile asks for its sizes.
  static constexpr int kSteps = Traits::kBlockN / 8, kMTiles = Traits::kBlockM / Traits::kNWarps / 16;
  static constexpr int kDims = Traits::kTileDims, kDimParts = (kDims + 15) / 16;
  static constexpr int kStepsOfPart = kDimParts >= Traits::kNWarps ? kSteps : 1;
  static constexpr int kParts = kDimParts * kSteps / kStepsOfPart;
  static constexpr int kStepBytes = Traits::kBlockM * kChunkBytes;  // of dS
  static constexpr int kStagingPitch = row_pitch(16);
  // With no branch in between, so that many loads are on their way: half of the keys where some are not seen, or all.
  static constexpr bool kSeesAll = !Traits::kIsCausal && !Traits::kIsLocal;
  static constexpr int kKeysAtOnce = kSeesAll || Traits::kBlockM % 64 != 0 ? 32 : 64;
  // Two sums of every other 8 keys: an instruction waits for the one before it in its sum.
  using Part = Accumulator<kStepsOfPart, 2>;

 public:
  // To head dim 64, with 16 rows a warp, gradients leave room for what is read of K again and again.
  static constexpr bool kKeepsKeys = kMTiles == 1 && kDims <= 64;
  static constexpr int kDsBytes = kSteps * kStepBytes;
  static constexpr int kStagingWarpBytes = kStepsOfPart * 8 * kStagingPitch;
  static_assert(Traits::kBlockM % kKeysAtOnce == 0, "keys come in whole runs");

  // A warp's dS of a step, pairs of queries. That of keys beyond the last is what has come out of their zeros.
  static __device__ __forceinline__ void store_ds(SharedAddress ds_tile, int step, const unsigned (&ds)[kMTiles][2],
                                                  int first_key, int seqlen_k, int lane) {
#pragma unroll
    for (int r = 0; r < 2 * kMTiles; ++r) {
      const int key = first_key + lane_row(lane) + 8 * r;
      store_shared_4B(ds_tile + step * kStepBytes + key * kChunkBytes + lane % 4 * 4,
                      key < seqlen_k ? ds[r / 2][r % 2] : 0u);
    }
  }

  // Once, when K lies in shared memory.
  __device__ __forceinline__ void load_keys(int warp, int lane) {
    if (!kKeepsPart) return;
#pragma unroll
    for (int i = 0; i < Traits::kBlockM / 16; ++i) load_k(kept_[i], 16 * i, first_dim(warp), lane);
  }

  // dQ of the queries from `query` on, from their dS and K's rows, whose sign and scale `factor` sets right.
  __device__ __forceinline__ void write_tile(SharedAddress ds_tile, const Sequence<Traits>& sequence, const Matrix& dq,
                                             int query, float factor, int warp, int lane) const {
    const int end_query = Sequence<Traits>::minimum(query + Traits::kBlockN, sequence.seqlen_q());
    const int first = sequence.first_key(query) / kKeysAtOnce * kKeysAtOnce;
    const int end = Sequence<Traits>::minimum(sequence.end_key(end_query - 1), Traits::kBlockM);
#pragma unroll
    for (int round = 0; round < kParts; round += Traits::kNWarps) {
      const int part = round + warp;
      if (part >= kParts) break;
      const int dim = first_dim(part), step = part / kDimParts * kStepsOfPart;
      Part acc;
      for_each(acc, [](float& gradient, int, int) { gradient = 0.0f; });
#pragma unroll
      for (int key = 0; key < Traits::kBlockM; key += kKeysAtOnce)
        if (kSeesAll || (key >= first && key < end)) add_keys(acc, ds_tile, key, dim, step, lane);
      write_part(acc, dq, query + 8 * step, end_query, dim, part % kDimParts * 16, factor,
                 Tile::kDqStagingBegin + warp * kStagingWarpBytes, lane);
    }
  }

  // Queries that see no key, [query, end).
  static __device__ __forceinline__ void write_zeros(const Matrix& dq, int query, int end) {
    constexpr long long kChunksPerRow = kDims / kChunkDims;
    for (long long chunk = query * kChunksPerRow + thread_in_block(); chunk < end * kChunksPerRow;
         chunk += Tile::kThreads) {
      const int dim = static_cast<int>(chunk % kChunksPerRow) * kChunkDims;
      store_chunk<Traits>(row_of(dq, static_cast<int>(chunk / kChunksPerRow)) + dim, dim, Vec16{});
    }
  }

  static __device__ __forceinline__ void write_delta(const FlashBwdTensors<Traits>& of, int head, int warp, int lane) {
    const FlashBwdParams& params = of.params;
    const long long statistics = of.sequence.statistics_offset(head, 0);
    const float* const dlse = params.dlse != nullptr ? params.dlse + statistics : nullptr;
    using Delta = RowDelta<OfValues<Traits>>;
    constexpr int kRows = Delta::kRowsAtOnce;
    for (int row = warp * kRows; row < of.sequence.seqlen_q(); row += Traits::kNWarps * kRows)
      Delta::write(of.out(head), of.dout(head), row, of.sequence.seqlen_q(), lane, params.softmax_lse + statistics,
                   dlse, params.delta + statistics, {params.peaks + statistics, params.softmax_scale});
  }

 private:
  static constexpr bool kKeepsPart = kKeepsKeys && kParts <= Traits::kNWarps;

  static __device__ __forceinline__ int first_dim(int part) {
    const int dim = part % kDimParts * 16;
    return kDims % 16 != 0 && dim > kDims - 16 ? kDims - 16 : dim;
  }

  static __device__ __forceinline__ typename Stored::Bits* row_of(const Matrix& dq, int row) {
    return const_cast<typename Stored::Bits*>(dq.base) + row * dq.row_stride;
  }

  // K^T's fragments of 16 dims x 16 keys: dims 0-7 and 8-15 of the first 8 keys, then of the last 8.
  static __device__ __forceinline__ void load_k(unsigned (&a)[4], int key, int dim, int lane) {
    ldmatrix_x4_trans(a, Tile::s_row(key) + (lane % 8 + lane / 16 * 8) * row_pitch(kDims) + dim * kElementBytes +
                             lane / 8 % 2 * kChunkBytes);
  }

  __device__ __forceinline__ void add_keys(Part& acc, SharedAddress ds_tile, int key, int dim, int step,
                                           int lane) const {
#pragma unroll
    for (int run = key; run < key + kKeysAtOnce; run += 32) {
      unsigned k[2][4];
#pragma unroll
      for (int half = 0; half < 2; ++half)
        if (kKeepsPart) {
#pragma unroll
          for (int i = 0; i < 4; ++i) k[half][i] = kept_[run / 16 + half][i];
        } else {
          load_k(k[half], run + 16 * half, dim, lane);
        }
#pragma unroll
      for (int s = 0; s < kStepsOfPart; ++s) {
        unsigned ds[4];
        ldmatrix_x4_trans(ds, ds_tile + (step + s) * kStepBytes + (run + lane) * kChunkBytes);
#pragma unroll
        for (int i = 0; i < 4; ++i)
          Element::multiply_add(acc[s][i % 2], k[i / 2][i % 2 * 2], k[i / 2][i % 2 * 2 + 1], ds[i]);
      }
    }
  }

  // Through shared memory, where dims that lie under each other come to lie beside each other. From `own_dim` on: the
  // part before has made the others, too.
  static __device__ __forceinline__ void write_part(const Part& acc, const Matrix& dq, int query, int end_query,
                                                    int dim, int own_dim, float factor, SharedAddress staging,
                                                    int lane) {
#pragma unroll
    for (int s = 0; s < kStepsOfPart; ++s)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const unsigned pair =
            Stored::pack((acc[s][0][c] + acc[s][1][c]) * factor, (acc[s][0][c + 2] + acc[s][1][c + 2]) * factor);
        const SharedAddress at =
            staging + (8 * s + lane_column(lane) + c) * kStagingPitch + lane_row(lane) * kElementBytes;
        store_shared_2B(at, pair);
        store_shared_2B(at + 8 * kElementBytes, pair >> 16);
      }
    warp_barrier();
    for (int chunk = lane; chunk < kStepsOfPart * 8 * 2; chunk += 32) {
      const int row = chunk / 2, d = dim + chunk % 2 * kChunkDims;
      if (query + row >= end_query || (kDims % 16 != 0 && d < own_dim)) continue;
      Vec16 values;
      load_shared_16B(values, staging + row * kStagingPitch + chunk % 2 * kChunkBytes);
      store_chunk<Traits>(row_of(dq, query + row) + d, d, values);
    }
    warp_barrier();
  }

  unsigned kept_[Traits::kBlockM / 16][4];  // K^T of this warp's part
};
