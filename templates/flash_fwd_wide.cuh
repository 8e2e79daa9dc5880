// Forward attention of head dims whose O no warp has registers for: what flash_fwd.cuh does for the others.
//
// A block owns kBlockM query rows of one head. kSharers warps share 32 of them: each has its part of the head dims, of
// Q as operands and of O as accumulators. Of a tile of 8 keys, last tile first, it makes what its dims give of the
// scores of all 32 rows; then it adds up what all have made of the scores of 8 rows, in a fixed order, turns them into
// probabilities and hands these to the others. So a tile takes three iterations, with a barrier after each. That of
// tile n, a block without branches in which ptxas interleaves products and the rest:
//
//   P(n+1) of what was made of S(n+1)
//   partial S(n) = Q K(n)^T       meanwhile   V(n+1) is stored to shared memory, K(n-1) loaded
//   O += P(n+2) V(n+2)            meanwhile   K(n-1) is stored, V(n) loaded
//
// What one iteration makes for the next has two places in shared memory, and tiles take turns with them. Where a row's
// maximum is corrected, the sharers find the factor beside P, and rescale O before they use that.
#pragma once

#include "accumulator.cuh"
#include "block_info.cuh"
#include "dropout.cuh"
#include "finished_row.cuh"
#include "flash_fwd_params.cuh"
#include "key_rows.cuh"
#include "mask.cuh"
#include "paged_stream.cuh"
#include "primitives.cuh"
#include "row_fragments.cuh"
#include "row_output.cuh"
#include "schedule.cuh"
#include "score_variant.cuh"
#include "shown_keys.cuh"
#include "softmax.cuh"
#include "tile_copy.cuh"

// The numbers that follow from Traits.
template <class Traits>
struct FlashFwdWideTile {
  static constexpr int kSharers = Traits::kDimSplits;
  static constexpr int kDims = Traits::kTileDims;
  static constexpr int kWarpDims = kDims / kSharers;
  static constexpr int kRows = 8 * kSharers;  // that warps share
  static constexpr int kMTiles = kRows / 16;
  static constexpr int kDTiles = kWarpDims / 8;
  static constexpr int kThreads = Traits::kNWarps * 32;
  static_assert(Traits::kBlockM == 8 * Traits::kNWarps && Traits::kBlockN == 8);

  // Shared memory, all of it twice: a tile of K, one of V; for each warp's 8 rows x 8 keys what the other sharers make
  // of their scores, two words a lane, what it makes of those, a word a lane, and the rows' factors.
  static constexpr int kWordBytes = 32 * 4;  // a word a lane
  static constexpr int kTileBytes = Traits::kBlockN * row_pitch(kDims);
  static constexpr int kPartialBytes = Traits::kNWarps * kSharers * 2 * kWordBytes;
  static constexpr int kProbabilityBytes = Traits::kNWarps * kWordBytes;
  static constexpr int kFactorBytes = Traits::kBlockM * 4;
  static constexpr int kValues = 2 * kTileBytes;
  static constexpr int kPartials = kValues + 2 * kTileBytes;
  static constexpr int kProbabilities = kPartials + 2 * kPartialBytes;
  static constexpr int kFactors = kProbabilities + 2 * kProbabilityBytes;
  static constexpr int kWorkBytes = kFactors + 2 * kFactorBytes;

  // Behind it of each warp's part of Q the dims beyond kRegisterDims. Q on its way in and out on its way back pass
  // through the memory before kFactors.
  using QueryFragments = RowFragments<Traits, kRows, kWarpDims, Traits::kRegisterDims>;
  static constexpr int kQWarpBytes = QueryFragments::kSharedBytes;
  using Output = RowOutput<Traits, kRows, kWarpDims>;
  static constexpr int kStagingWarpBytes = Output::kStagingBytes;
  static_assert(QueryFragments::kStagingBytes <= kStagingWarpBytes, "Q is staged in less than out");
  static_assert(Traits::kNWarps * kStagingWarpBytes <= kFactors, "out is staged before the factors");
  static constexpr int kSharedBytes = kWorkBytes + Traits::kNWarps * kQWarpBytes;
};

