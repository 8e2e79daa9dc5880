// Backward: the gradient of attn_bias. It is that of the scores that the bias was added to, summed over what the bias
// was broadcast over:
//
//   S = scale Q K^T, then score features     P = exp(S - lse)     dP = dO V^T     dbias = sum of P (dP - delta)
//
// with dropout dP x scale of what is kept, and 0 of what is not.
//
// A block owns kBlockM keys of a part of the gradient, and of its rows kBlockN or the only one. It makes S and dP anew
// for every sequence and head that it adds up, one after the other, and adds in registers: the order is the same at
// every call. As where dK is made, rows of the products are keys: K and V stay with the warps while the queries of one
// head, or those of a group's heads, go by.
#pragma once

#include "accumulator.cuh"
#include "column_fragments.cuh"
#include "dropout.cuh"
#include "flash_bwd_params.cuh"
#include "flash_bwd_side.cuh"
#include "gradient_scale.cuh"
#include "primitives.cuh"
#include "query_statistics.cuh"
#include "row_fragments.cuh"
#include "score_variant.cuh"
#include "sequence.cuh"
#include "tile_copy.cuh"

template <class Traits>
struct FlashBwdBiasTile {
  static constexpr int kDims = Traits::kTileDims, kValueDims = Traits::kTileDimsV;
  static constexpr int kRowsPerWarp = Traits::kBlockM / Traits::kNWarps;
  static constexpr int kThreads = Traits::kNWarps * 32;
  using KeyFragments = RowFragments<Traits, kRowsPerWarp, kDims, kRegisterDimsOf<Traits, kDims>>;
  using ValueFragments = RowFragments<OfValues<Traits>, kRowsPerWarp, kValueDims, kRegisterDimsOf<Traits, kValueDims>>;

  // Shared memory: a tile of Q, one of dO and their statistics, then for each warp its rows of K and of V beyond the
  // dims in registers, and where these come in.
  static constexpr int kTileBytes = Traits::kBlockN * row_pitch(kDims);  // of Q
  static constexpr int kStatisticsBegin = kTileBytes + Traits::kBlockN * row_pitch(kValueDims);
  static constexpr int kWarpsBegin = kStatisticsBegin + Traits::kBlockN * kStatisticsBytes;
  static constexpr int kWarpBytes =
      KeyFragments::kSharedBytes + ValueFragments::kSharedBytes + KeyFragments::kStagingBytes;
  static constexpr int kSharedBytes = kWarpsBegin + Traits::kNWarps * kWarpBytes;
};

// A tile of queries with the block's keys, of one head.
template <class Traits>
struct PairTile {
  Sequence<Traits> sequence;
  int batch, head;
  int query;      // the first
  bool is_whole;  // every query exists and sees every key
};

// What a block adds up: the tiles of all its sequences and heads in which some query sees a key.
template <class Traits>
class SummedTiles {
 public:
  __device__ __forceinline__ SummedTiles(const FlashBwdParams& params, int block) : params_(params) {
    const BiasGradientParams& dbias = params.dbias;
    const int row_tiles = ceil_div(dbias.rows, Traits::kBlockN);
    first_key_ = block % params.num_row_blocks * Traits::kBlockM;
    first_row_ = block / params.num_row_blocks % row_tiles * Traits::kBlockN;
    part_ = block / params.num_row_blocks / row_tiles;
    const int batch = part_ / dbias.heads, batches = ceil_div(dbias.sequences, dbias.batches);
    const int heads = ceil_div(params.num_heads, dbias.heads);
    first_head_ = part_ % dbias.heads * heads;
    end_head_ = Sequence<Traits>::minimum(first_head_ + heads, params.num_heads);
    end_batch_ = Sequence<Traits>::minimum((batch + 1) * batches, dbias.sequences);
    // As if all heads of the sequence before had been gone over.
    batch_ = batch * batches - 1;
    head_ = end_head_ - 1;
    tile_ = end_tile_ = 0;
  }

  // Of the block's part of the gradient; `part` counts its first two dimensions.
  __device__ __forceinline__ int first_key() const { return first_key_; }
  __device__ __forceinline__ int first_row() const { return first_row_; }
  __device__ __forceinline__ int part() const { return part_; }

  // The next one; false: there is none.
  __device__ __forceinline__ bool next(PairTile<Traits>& tile) {
    while (tile_ >= end_tile_)
      if (!next_head(tile)) return false;
    tile.query = tile_ * Traits::kBlockN;
    tile.is_whole = tile_ >= whole_begin_ && tile_ < whole_end_;
    ++tile_;
    return true;
  }

 private:
  static __device__ __forceinline__ int ceil_div(int a, int b) { return (a + b - 1) / b; }