template <class Traits>
class FlashFwdWide {
  using Tile = FlashFwdWideTile<Traits>;
  using Element = typename Traits::Element;
  using Bits = typename Traits::Stored::Bits;
  using Matrix = GlobalMatrix<typename Traits::Stored>;
  static constexpr int kSharers = Tile::kSharers;
  static constexpr int kMTiles = Tile::kMTiles, kDTiles = Tile::kDTiles;
  static constexpr int kPitch = row_pitch(Tile::kDims);
  static constexpr int kProducts = kMTiles * kDTiles;  // tensor instructions of each of the two products

  using Variant = ScoreVariant<Traits>;
  using Columns = ColumnOrder<kReadsNeighbours<Traits>, 1>;
  using Rows = Softmax<Element, 1, 1, Variant::kIsLarge>;  // of which a lane has the first alone
  using Dropout = DropoutOf<Traits, false, 1, 1, kReadsNeighbours<Traits>>;
  using Points = Schedule<Traits, kProducts>;
  using Stream = typename Traits::Copy::template Stream<Traits, Traits::kBlockN, Tile::kDims, Tile::kThreads>;
  using InFlight = typename Stream::InFlight;

 public:
  __device__ __forceinline__ explicit FlashFwdWide(const FlashFwdParams& params)
      : params_(params),
        block_(params, block_in_grid()),
        lane_(thread_in_block() % 32),
        place_(thread_in_block() / 32),
        softmax_(exponent_scale<Variant>(params)),
        k_stream_(keys(params.k, params.k_strides)),
        v_stream_(keys(params.v, params.v_strides)) {
    variant_.prepare(params, block_.sequence, block_.head, reciprocal(params.softmax_scale_log2));
    if constexpr (Traits::kHasDropout)
      dropout_.prepare(params.dropout, block_.sequence.batch() * params.num_heads + block_.head);
  }

  __device__ __forceinline__ void run() {
    if (!block_.has_rows()) return;
    const TileRange tiles =
        shown_tiles<Traits>(block_.sequence.key_tiles(block_.m_begin, Traits::kBlockM), variant_, block_.sequence);
    if (tiles.begin < tiles.end) attend(tiles);
    write_out();
  }

 private:
  // Where a warp stands among those of its block.
  struct Place {
    int warp, part;

    __device__ __forceinline__ explicit Place(int warp) : warp(warp), part(warp % kSharers) {}

    // Of the block's rows, those that it shares, and the first of its 8.
    __device__ __forceinline__ int shared_row() const { return warp / kSharers * Tile::kRows; }
    __device__ __forceinline__ int own_row() const { return 8 * warp; }
    __device__ __forceinline__ int first_dim() const { return part * Tile::kWarpDims; }
    // The sharer that has rows 8 r and on of the shared ones.
    __device__ __forceinline__ int sharer(int r) const { return warp - part + r; }
  };

  // The keys or values of the block's head.
  __device__ __forceinline__ KeyMatrix<Traits> keys(const void* tensor, const TensorStrides& strides) const {
    return key_matrix(params_, block_.sequence, tensor, strides, block_.head_k);
  }
  __device__ __forceinline__ Matrix queries() const {
    return {static_cast<const Bits*>(params_.q) + block_.sequence.query_offset(params_.q_strides, block_.head),
            params_.q_strides.row};
  }