  __device__ __forceinline__ bool next_head(PairTile<Traits>& tile) {
    if (++head_ >= end_head_) {
      head_ = first_head_;
      if (++batch_ >= end_batch_ || head_ >= end_head_) return false;
    }
    tile.batch = batch_;
    tile.head = head_;
    tile.sequence = Sequence<Traits>(params_, batch_);
    set_tiles(tile.sequence);
    return true;
  }

  // With one row all tiles of queries, else the block's own.
  __device__ __forceinline__ void set_tiles(const Sequence<Traits>& sequence) {
    tile_ = end_tile_ = 0;
    if (first_key_ >= sequence.seqlen_k()) return;
    const TileRange seen = sequence.query_tiles(first_key_, Traits::kBlockM);
    const bool keys_exist = first_key_ + Traits::kBlockM <= sequence.seqlen_k();
    const int own = first_row_ / Traits::kBlockN;
    tile_ = Traits::kIsOneRow ? seen.begin : Sequence<Traits>::maximum(seen.begin, own);
    end_tile_ = Traits::kIsOneRow ? seen.end : Sequence<Traits>::minimum(seen.end, own + 1);
    whole_begin_ = seen.whole_begin;
    whole_end_ = keys_exist ? seen.whole_end : 0;
  }

  const FlashBwdParams& params_;
  int first_key_, first_row_, part_;
  int first_head_, end_head_, end_batch_;
  int batch_, head_, tile_, end_tile_;  // the next one
  int whole_begin_, whole_end_;         // of the tiles of this head
};

template <class Traits>
class FlashBwdBias {
  using Tile = FlashBwdBiasTile<Traits>;
  using Element = typename Traits::Element;
  using Variant = ScoreVariant<Traits>;
  using QueryStream = typename Traits::Copy::template Stream<Traits, Traits::kBlockN, Tile::kDims, Tile::kThreads>;
  using DoutStream =
      typename Traits::Copy::template Stream<OfValues<Traits>, Traits::kBlockN, Tile::kValueDims, Tile::kThreads>;
  static constexpr int kMTiles = Tile::kRowsPerWarp / 16, kSteps = Traits::kBlockN / 8;

  // Where numbers of pairs are read, a lane's keys are neighbours.
  using Rows = RowOrder<kReadsNeighbours<Traits>, kMTiles>;
  using Fetched = typename Variant::template Fetched<2 * kMTiles, Rows::Keys::kAtOnce>[Traits::kIsOneRow ? 1 : 2];

  using Dropout = DropoutOf<Traits, true, kMTiles, kSteps, kReadsNeighbours<Traits>>;

  using Products = Accumulator<kMTiles, 1>;  // S or dP of a step of 8 queries
  using Sums = Accumulator<kMTiles, Traits::kIsOneRow ? 1 : kSteps>;

  // What a thread has of a tile before it is stored.
  struct InFlight {
    typename QueryStream::InFlight q;
    typename DoutStream::InFlight dout;
    float lse, delta;
    float peak;  // of some of its queries
  };

 public:
  __device__ __forceinline__ explicit FlashBwdBias(const FlashBwdParams& params)
      : params_(params),
        tiles_(params, block_in_grid()),
        lane_(static_cast<unsigned>(thread_in_block()) % 32),
        warp_(static_cast<unsigned>(thread_in_block()) / 32) {}

  __device__ __forceinline__ void run() {
    for_each(sums_, [](float& sum, int, int) { sum = 0.0f; });
    PairTile<Traits> tile;
    InFlight in;
    bool is_there = tiles_.next(tile);
    if (is_there) prefetch(in, tile);
    while (is_there) {
      block_barrier();  // the tile before has been read
      load_rows(tile);
      commit(in);
      PairTile<Traits> next = tile;
      is_there = tiles_.next(next);
      if (is_there) prefetch(in, next);
      add(tile);
      tile = next;
    }
    write();
  }

 private:
  // ---- memory ----

  // Of the warp.
  __device__ __forceinline__ int first_key() const { return tiles_.first_key() + warp_ * Tile::kRowsPerWarp; }

  // K and V, where they are not those of the tile before.
  __device__ __forceinline__ void load_rows(const PairTile<Traits>& tile) {
    const int head_k = tile.head / Traits::kGroupSize;
    if (tile.batch == loaded_batch_ && head_k == loaded_head_) return;
    loaded_batch_ = tile.batch;
    loaded_head_ = head_k;
    const FlashBwdTensors<Traits> tensors{params_, tile.sequence};
    const int seqlen_k = tile.sequence.seqlen_k();
    const SharedAddress rows = Tile::kWarpsBegin + warp_ * Tile::kWarpBytes;
    const SharedAddress staging = rows + Tile::KeyFragments::kSharedBytes + Tile::ValueFragments::kSharedBytes;
    k_.template load<Rows>(tensors.k(head_k), first_key(), seqlen_k, params_.sign, lane_, staging, rows);
    v_.template load<Rows>(tensors.v(head_k), first_key(), seqlen_k, 0, lane_, staging,
                           rows + Tile::KeyFragments::kSharedBytes);
  }