  // Every tile from the last to the first, and two iterations more. Unmasked ones rely on S(n+1) and P(n+2) being there
  // and whole.
  __device__ __forceinline__ void attend(const TileRange& tiles) {
    const int row = block_.m_begin + place_.shared_row();
    query_.template load<MemoryOrder>(queries(), row, block_.sequence.seqlen_q(), params_.sign, lane_,
                                      place_.warp * Tile::kStagingWarpBytes,
                                      Tile::kWorkBytes + place_.warp * Tile::kQWarpBytes, place_.first_dim());
    block_barrier();  // every warp has its Q out of the slots' memory
    of_rows_ = block_.sequence.key_tiles(row, Tile::kRows);
    of_rows_.begin = Sequence<Traits>::maximum(of_rows_.begin, tiles.begin);
    of_rows_.end = Sequence<Traits>::minimum(of_rows_.end, tiles.end);
    prologue(tiles.end - 1);
    const int drained = tiles.begin - 2;
    iterations<true>(Sequence<Traits>::maximum(tiles.whole_end - 2, drained));
    iterations<false>(Sequence<Traits>::maximum(tiles.whole_begin - 1, tiles.begin));
    iterations<true>(drained);
  }

  // Whether some of the shared rows sees some key of a tile.
  __device__ __forceinline__ bool sees(int n) const { return n >= of_rows_.begin && n < of_rows_.end; }

  // ---- tiles come ----

  // Which of two places is tile n's.
  static __device__ __forceinline__ int turn(int n) { return n & 1; }
  static __device__ __forceinline__ SharedAddress keys_at(int n) { return turn(n) * Tile::kTileBytes; }
  static __device__ __forceinline__ SharedAddress values_at(int n) { return Tile::kValues + keys_at(n); }

  // Before the iteration of tile `last`, the first one.
  __device__ __forceinline__ void prologue(int last) {
    n_ = last;
    k_stream_.go_to(last + 1);
    v_stream_.go_to(last + 1);
    prefetch<true>(k_stream_, last);
    Stream::template commit<Columns>(in_flight_, keys_at(last));
#pragma unroll
    for (Vec16& chunk : in_flight_) chunk = Vec16{};  // V(last+1), which nobody uses
    block_barrier();
  }

  // The stream's next tile, n. Behind tile 0 it is that once more, which nobody uses: that costs less than a branch.
  template <bool kIsMasked>
  __device__ __forceinline__ void prefetch(Stream& stream, int n) {
    if (n >= 0) stream.advance();
    if constexpr (kIsMasked)
      stream.prefetch_bounded(in_flight_, 0, block_.sequence.seqlen_k() - (n < 0 ? 0 : n) * Traits::kBlockN);
    else
      stream.prefetch(in_flight_, 0);
  }

  // What the scores of the lane's keys of tile n need from memory; behind tile 0, where none come, that tile's.
  template <bool kIsWhole>
  __device__ __forceinline__ void fetch_pairs(int n) {
    if constexpr (Variant::kReadsPairs)
      variant_.template fetch<typename Columns::Keys, 2, false, kIsWhole>(fetched_, block_.sequence, lane_query(),
                                                                          lane_key(n > 0 ? n : 0));
  }

  // ---- the iterations, n = n_ ----

  // Down to tile n_end; `kIsMasked`: some rows do not see some keys, and warps leave out tiles that none of their rows
  // sees. The correction stands outside the loop that nearly every iteration stays in.
  template <bool kIsMasked>
  __device__ __forceinline__ void iterations(int n_end) {
    while (n_ >= n_end) {
      bool must_correct = false;
      do {
        must_correct = iterate<kIsMasked>();
      } while (n_ >= n_end && !must_correct);
      if (must_correct && sees(n_ + 2)) correct(n_ + 2);
    }
  }

  // Returns whether O must be corrected before the next one.
  template <bool kIsMasked>
  __device__ __forceinline__ bool iterate() {
    const bool reduces = !kIsMasked || sees(n_ + 1);
    float s[2];
    bool rises = false;
    if (reduces) add_up(s, n_ + 1);
    const auto between_products_of_scores = [&](int product) {
      if (product == Points::kCommit) Stream::template commit<Columns>(in_flight_, values_at(n_ + 1));
      if (product == Points::kPrefetch) prefetch<kIsMasked>(k_stream_, n_ - 1);
      if (product == Points::kFirstKeys) {
        if (reduces) rises = to_probabilities<kIsMasked>(s, n_ + 1);
        fetch_pairs<!kIsMasked>(n_);
      }
    };
    if (!kIsMasked || sees(n_))
      make_scores(between_products_of_scores);
    else
      instead_of_products(between_products_of_scores);
    const auto between_products_of_values = [&](int product) {
      if (product == Points::kCommit) Stream::template commit<Columns>(in_flight_, keys_at(n_ - 1));
      if (product == Points::kPrefetch) prefetch<kIsMasked>(v_stream_, n_);
    };
    if (!kIsMasked || sees(n_ + 2))
      accumulate(between_products_of_values);
    else
      instead_of_products(between_products_of_values);
    --n_;
    return any_in_block(rises);
  }

  // What is to be done meanwhile, where a warp has no products.
  template <class Meanwhile>
  static __device__ __forceinline__ void instead_of_products(Meanwhile meanwhile) {
    for (int product = 0; product < kProducts; ++product) meanwhile(product);
  }

  // ---- the two products ----

  // What the warp's dims give of S(n) = Q K(n)^T. `meanwhile(i)` is called after tensor instruction i of kProducts.
  template <class Meanwhile>
  __device__ __forceinline__ void make_scores(Meanwhile meanwhile) {
    const SharedAddress lane_keys = keys_at(n_) + lane_matrices();
    Accumulator<kMTiles, 1> acc_s;
    int product = 0;
#pragma unroll
    for (int d = 0; d < kDTiles; d += 4) {
      // K fragments of 8 keys x 32 dims are the B operands of products with 4 x 8 dims of Q.
      unsigned k[4];
      load_fragments<false>(k, lane_keys + d * kChunkBytes, kDTiles - d);
      typename Tile::QueryFragments::Step q[2];
      query_.get(q[0], d / 2);
      if (kDTiles - d > 2) query_.get(q[1], d / 2 + 1);
#pragma unroll
      for (int i = 0; i < (kDTiles - d < 4 ? kDTiles - d : 4); ++i)
#pragma unroll
        for (int m = 0; m < kMTiles; ++m) {
          const unsigned (&a)[4] = q[i / 2][m];
          if (d == 0 && i == 0)
            Element::multiply(acc_s[m][0], a[0], a[1], k[0]);
          else
            Element::multiply_add(acc_s[m][0], a[i % 2 * 2], a[i % 2 * 2 + 1], k[i]);
          meanwhile(product++);
        }
    }
    hand_over(acc_s);
  }

  // O += P(n+2) V(n+2) of the warp's dims.
  template <class Meanwhile>
  __device__ __forceinline__ void accumulate(Meanwhile meanwhile) {
    const SharedAddress lane_values = values_at(n_ + 2) + lane_matrices();
    unsigned p[kMTiles][2];
#pragma unroll
    for (int r = 0; r < 2 * kMTiles; ++r)
      p[r / 2][r % 2] = bits_of_float(load_shared_f32(probabilities_at(n_ + 2, place_.sharer(r))));
    int product = 0;
#pragma unroll
    for (int d = 0; d < kDTiles; d += 4) {
      // V fragments of 8 keys x 32 dims, transposed, are the B operands of 4 independent products.
      unsigned v[4];
      load_fragments<true>(v, lane_values + d * kChunkBytes, kDTiles - d);
#pragma unroll
      for (int i = 0; i < (kDTiles - d < 4 ? kDTiles - d : 4); ++i)
#pragma unroll
        for (int m = 0; m < kMTiles; ++m) {
          Element::multiply_add(acc_o_[m][d + i], p[m][0], p[m][1], v[i]);
          meanwhile(product++);
        }
    }
  }

  // Of the warp's dims of a tile: where the lane's row of ldmatrix's four lies, which stand side by side.
  __device__ __forceinline__ int lane_matrices() const {
    return lane_ % 8 * kPitch + lane_ / 8 * kChunkBytes + place_.first_dim() * kElementBytes;
  }