  __device__ __forceinline__ void prefetch(InFlight& in, const PairTile<Traits>& tile) const {
    const FlashBwdTensors<Traits> tensors{params_, tile.sequence};
    const int queries = tile.sequence.seqlen_q() - tile.query, i = thread_in_block();
    prefetch<QueryStream>(in.q, tensors.q(tile.head), tile.query / Traits::kBlockN, queries);
    prefetch<DoutStream>(in.dout, tensors.dout(tile.head), tile.query / Traits::kBlockN, queries);
    load_statistics<Variant>(params_, tile.sequence.statistics_offset(tile.head, tile.query + i),
                             i < Traits::kBlockN && i < queries, in.lse, in.delta);
    if constexpr (kConverts<Traits>) {
      in.peak = 0.0f;
#pragma unroll
      for (int lane = lane_; lane < Traits::kBlockN; lane += 32)
        in.peak = max_ignoring_nan(
            in.peak, load_peak(params_, tile.sequence.statistics_offset(tile.head, tile.query + lane), lane < queries));
    }
  }

  template <class Stream>
  static __device__ __forceinline__ void prefetch(typename Stream::InFlight& in,
                                                  const GlobalMatrix<typename Traits::Stored>& matrix, int tile,
                                                  int rows) {
    Stream stream(matrix);
    stream.go_to(tile);
    stream.prefetch_bounded(in, 0, rows);
  }

  __device__ __forceinline__ void commit(const InFlight& in) {
    if constexpr (kConverts<Traits>) scale_ = GradientScale<Traits>(greatest_in_warp(in.peak));
    QueryStream::template commit<MemoryOrder>(in.q, 0);
    DoutStream::template commit<MemoryOrder>(in.dout, Tile::kTileBytes, scale_.factor());
    if (thread_in_block() < Traits::kBlockN)
      store_statistics(Tile::kStatisticsBegin, thread_in_block(), in.lse * kLog2E, in.delta);
    block_barrier();
  }

  // What the scores of a step need from memory: once for all where every query has the same.
  __device__ __forceinline__ void fetch(Fetched& fetched, const PairTile<Traits>& tile, int step) const {
    if constexpr (Variant::kReadsPairs) {
      if (step >= kSteps || (Traits::kIsOneRow && step > 0)) return;
#pragma unroll
      for (int i = 0; i < (Traits::kIsOneRow ? 1 : 2); ++i)
        variant_.template fetch<typename Rows::Keys, 2 * kMTiles, false, false>(
            fetched[i], tile.sequence, lane_query(tile, step) + i, lane_key(0));
    }
  }

  // ---- a tile, 8 queries a step ----

  // The lane's key of row r, and its first query of a step.
  __device__ __forceinline__ int lane_key(int r) const { return first_key() + Rows::first(lane_) + Rows::kStep * r; }
  __device__ __forceinline__ int lane_query(const PairTile<Traits>& tile, int step) const {
    return tile.query + 8 * step + lane_column(lane_);
  }