  // 8 rows x 32 dims, matrix i has dims 8i and on; where there are fewer the first two.
  template <bool kTransposes>
  static __device__ __forceinline__ void load_fragments(unsigned (&b)[4], SharedAddress address, int matrices) {
    if (matrices >= 4) {
      if constexpr (kTransposes)
        ldmatrix_x4_trans(b, address);
      else
        ldmatrix_x4(b, address);
      return;
    }
    unsigned two[2];
    if constexpr (kTransposes)
      ldmatrix_x2_trans(two, address);
    else
      ldmatrix_x2(two, address);
    b[0] = two[0];
    b[1] = two[1];
  }

  // ---- between the sharers ----

  // Where lanes have the words of a warp's 8 rows of a tile: what a sharer has made of the scores, element c, and P.
  __device__ __forceinline__ SharedAddress partial_at(int tile, int warp, int part, int c) const {
    return Tile::kPartials + turn(tile) * Tile::kPartialBytes + ((warp * kSharers + part) * 2 + c) * Tile::kWordBytes +
           4 * lane_;
  }
  __device__ __forceinline__ SharedAddress probabilities_at(int tile, int warp) const {
    return Tile::kProbabilities + turn(tile) * Tile::kProbabilityBytes + warp * Tile::kWordBytes + 4 * lane_;
  }
  static __device__ __forceinline__ SharedAddress factor_at(int tile, int row) {
    return Tile::kFactors + turn(tile) * Tile::kFactorBytes + 4 * row;
  }

  // Partial scores of tile n to the warps whose rows they are.
  __device__ __forceinline__ void hand_over(const Accumulator<kMTiles, 1>& acc_s) {
#pragma unroll
    for (int r = 0; r < 2 * kMTiles; ++r)
#pragma unroll
      for (int c = 0; c < 2; ++c)
        store_shared_f32(partial_at(n_, place_.sharer(r), place_.part, c), acc_s[r / 2][0][r % 2 * 2 + c]);
  }
  __device__ __forceinline__ void add_up(float (&s)[2], int tile) const {
#pragma unroll
    for (int c = 0; c < 2; ++c) s[c] = load_shared_f32(partial_at(tile, place_.warp, 0, c));
#pragma unroll
    for (int part = 1; part < kSharers; ++part)
#pragma unroll
      for (int c = 0; c < 2; ++c) s[c] += load_shared_f32(partial_at(tile, place_.warp, part, c));
  }

  // From the products of the warp's 8 rows and a tile to their P. Returns whether the row's maximum rises.
  template <bool kIsMasked>
  __device__ __forceinline__ bool to_probabilities(float (&s)[2], int tile) {
    to_scores(s, tile);
    if constexpr (kIsMasked) apply_mask(s, tile);
    const float largest = Rows::across_row(max_ignoring_nan(s[0], s[1])), before = softmax_.row_max[0];
    const bool rises = softmax_.exponent(largest, 0) > kMaxRise;
    const float remainder = softmax_.raise(rises ? largest : -infinity(), 0);
    const float factor = exp2_approx(before - softmax_.row_max[0]);
    float t[2];
#pragma unroll
    for (int c = 0; c < 2; ++c) t[c] = exp2_approx(softmax_.exponent(s[c], 0) - remainder);
    softmax_.row_sum[0] = softmax_.row_sum[0] * factor + (t[0] + t[1]);
    drop(t, tile);
    store_shared_4B(probabilities_at(tile, place_.warp), Element::pack(t[0], t[1]));
    if (lane_column(lane_) == 0) store_shared_f32(factor_at(tile, place_.own_row() + lane_row(lane_)), factor);
    return rises;
  }

  // As the functions of this name do for more rows and columns.
  __device__ __forceinline__ void to_scores(float (&s)[2], int tile) const {
#pragma unroll
    for (int c = 0; c < 2; ++c)
      s[c] = variant_.bias(variant_.score(s[c], lane_query(), lane_key(tile) + c), fetched_, c, block_.sequence,
                           lane_query(), lane_key(tile) + c);
  }
  __device__ __forceinline__ void apply_mask(float (&s)[2], int tile) const {
    const int first = block_.sequence.first_key(lane_query()), end = block_.sequence.end_key(lane_query());
#pragma unroll
    for (int c = 0; c < 2; ++c)
      if (const int key = lane_key(tile) + c; key >= end || (Traits::kIsLocal && key < first)) s[c] = -infinity();
  }