  __device__ __forceinline__ void add(const PairTile<Traits>& tile) {
    variant_.prepare(params_, tile.sequence, tile.head, 1.0f);
    if constexpr (Traits::kHasDropout) {
      dropout_.prepare(params_.dropout, tile.batch * params_.num_heads + tile.head);
      dropout_.make(first_key(), tile.query, lane_);
    }
    Fetched fetched;
    fetch(fetched, tile, 0);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      Fetched of_step;
      copy(fetched, of_step);
      fetch(fetched, tile, step + 1);
      Products s, dp;
      multiply<Tile::kDims>(s, k_, 0, step);
      multiply<Tile::kValueDims>(dp, v_, Tile::kTileBytes, step);
      for_each(s, [&](float& score, int r, int c) {
        score = variant_.score(score, lane_query(tile, step) + c, lane_key(r));
      });
      if (!tile.is_whole) mask(s, dp, tile, step);
      differentiate(s, dp, of_step, tile, step);
    }
  }

  static __device__ __forceinline__ void copy(const Fetched& from, Fetched& to) {
#pragma unroll
    for (int i = 0; i < (Traits::kIsOneRow ? 1 : 2); ++i) to[i] = from[i];
  }

  // The warp's rows times a step's columns of a tile.
  template <int kDims, class Fragments>
  __device__ __forceinline__ void multiply(Products& acc, const Fragments& rows, SharedAddress columns,
                                           int step) const {
    constexpr int kDTiles = kDims / 8;
    for_each(acc, [](float& product, int, int) { product = 0.0f; });
#pragma unroll
    for (int d = 0; d < kDTiles; d += 4) {
      unsigned b[4];
      load_columns<kDims>(b, columns, step, d, lane_);
#pragma unroll
      for (int i = 0; i < (kDTiles - d < 4 ? kDTiles - d : 4); i += 2) {
        typename Fragments::Step a;
        rows.get(a, (d + i) / 2);
#pragma unroll
        for (int half = 0; half < (kDTiles % 2 != 0 && kDTiles - d - i < 2 ? 1 : 2); ++half)
#pragma unroll
          for (int m = 0; m < kMTiles; ++m)
            Element::multiply_add(acc[m][0], a[m][2 * half], a[m][2 * half + 1], b[i + half]);
      }
    }
  }

  // Pairs that do not see each other, or are none, add 0.
  __device__ __forceinline__ void mask(Products& s, Products& dp, const PairTile<Traits>& tile, int step) const {
    const Sequence<Traits>& sequence = tile.sequence;
#pragma unroll
    for (int r = 0; r < 2 * kMTiles; ++r) {
      const int key = lane_key(r), first = sequence.first_query(key);
      const int end = key < sequence.seqlen_k() ? sequence.end_query(key) : 0;
#pragma unroll
      for (int c = 0; c < 2; ++c)
        if (const int query = lane_query(tile, step) + c; query < first || query >= end) {
          s[r / 2][0][r % 2 * 2 + c] = -infinity();
          dp[r / 2][0][r % 2 * 2 + c] = 0.0f;
        }
    }
  }

  __device__ __forceinline__ void differentiate(const Products& s, const Products& dp, const Fetched& fetched,
                                                const PairTile<Traits>& tile, int step) {
    const Statistics of = load_statistics_pair(Tile::kStatisticsBegin, step * 4 + lane_ % 4);
    if constexpr (Traits::kHasDropout)
      if (Dropout::begins_group(step)) kept_ = dropout_.get(Dropout::group(step), lane_);
#pragma unroll
    for (int r = 0; r < 2 * kMTiles; ++r)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int at = r % 2 * 2 + c;
        const float exponent = variant_.bias(fma_rounded(s[r / 2][0][at], params_.softmax_scale_log2, -of.lse[c]),
                                             fetched[Traits::kIsOneRow ? 0 : c], r, tile.sequence,
                                             lane_query(tile, step) + c, lane_key(r));
        const float p = saturate(exp2_approx(exponent));  // see log_sum_exp()
        float& sum = sums_[r / 2][Traits::kIsOneRow ? 0 : step][at];
        sum = fma_rounded(p, kept(dp[r / 2][0][at] * scale_.inverse(), r, step, c) - of.delta[c], sum);
      }
  }

  // What dropout leaves of dP.
  __device__ __forceinline__ float kept(float dp, int r, int step, int c) const {
    if constexpr (Traits::kHasDropout) return Dropout::keeps(kept_, r, step, c) ? dp * params_.dropout.scale : 0.0f;
    return dp;
  }

  // ---- the output ----

  __device__ __forceinline__ void write() const {
    const BiasGradientParams& dbias = params_.dbias;
    for_each(sums_, [&](const float& sum, int r, int column) {
      const int key = lane_key(r), row = tiles_.first_row() + column + lane_column(lane_);
      float all = sum;
      if constexpr (Traits::kIsOneRow) {
        all += sums_[r / 2][0][r % 2 * 2 + 1];  // of every other query
        all += shuffle_xor(all, 1);
        all += shuffle_xor(all, 2);
      }
      if (key < dbias.keys && row < dbias.rows) write(key, row, all);
    });
  }

  __device__ __forceinline__ void write(int key, int row, float sum) const {
    const BiasGradientParams& dbias = params_.dbias;
    const long long at = (static_cast<long long>(tiles_.part()) * dbias.rows + row) * dbias.keys + key;
    if (dbias.is_float32)
      store_global_f32(static_cast<float*>(dbias.data) + at, sum);
    else
      store_global_2B(static_cast<typename Traits::Stored::Bits*>(dbias.data) + at, Traits::Stored::pack(sum, 0.0f));
  }

  const FlashBwdParams& params_;
  SummedTiles<Traits> tiles_;
  const int lane_, warp_;
  GradientScale<Traits> scale_;  // of the tile's queries: sums are floats
  Variant variant_;
  Dropout dropout_;
  typename Dropout::Kept kept_;
  typename Tile::KeyFragments k_;
  typename Tile::ValueFragments v_;
  int loaded_batch_ = -1, loaded_head_ = -1;  // whose rows these are
  Sums sums_;
};

template <class Traits>
__device__ __forceinline__ void flash_bwd_bias(const FlashBwdParams& params) {
  FlashBwdBias<Traits>(params).run();
}