  // Dropout is made for the 16 rows of which the warp has one half.
  __device__ __forceinline__ void drop(float (&p)[2], int tile) {
    if constexpr (Traits::kHasDropout) {
      dropout_.make(block_.m_begin + place_.own_row() / 16 * 16, tile * Traits::kBlockN, lane_);
      const typename Dropout::Kept kept = dropout_.get(0, lane_);
      const bool is_lower = place_.own_row() % 16 != 0;
#pragma unroll
      for (int c = 0; c < 2; ++c)
        if (!(is_lower ? Dropout::keeps(kept, 1, 0, c) : Dropout::keeps(kept, 0, 0, c))) p[c] = 0.0f;
    }
  }

  // O by the factors of a tile.
  __device__ __forceinline__ void correct(int tile) {
#pragma unroll
    for (int r = 0; r < 2 * kMTiles; ++r) {
      const float factor = load_shared_f32(factor_at(tile, place_.shared_row() + lane_row(lane_) + 8 * r));
      for_each_in_row(acc_o_, r, [&](float& o, int) { o *= factor; });
    }
  }

  // The lane's row, and its first key of a tile.
  __device__ __forceinline__ int lane_query() const { return block_.m_begin + place_.own_row() + lane_row(lane_); }
  __device__ __forceinline__ int lane_key(int tile) const { return tile * Traits::kBlockN + Columns::first(lane_); }

  // ---- the output ----

  // out = O / row_sum.
  __device__ __forceinline__ void write_out() {
    const BlockInfo<Traits> block(params_, reread_block_in_grid());
    const int thread = reread_thread_in_block(), lane = thread % 32;
    const Place place(thread / 32);
    // Behind the last iteration's barrier nobody reads factors or slots.
    const int own_row = place.own_row() + lane_row(lane);
    float own = finish_row<Variant::kMayHideRows>(params_, block, block.m_begin + own_row, softmax_.row_max[0],
                                                  softmax_.total(0), lane_column(lane) == 0);
    if constexpr (Traits::kHasDropout) own *= params_.dropout.scale;
    if (lane_column(lane) == 0) store_shared_f32(factor_at(0, own_row), own);
    block_barrier();
    float inverse[2 * kMTiles];
#pragma unroll
    for (int r = 0; r < 2 * kMTiles; ++r)
      inverse[r] = load_shared_f32(factor_at(0, place.shared_row() + lane_row(lane) + 8 * r));
    const int row = block.m_begin + place.shared_row();
    const TensorStrides& strides = params_.out_strides;
    Bits* out = static_cast<Bits*>(params_.out) + block.sequence.query_offset(strides, block.head) + row * strides.row;
    Tile::Output::template write<MemoryOrder>(acc_o_, inverse, out, strides.row, block.sequence.seqlen_q() - row,
                                              place.first_dim(), place.warp * Tile::kStagingWarpBytes, lane);
  }

  const FlashFwdParams& params_;
  const BlockInfo<Traits> block_;
  const int lane_;
  const Place place_;
  Rows softmax_;
  Variant variant_;
  Dropout dropout_;
  typename Variant::template Fetched<2, Columns::Keys::kAtOnce> fetched_;  // for the next scores
  Stream k_stream_, v_stream_;
  typename Tile::QueryFragments query_;
  TileRange of_rows_;
  int n_;
  InFlight in_flight_;  // V(n+1), then K(n-1)
  Accumulator<kMTiles, kDTiles> acc_o_ = {};
};

template <class Traits>
__device__ __forceinline__ void flash_fwd_wide(const FlashFwdParams& params) {
  FlashFwdWide<Traits>(params).run();
}
