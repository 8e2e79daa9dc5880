// Backward attention, the kernels that make gradients out of products:
//
//   S = scale Q K^T     P = exp(S - lse)     dP = dO V^T     dS = P (dP - delta) scale
//   dQ = dS K           dK = dS^T Q          dV = P^T dO
//
// Score features change S and with it dS: see score_feature.cuh.
//
// A block owns kBlockM rows of one side: queries for dQ, keys for dK and dV (see flash_bwd_side.cuh). A warp has 16 or
// 32 of them, and keeps their two matrices (Q and dO, or K and V) as A operands. The other side comes in tiles of
// kBlockN columns, last tile first, through a ring of three slots in shared memory. With rows as the M side, P and dS
// leave their products in the layout that the next ones take as A operand (see primitives.cuh): they stay in registers.
//
//   step j (8 columns):  S(j), dP(j)                          meanwhile   P(j-1), dS(j-1)
//                        gradients += dS(j-1), P(j-1) times columns of step j-1
//
// dK and dV of a group's query heads are summed in the same accumulators, one head after the other. A block that has
// all keys of its sequence makes dQ, too: see flash_bwd_all_keys.cuh.
#pragma once

#include "accumulator.cuh"
#include "block_mask.cuh"
#include "column_fragments.cuh"
#include "dropout.cuh"
#include "flash_bwd_all_keys.cuh"
#include "flash_bwd_params.cuh"
#include "flash_bwd_side.cuh"
#include "gradient_scale.cuh"
#include "primitives.cuh"
#include "query_statistics.cuh"
#include "row_fragments.cuh"
#include "row_output.cuh"
#include "schedule.cuh"
#include "score_variant.cuh"
#include "sequence.cuh"
#include "shown_keys.cuh"
#include "tile_copy.cuh"

// What makes dQ beside the rows' gradients, or nothing.
template <bool kMakesDq, class Traits, class Tile>
struct DqOf {
  struct Type {
    static constexpr bool kKeepsKeys = false;
    static constexpr int kDsBytes = 0, kStagingWarpBytes = 0;
  };
};
template <class Traits, class Tile>
struct DqOf<true, Traits, Tile> {
  using Type = AllKeysDq<Traits, Tile>;
};

template <class Traits>
struct FlashBwdTile {
  using Side = typename SideOf<Traits, Traits::kRowSide>::Type;
  // Above 128, 16 rows of both dK and dV would take all of a thread's registers: a block makes half of the head dims of
  // each.
  static constexpr int kOutputSplits = Side::kMakesDv && Traits::kHeadDim + Traits::kHeadDimV > 256 ? 2 : 1;
  static constexpr int kDims = Traits::kTileDims, kValueDims = Traits::kTileDimsV;
  static constexpr int kOutputDims = kDims / kOutputSplits, kValueOutputDims = kValueDims / kOutputSplits;
  static constexpr int kRowsPerWarp = Traits::kBlockM / Traits::kNWarps;
  static constexpr int kMTiles = kRowsPerWarp / 16;
  static constexpr int kSteps = Traits::kBlockN / 8;
  static constexpr int kThreads = Traits::kNWarps * 32;
  // dQ needs all of K in shared memory, so that S reads its rows from there, too.
  using SFragments = RowFragments<Traits, kRowsPerWarp, kDims, Side::kMakesDq ? 0 : kRegisterDimsOf<Traits, kDims>>;
  using DpFragments = RowFragments<OfValues<Traits>, kRowsPerWarp, kValueDims, kRegisterDimsOf<Traits, kValueDims>>;
  using Output = RowOutput<Traits, kRowsPerWarp, kOutputDims>;
  using ValueOutput = RowOutput<OfValues<Traits>, kRowsPerWarp, kValueOutputDims>;

  // Shared memory: three slots of (tile of S's columns, tile of dP's columns, statistics, dS for dQ), then each warp's
  // rows beyond the dims in registers, then where dQ passes through. Iteration n reads tiles n+1 (for its first step)
  // and n, and commits tile n-1 before its barrier, which stands behind that first step; behind it dQ reads the dS of
  // tile n+1.
  static constexpr int kSlots = 3;
  static constexpr int kSTileBytes = Traits::kBlockN * row_pitch(kDims);
  static constexpr int kTileBytes = kSTileBytes + Traits::kBlockN * row_pitch(kValueDims);  // of both
  static constexpr int kColumnBytes = Side::kColumnsAreQueries ? Traits::kBlockN * kStatisticsBytes : 0;
  using Dq = typename DqOf<Side::kMakesDq, Traits, FlashBwdTile>::Type;
  static constexpr int kDsBegin = kTileBytes + kColumnBytes;  // in a slot
  static constexpr int kSlotBytes = kDsBegin + Dq::kDsBytes;
  static constexpr int kStagingWarpBytes = Side::kMakesDv && ValueOutput::kStagingBytes > Output::kStagingBytes
                                               ? ValueOutput::kStagingBytes
                                               : Output::kStagingBytes;
  static_assert(DpFragments::kStagingBytes <= kStagingWarpBytes, "rows are staged in less than gradients");
  static constexpr int kStagingBytes = Traits::kNWarps * kStagingWarpBytes;
  static constexpr int kRowsBegin = kSlots * kSlotBytes > kStagingBytes ? kSlots * kSlotBytes : kStagingBytes;
  static constexpr int kWarpRowsBytes = SFragments::kSharedBytes + DpFragments::kSharedBytes;
  static constexpr int kDqStagingBegin = kRowsBegin + Traits::kNWarps * kWarpRowsBytes;
  static constexpr int kSharedBytes = kDqStagingBegin + Traits::kNWarps * Dq::kStagingWarpBytes;

  // Where 16 rows of S's from `row` on lie, if they are in shared memory.
  static __device__ __forceinline__ SharedAddress s_row(int row) {
    return kRowsBegin + row / kRowsPerWarp * kWarpRowsBytes + row % kRowsPerWarp * row_pitch(kDims);
  }
};

template <class Traits>
class FlashBwd {
  using Tile = FlashBwdTile<Traits>;
  using Element = typename Traits::Element;
  using Bits = typename Traits::Stored::Bits;
  using Matrix = GlobalMatrix<typename Traits::Stored>;
  using Side = typename Tile::Side;
  static constexpr int kMTiles = Tile::kMTiles, kSteps = Tile::kSteps;
  static constexpr int kDTiles = Tile::kDims / 8, kDpDTiles = Tile::kValueDims / 8;
  static constexpr int kRowSteps = (kDTiles + 1) / 2;
  static constexpr int kOutputDTiles = Tile::kOutputDims / 8, kValueOutputDTiles = Tile::kValueOutputDims / 8;
  static constexpr int kProducts =  // of an iteration's gradients
      kSteps * kMTiles * (kOutputDTiles + (Side::kMakesDv ? kValueOutputDTiles : 0));

  // Where numbers of pairs are read, a lane's keys are neighbours, in rows or columns; but for dQ's sake they have to
  // lie as in memory.
  using Variant = ScoreVariant<Traits>;
  static constexpr bool kNeighbours = kReadsNeighbours<Traits> && !Side::kMakesDq;
  using Rows = RowOrder<kNeighbours && Side::kColumnsAreQueries, kMTiles>;
  using Columns = ColumnOrder<kNeighbours && !Side::kColumnsAreQueries, kSteps>;

  // A query row's numbers are fetched a tile at a time, so that starting with them would free nothing.
  static constexpr bool kStartsScores = Variant::kStartsScores && Side::kColumnsAreQueries;

  // Of a query row the keys of a tile's columns, once a tile; of two query columns the keys of the rows, once a step.
  // Where it is the same for all queries, of one row once a tile, and of one column once a head.
  static constexpr int kFetchedQueries = Variant::kIsOneRow ? 1 : Side::kColumnsAreQueries ? 2 : 2 * kMTiles;
  static constexpr int kFetchedKeys = Side::kColumnsAreQueries ? 2 * kMTiles : 2 * kSteps;
  using Fetched = typename Variant::template Fetched<kFetchedKeys, kNeighbours>[kFetchedQueries];

  // Does dS take P as dV does? No matter: where P is above 1 its row has dP = delta. But ptxas schedules as if it were:
  // head dim 64 reaches 0.933 of a T4's peak so, and 0.883 otherwise; 128, causal, 0.738 so, and 0.797 otherwise. Where
  // tiles are converted it is the other way round (64, causal, reaches 0.753 so and 0.891 otherwise, 128 0.759 and
  // 0.754), but for causal kernels of few dims: 112 reaches 0.721 so and 0.755 otherwise.
  // With numbers from memory it is too large where float32 has no digits left for a score: see kLeastLse. What
  // softmax_lse's gradient adds to delta is multiplied by a P above 1, by as much as log_sum_exp() took from lse.
  static constexpr bool kSaturatesForDs =
      (kConverts<Traits> ? kMTiles == 1 && (!Traits::kIsCausal || Tile::kDims > 112) : kMTiles == 2) ||
      Variant::kMayHideRows;

  // Where tiles of many dims are converted, are statistics committed between them, and does ptxas know that gradients
  // are scaled alike in all of a block? Those too are its matter. Head dim 128 reaches 0.759 of a T4's peak with the
  // former and 0.745 without, with groups of 4 heads 0.746 with both and 0.722 with the former alone; causal 0.771 with
  // the latter alone and 0.764 with both, with such groups 0.759 with the former alone and 0.726 with both.
  static constexpr bool kConvertsManyDims = kConverts<Traits> && Tile::kDims >= 112 && Tile::kOutputSplits == 1;
  static constexpr bool kHasGroups = Traits::kGroupSize > 1;
  static constexpr bool kCommitsStatisticsBetween =
      kConvertsManyDims && !(Traits::kIsCausal && !kHasGroups && Tile::kDims > 120);
  static constexpr bool kTellsThatScaleIsUniform =
      kConvertsManyDims && !(Traits::kIsCausal && kHasGroups) && Tile::kDims > 112;

  // How tiles are converted: with 32 rows a warp head dim 64 reaches 0.903 so and 0.895 otherwise.
  static constexpr bool kConvertsOtherwise = Side::kColumnsAreQueries && kMTiles == 2;
  static constexpr Conversion kSConversion = kConvertsOtherwise ? Conversion::kPermuting : Conversion::kPlain;
  static constexpr Conversion kDpConversion = kConvertsOtherwise ? Conversion::kLastWordFirst : Conversion::kPlain;

  // Tiles that a block mask lists, or all of a range.
  static constexpr bool kHasBlockMask = Traits::kHasBlockMask;

  using Dropout = DropoutOf<Traits, Side::kColumnsAreQueries, kMTiles, kSteps, kNeighbours>;

  using Products = Accumulator<kMTiles, 1>;  // S or dP of a step
  using Operands = unsigned[kMTiles][2];     // P or dS of a step, rounded to elements
  using DsGradient = Accumulator<kMTiles, kOutputDTiles>;
  using PGradient = Accumulator<kMTiles, kValueOutputDTiles>;
  using Points = Schedule<Traits, kProducts>;
  using SStream = typename Traits::Copy::template Stream<Traits, Traits::kBlockN, Tile::kDims, Tile::kThreads>;
  using DpStream =
      typename Traits::Copy::template Stream<OfValues<Traits>, Traits::kBlockN, Tile::kValueDims, Tile::kThreads>;

  // What a thread has of a tile between prefetch and commit, as it lies in memory: nothing waits for it in between.
  struct InFlight {
    typename SStream::InFlight s_columns;
    typename DpStream::InFlight dp_columns;
    float lse, delta;
  };

 public:
  __device__ __forceinline__ explicit FlashBwd(const FlashBwdParams& params) : params_(params) {
    locate(thread_in_block(), block_in_grid());
  }

  __device__ __forceinline__ void run() {
    if (Traits::kIsVarlen && row_begin_ >= seqlen_rows()) {
      if constexpr (Side::kMakesDq) write_without_keys();
      return;
    }
    for_each(ds_gradient_, [](float& gradient, int, int) { gradient = 0.0f; });
    if (Side::kMakesDv) for_each(p_gradient_, [](float& gradient, int, int) { gradient = 0.0f; });
    if (!sees_rows()) return write_out();
    const TileRange columns = column_tiles();
    if (columns.begin < columns.end) {
      if constexpr (kConverts<Traits> && Side::kColumnsAreQueries) find_scale(columns);
      load_rows();
      for (int i = 0; i < Side::kQueryHeads; ++i) {
        locate(reread_thread_in_block(), reread_block_in_grid());
        attend(head_ * Side::kQueryHeads + i);
      }
    }
    write_out();
    if constexpr (Side::kMakesDq) write_dq_of_unseen(columns);
  }

 private:
  // Which rows of which head are this warp's. Called again, with indices read anew, wherever they are needed after
  // the main loop: keeping them would take registers from it. As `thread` is unsigned, what divides a lane is a mask.
  __device__ __forceinline__ void locate(unsigned thread, int block) {
    lane_ = thread % 32;
    warp_ = thread / 32;
    const int split_block = block / Tile::kOutputSplits;
    const int order = split_block % params_.num_row_blocks;
    const int batch_head = split_block / params_.num_row_blocks;
    first_output_dim_ = block % Tile::kOutputSplits * Tile::kOutputDims;
    const int heads = Side::heads(params_);
    row_begin_ = (Side::kLastRowsFirst ? params_.num_row_blocks - 1 - order : order) * Traits::kBlockM;
    head_ = batch_head % heads;
    sequence_ = Sequence<Traits>(params_, batch_head / heads);
  }

  // Of dV, where first_output_dim_ is of dK.
  __device__ __forceinline__ int first_value_dim() const {
    if constexpr (Tile::kOutputDims == Tile::kValueOutputDims) return first_output_dim_;
    return first_output_dim_ > 0 ? Tile::kValueOutputDims : 0;
  }

  // Whether a mask of keys shows some of the block's, where they are its rows.
  __device__ __forceinline__ bool sees_rows() const {
    if constexpr (!Variant::kHidesKeys || !Side::kColumnsAreQueries || Side::kMakesDq) return true;
    bool is_shown = false;
    for (int i = 0; i < Side::kQueryHeads; ++i) {
      Variant variant;
      variant.prepare(params_, sequence_, head_ * Side::kQueryHeads + i, 1.0f);
      for (int row = reread_thread_in_block(); row < Traits::kBlockM; row += Tile::kThreads)
        is_shown |= variant.shows_key(sequence_, row_begin_ + row);
    }
    return any_in_block(is_shown);
  }

  // ---- what gradients are scaled by: see gradient_scale.cuh ----

  // That of all queries whose gradients the block adds up.
  __device__ __forceinline__ void find_scale(const TileRange& columns) {
    if constexpr (Side::kMakesDq) {
      for (int i = 0; i < Side::kQueryHeads; ++i)
        Tile::Dq::write_delta(tensors(), head_ * Side::kQueryHeads + i, warp_, lane_);
      block_barrier();
    }
    const int begin = columns.begin * Traits::kBlockN;
    const int end = Sequence<Traits>::minimum(columns.end * Traits::kBlockN, seqlen_columns());
    float peak = 0.0f;
    for (int i = 0; i < Side::kQueryHeads; ++i)
#pragma unroll 4
      for (int query = begin + thread_in_block(); query < end; query += Tile::kThreads)
        peak = max_ignoring_nan(
            peak, load_peak(params_, sequence_.statistics_offset(head_ * Side::kQueryHeads + i, query), true));
    scale_ = GradientScale<Traits>(greatest_in_block<Traits::kNWarps>(peak));
    if constexpr (kTellsThatScaleIsUniform) scale_.take_from_first_lane();
  }

  // That of the warp's rows, where these are queries. Found twice: keeping it would take a register from the main loop.
  __device__ __forceinline__ void find_scale_of_rows() {
    float peak = 0.0f;
#pragma unroll
    for (int r = 0; r < 2 * kMTiles; ++r) {
      const int row = lane_row(r);
      peak = max_ignoring_nan(peak,
                              load_peak(params_, sequence_.statistics_offset(head_, row), row < sequence_.seqlen_q()));
    }
    scale_ = GradientScale<Traits>(greatest_in_warp<4>(peak));
  }

  // ---- memory ----

  __device__ __forceinline__ FlashBwdTensors<Traits> tensors() const { return {params_, sequence_}; }
  __device__ __forceinline__ int seqlen_rows() const { return Side::seqlen_rows(sequence_); }
  __device__ __forceinline__ int seqlen_columns() const { return Side::seqlen_columns(sequence_); }
  __device__ __forceinline__ TileRange column_tiles() const {
    return Side::column_tiles(sequence_, row_begin_, Traits::kBlockM);
  }

  __device__ __forceinline__ int first_row() const { return row_begin_ + warp_ * Tile::kRowsPerWarp; }

  __device__ __forceinline__ void load_rows() {
    const Matrix s_rows = Side::s_rows(tensors(), head_), dp_rows = Side::dp_rows(tensors(), head_);
    const SharedAddress staging = warp_ * Tile::kStagingWarpBytes;
    const SharedAddress rows = Tile::kRowsBegin + warp_ * Tile::kWarpRowsBytes;
    if constexpr (kConverts<Traits> && !Side::kColumnsAreQueries) find_scale_of_rows();
    s_rows_.template load<Rows>(s_rows, first_row(), seqlen_rows(), params_.sign, lane_, staging, rows);
    dp_rows_.template load<Rows>(dp_rows, first_row(), seqlen_rows(), 0, lane_, staging,
                                 rows + Tile::SFragments::kSharedBytes, 0,
                                 Side::kColumnsAreQueries ? 1.0f : scale_.factor());
    if (!Side::kColumnsAreQueries) {
#pragma unroll
      for (int r = 0; r < 2 * kMTiles; ++r) {
        float lse, delta;
        const int row = lane_row(r);
        load_statistics<Variant>(params_, sequence_.statistics_offset(head_, row), row < sequence_.seqlen_q(), lse,
                                 delta);
        row_statistics_[r / 2].lse[r % 2] = scaled_lse(lse);
        row_statistics_[r / 2].delta[r % 2] = scaled_delta(delta);
      }
    }
    block_barrier();  // every warp has its rows out of the slots' memory
    if constexpr (Side::kMakesDq) {
      dq_.load_keys(warp_, lane_);
      if constexpr (Tile::Dq::kKeepsKeys)
#pragma unroll
        for (int step = 0; step < kRowSteps; ++step) s_rows_.get(kept_s_rows_[step], step);
    }
  }

  __device__ __forceinline__ void get_s_rows(typename Tile::SFragments::Step& fragment, int step) const {
    if constexpr (Tile::Dq::kKeepsKeys) {
#pragma unroll
      for (int m = 0; m < kMTiles; ++m)
#pragma unroll
        for (int i = 0; i < (kDTiles % 2 != 0 && 2 * step + 1 == kDTiles ? 2 : 4); ++i)
          fragment[m][i] = kept_s_rows_[step][m][i];
    } else {
      s_rows_.get(fragment, step);
    }
  }

  // As they are multiplied.
  static __device__ __forceinline__ float scaled_lse(float lse) { return lse * kLog2E; }
  __device__ __forceinline__ float scaled_delta(float delta) const {
    return delta * params_.softmax_scale * scale_.factor();
  }

  // The tile whose last step waits, that of the next iteration, and the one that this prefetches. Iteration 0
  // prefetches tile 0 once more and does not use it: that costs less than a branch.
  __device__ __forceinline__ int waiting_tile() const {
    if constexpr (kHasBlockMask) return listed_.previous();
    return n_block_;
  }
  __device__ __forceinline__ int tile() const {
    if constexpr (kHasBlockMask) return listed_.current();
    return n_block_ - 1;
  }
  __device__ __forceinline__ int prefetched_tile() const {
    if constexpr (kHasBlockMask) return listed_.next();
    return n_block_ > 1 ? n_block_ - 2 : 0;
  }
  __device__ __forceinline__ void leave_tile() {
    --n_block_;
    if constexpr (kHasBlockMask) listed_.step();
  }

  __device__ __forceinline__ void advance() {
    if constexpr (kHasBlockMask) {
      const int tiles = listed_.next() - listed_.current();
      s_columns_.go_to(tiles);
      dp_columns_.go_to(tiles);
      column_offset_ += tiles * Traits::kBlockN;
      return;
    }
    if (n_block_ > 1) {
      s_columns_.advance();
      dp_columns_.advance();
      column_offset_ -= Traits::kBlockN;
    }
  }

  static __device__ __forceinline__ bool has_column() { return thread_in_block() < Traits::kBlockN; }

  // A tile that is whole, but those that are listed come in any order.
  __device__ __forceinline__ void prefetch(InFlight& in, SharedAddress slot) {
    advance();
    if constexpr (kHasBlockMask) return prefetch_bounded(in, slot, prefetched_tile());
    s_columns_.prefetch(in.s_columns, slot);
    dp_columns_.prefetch(in.dp_columns, slot + Tile::kSTileBytes);
    if (Side::kColumnsAreQueries) load_statistics<Variant>(params_, column_offset_, has_column(), in.lse, in.delta);
  }

  // The same where it may be the last tile, which need not be whole.
  __device__ __forceinline__ void prefetch_bounded(InFlight& in, SharedAddress slot, int tile) {
    const int columns = seqlen_columns() - tile * Traits::kBlockN;
    s_columns_.prefetch_bounded(in.s_columns, slot, columns);
    dp_columns_.prefetch_bounded(in.dp_columns, slot + Tile::kSTileBytes, columns);
    if (Side::kColumnsAreQueries)
      load_statistics<Variant>(params_, column_offset_, has_column() && thread_in_block() < columns, in.lse, in.delta);
  }

  __device__ __forceinline__ void commit(const InFlight& in, SharedAddress slot) const {
    SStream::template commit<Columns, kSConversion>(in.s_columns, slot);
    if constexpr (kCommitsStatisticsBetween) commit_statistics(in, slot);
    DpStream::template commit<Columns, kDpConversion>(in.dp_columns, slot + Tile::kSTileBytes,
                                                      Side::kColumnsAreQueries ? scale_.factor() : 1.0f);
    if constexpr (!kCommitsStatisticsBetween) commit_statistics(in, slot);
    block_barrier();
  }

  __device__ __forceinline__ void commit_statistics(const InFlight& in, SharedAddress slot) const {
    if (Side::kColumnsAreQueries && has_column())
      store_statistics(slot + Tile::kTileBytes, thread_in_block(), scaled_lse(in.lse), scaled_delta(in.delta));
  }

  static __device__ __forceinline__ SharedAddress next_slot(SharedAddress slot) {
    return slot == (Tile::kSlots - 1) * Tile::kSlotBytes ? 0 : slot + Tile::kSlotBytes;
  }

  // ---- the products of a step: 8 columns ----

  // S and dP go over as many dims.
  static constexpr bool kHaveSameDims = kDTiles == kDpDTiles;
  static constexpr int kMostDTiles = kDTiles > kDpDTiles ? kDTiles : kDpDTiles;

  // S and dP of a step of the tile in `slot`, the next one.
  __device__ __forceinline__ void scores(SharedAddress slot, int step) {
    start_scores(step);
#pragma unroll
    for (int d = 0; d < kMostDTiles; d += 4) {
      unsigned s_columns[4], dp_columns[4];
      if (kHaveSameDims || d < kDTiles) load_columns<Tile::kDims>(s_columns, slot, step, d, lane_);
      if (kHaveSameDims || d < kDpDTiles)
        load_columns<Tile::kValueDims>(dp_columns, slot + Tile::kSTileBytes, step, d, lane_);
#pragma unroll
      for (int i = 0; i < (kMostDTiles - d < 4 ? kMostDTiles - d : 4); i += 2) {
        typename Tile::DpFragments::Step s_rows, dp_rows;
        if (kHaveSameDims || d + i < kDTiles) get_s_rows(s_rows, (d + i) / 2);
        if (kHaveSameDims || d + i < kDpDTiles) dp_rows_.get(dp_rows, (d + i) / 2);
#pragma unroll
        for (int half = 0; half < (kMostDTiles % 2 != 0 && kMostDTiles - d - i < 2 ? 1 : 2); ++half)
#pragma unroll
          for (int m = 0; m < kMTiles; ++m) {
            if (kHaveSameDims || d + i + half < kDTiles)
              multiply<kStartsScores>(acc_s_[m][0], s_rows[m], half, s_columns[i + half], d + i + half);
            if (kHaveSameDims || d + i + half < kDpDTiles)
              multiply<false>(acc_dp_[m][0], dp_rows[m], half, dp_columns[i + half], d + i + half);
          }
      }
    }
  }

  template <bool kIsStarted>
  static __device__ __forceinline__ void multiply(float (&acc)[4], const unsigned (&a)[4], int half, unsigned b,
                                                  int d) {
    if (d == 0 && !kIsStarted)
      Element::multiply(acc, a[0], a[1], b);
    else
      Element::multiply_add(acc, a[2 * half], a[2 * half + 1], b);
  }

  // What the scores of a step of tile n need from memory, where it was not fetched with the tile's first step. Behind
  // tile 0 nothing is needed, and its own comes once more. `kIsWhole`: all columns of the tile exist.
  template <bool kIsWhole>
  __device__ __forceinline__ void fetch_pairs(int n, int step, bool is_first = false) {
    if constexpr (Variant::kReadsPairs) {
      if (!Side::kColumnsAreQueries && step > 0) return;
      if (Side::kColumnsAreQueries && Variant::kIsOneRow && !is_first) return;
      if (n < 0) n = 0;
#pragma unroll
      for (int i = 0; i < kFetchedQueries; ++i)
        if constexpr (Side::kColumnsAreQueries)
          variant_.template fetch<typename Rows::Keys, kFetchedKeys, kIsWhole, false>(
              fetched_[i], sequence_, lane_column(n, step) + i, lane_row(0));
        else
          variant_.template fetch<typename Columns::Keys, kFetchedKeys, false, kIsWhole>(
              fetched_[i], sequence_, lane_row(i), lane_column(n, 0));
    }
  }

  // Before a step's scores where they do not start from it, and else behind those of the step before.
  template <bool kIsWhole>
  __device__ __forceinline__ void fetch_pairs_before(int step) {
    if constexpr (!kStartsScores) fetch_pairs<kIsWhole>(n_block_ - 1, step);
  }
  template <bool kIsWhole>
  __device__ __forceinline__ void fetch_pairs_behind(int step) {
    if constexpr (!kStartsScores) return;
    if (step + 1 < kSteps)
      fetch_pairs<kIsWhole>(n_block_ - 1, step + 1);
    else
      fetch_pairs<kIsWhole>(n_block_ - 2, 0);
  }

  // Where the lane's pair in row r and column c of a step lies in what was fetched for it.
  static __device__ __forceinline__ constexpr int fetched_query(int r, int c) {
    return Variant::kIsOneRow ? 0 : Side::kColumnsAreQueries ? c : r;
  }
  static __device__ __forceinline__ constexpr int fetched_key(int r, int step, int c) {
    return Side::kColumnsAreQueries ? r : 2 * step + c;
  }

  __device__ __forceinline__ void start_scores(int step) {
    if constexpr (kStartsScores)
      for_each(acc_s_, [&](float& s, int r, int c) {
        const int row = lane_row(r), column = lane_column(n_block_ - 1, step) + c;
        s = variant_.bias(0.0f, fetched_[fetched_query(r, c)], fetched_key(r, step, c), sequence_,
                          Side::query(row, column), Side::key(row, column));
      });
  }

  __device__ __forceinline__ float dp_scale() const {
    if constexpr (Traits::kHasDropout) return params_.dropout.dp_scale;
    return params_.softmax_scale;
  }

  // Before P and dS of a step of tile n.
  __device__ __forceinline__ void keep(int n, int step) {
    if constexpr (Traits::kHasDropout) {
      if (step == 0) dropout_.make(first_row(), n * Traits::kBlockN, lane_);
      if (Dropout::begins_group(step)) kept_ = dropout_.get(Dropout::group(step), lane_);
    }
  }

  // P and dS of a step of tile n, which lies in `slot`, from its S and dP.
  __device__ __forceinline__ void differentiate(const Products& s, const Products& dp, const Products& derivative,
                                                const Fetched& fetched, int n, SharedAddress slot, int step,
                                                Operands& p, Operands& ds) {
    keep(n, step);
    Statistics columns;
    if (Side::kColumnsAreQueries) columns = load_statistics_pair(slot + Tile::kTileBytes, step * 4 + lane_ % 4);
#pragma unroll
    for (int r = 0; r < 2 * kMTiles; ++r) {
      float row_p[2], row_ds[2];
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const float lse = Side::kColumnsAreQueries ? columns.lse[c] : row_statistics_[r / 2].lse[r % 2];
        const float delta = Side::kColumnsAreQueries ? columns.delta[c] : row_statistics_[r / 2].delta[r % 2];
        const float score = s[r / 2][0][r % 2 * 2 + c];
        const int row = lane_row(r), column = lane_column(n, step) + c;
        float exponent = fma_rounded(score, exponent_scale<Variant>(params_), -lse);
        if constexpr (!kStartsScores)
          exponent = variant_.bias(exponent, fetched[fetched_query(r, c)], fetched_key(r, step, c), sequence_,
                                   Side::query(row, column), Side::key(row, column));
        const float p_of_ds = exp2_approx(exponent);
        row_p[c] = Side::kMakesDv || Variant::kMayHideRows ? saturate(p_of_ds) : p_of_ds;  // see log_sum_exp()
        float dp_less_delta = fma_rounded(dp[r / 2][0][r % 2 * 2 + c], dp_scale(), -delta);
        const bool keeps = Dropout::keeps(kept_, r, step, c);
        if (!keeps) dp_less_delta = -delta;
        row_ds[c] = variant_.gradient((kSaturatesForDs ? row_p[c] : p_of_ds) * dp_less_delta, score);
        if constexpr (Variant::kHasDerivative) row_ds[c] *= derivative[r / 2][0][r % 2 * 2 + c];
        if (!keeps) row_p[c] = 0.0f;
      }
      p[r / 2][r % 2] = Element::pack(row_p[0], row_p[1]);
      ds[r / 2][r % 2] = pack_ds(row_ds[0], row_ds[1]);
    }
  }

  // Where dout is scaled here, nobody would see that it was by too much.
  static __device__ __forceinline__ unsigned pack_ds(float lo, float hi) {
    return kConverts<Traits> ? Element::pack_toward_zero(lo, hi) : Element::pack(lo, hi);
  }

  // gradient += operands x the step's columns of a tile.
  template <int kTileDims, int kTiles, class Meanwhile>
  __device__ __forceinline__ void accumulate(Accumulator<kMTiles, kTiles>& gradient, const Operands& operands,
                                             SharedAddress tile, int step, Meanwhile meanwhile) {
#pragma unroll
    for (int d = 0; d < kTiles; d += 4) {
      unsigned b[4];
      load_columns_transposed<kTiles>(b, tile, row_pitch(kTileDims), step, d, lane_);
#pragma unroll
      for (int i = 0; i < (kTiles - d < 4 ? kTiles - d : 4); ++i)
#pragma unroll
        for (int m = 0; m < kMTiles; ++m) {
          Element::multiply_add(gradient[m][d + i], operands[m][0], operands[m][1], b[i]);
          meanwhile();
        }
    }
  }

  // dQ or dK from dS and the columns of S, dV from P and the columns of dP.
  template <class Meanwhile>
  __device__ __forceinline__ void accumulate_step(const Operands& p, const Operands& ds, SharedAddress slot, int step,
                                                  Meanwhile meanwhile) {
    if constexpr (Side::kMakesDq)
      Tile::Dq::store_ds(slot + Tile::kDsBegin, step, ds, first_row(), seqlen_rows(), lane_);
    if (Side::kMakesDv)
      accumulate<Tile::kValueDims>(p_gradient_, p, slot + Tile::kSTileBytes + first_value_dim() * kElementBytes, step,
                                   meanwhile);
    accumulate<Tile::kDims>(ds_gradient_, ds, slot + first_output_dim_ * kElementBytes, step, meanwhile);
  }

  // ---- the iterations, n = n_block_ - 1 ----

  // All columns of one query head, last tile first. The last one need not be whole, so that it counts as masked.
  __device__ __forceinline__ void attend(int head_q) {
    head_q_ = head_q;
    variant_.prepare(params_, sequence_, head_q, kStartsScores ? reciprocal(params_.softmax_scale_log2) : 1.0f);
    if constexpr (Traits::kHasDropout)
      dropout_.prepare(params_.dropout, sequence_.batch() * params_.num_heads + head_q);
    if constexpr (Side::kMakesDq && !kConverts<Traits>) {  // else find_scale() has
      Tile::Dq::write_delta(tensors(), head_q, warp_, lane_);
      block_barrier();
    }
    TileRange columns = column_tiles();
    if constexpr (kHasBlockMask) {
      listed_ = {params_.user.block_mask, sequence_, head_q, row_begin_};
      pair_mask_.prepare(params_, sequence_, head_q);
      columns = {0, 0, listed_.whole(), listed_.count()};
      if (columns.end == 0) return;
    }
    if constexpr (Variant::kHidesKeys && !Side::kColumnsAreQueries) {
      columns = shown_tiles<Traits>(columns, variant_, sequence_);
      if (columns.begin >= columns.end) return;
    }
    prologue(columns.end);
    const int whole_end = Sequence<Traits>::minimum(columns.whole_end, columns.end - 1);
    masked_iterations(Sequence<Traits>::maximum(whole_end, columns.begin));
    unmasked_iterations(Sequence<Traits>::maximum(columns.whole_begin, columns.begin));
    if (Side::kHasFirstColumn) masked_iterations(columns.begin);
    use_step(waiting_tile(), slot_, kSteps - 1);  // the epilogue
    block_barrier();                              // the slots' memory is free
    if constexpr (Side::kMakesDq) {
      write_dq();
      block_barrier();
    }
  }

  // Before a head's first iteration: fetches the last tile.
  __device__ __forceinline__ void prologue(int tiles) {
    s_columns_ = SStream(Side::s_columns(tensors(), head_q_));
    dp_columns_ = DpStream(Side::dp_columns(tensors(), head_q_));
    n_block_ = tiles;
    slot_ = 0;
    has_step_ = false;
    s_columns_.go_to(tile());
    dp_columns_.go_to(tile());
    column_offset_ = sequence_.statistics_offset(head_q_, tile() * Traits::kBlockN + thread_in_block());
    InFlight in;
    prefetch_bounded(in, next_slot(slot_), tile());
    if constexpr (kStartsScores || (Side::kColumnsAreQueries && Variant::kIsOneRow))
      fetch_pairs<false>(n_block_ - 1, 0, true);
    commit(in, next_slot(slot_));
  }

  // Down to tile n_end, where some rows do not see some columns. One thing comes after the other here: these iterations
  // are few.
  __device__ __forceinline__ void masked_iterations(int n_end) {
    while (n_block_ > n_end) {
      const SharedAddress slot = next_slot(slot_);
      InFlight in;
      advance();
      prefetch_bounded(in, next_slot(slot), prefetched_tile());
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        if (step > 0)
          use_step(tile(), slot, step - 1);
        else if (has_step_)
          use_step(waiting_tile(), slot_, kSteps - 1);
        fetch_pairs_before<false>(step);
        scores(slot, step);
        fetch_pairs_behind<false>(step);
        transform_scores(step);
        mask(step);
      }
      commit(in, next_slot(slot));
      if constexpr (Side::kMakesDq)
        if (has_step_) write_dq();
      has_step_ = true;
      slot_ = slot;
      leave_tile();
    }
  }

  __device__ __forceinline__ void unmasked_iterations(int n_end) {
    while (n_block_ > n_end)
      if (kHasBlockMask && (tile() + 1) * Traits::kBlockN > seqlen_columns())
        masked_iterations(n_block_ - 1);  // the last of the sequence's, wherever the list has it
      else
        iterate();
  }

  // Adds the gradients of the step whose S and dP wait.
  __device__ __forceinline__ void use_step(int n, SharedAddress slot, int step) {
    Operands p, ds;
    differentiate(acc_s_, acc_dp_, derivative_, fetched_, n, slot, step, p, ds);
    accumulate_step(p, ds, slot, step, [] {});
  }

  // The barrier stands among the products, so that warps leave it with work to do. Which product does what is settled
  // when the loop is unrolled.
  __device__ __forceinline__ void iterate() {
    const SharedAddress slot = next_slot(slot_), free = next_slot(slot);
    InFlight in;
    int product = 0;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const SharedAddress step_slot = step == 0 ? slot_ : slot;
      const int previous = step == 0 ? kSteps - 1 : step - 1;
      Products s, dp, derivative;
      Operands p, ds;
#pragma unroll
      for (int m = 0; m < kMTiles; ++m)
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          s[m][0][c] = acc_s_[m][0][c];
          dp[m][0][c] = acc_dp_[m][0][c];
          if constexpr (Variant::kHasDerivative) derivative[m][0][c] = derivative_[m][0][c];
        }
      Fetched fetched;
      if constexpr (Variant::kReadsPairs)
#pragma unroll
        for (int i = 0; i < kFetchedQueries; ++i) fetched[i] = fetched_[i];
      fetch_pairs_before<true>(step);
      differentiate(s, dp, derivative, fetched, step == 0 ? waiting_tile() : tile(), step_slot, previous, p, ds);
      scores(slot, step);
      fetch_pairs_behind<true>(step);
      transform_scores(step);
      accumulate_step(p, ds, step_slot, previous, [&] {
        if (product == Points::kPrefetch) prefetch(in, free);
        if (product == Points::kCommit) commit(in, free);
        ++product;
      });
    }
    if constexpr (Side::kMakesDq) write_dq();
    slot_ = slot;
    leave_tile();
  }

  // The lane's row r, and its first column of a step of tile n.
  __device__ __forceinline__ int lane_row(int r) const { return first_row() + Rows::first(lane_) + Rows::kStep * r; }
  __device__ __forceinline__ int lane_column(int n, int step) const {
    return n * Traits::kBlockN + Columns::kStep * step + Columns::first(lane_);
  }

  // Of a step of the next tile.
  __device__ __forceinline__ void transform_scores(int step) {
    for_each(acc_s_, [&](float& s, int r, int c) {
      const int row = lane_row(r), column = lane_column(tile(), step) + c;
      s = variant_.score(s, Side::query(row, column), Side::key(row, column), derivative_[r / 2][0][r % 2 * 2 + c]);
    });
  }

  // Of the step's scores, those that belong to no visible pair become P = 0 and dS = 0.
  __device__ __forceinline__ void mask(int step) {
    const int column = lane_column(tile(), step);
#pragma unroll
    for (int r = 0; r < 2 * kMTiles; ++r) {
      const int first = Side::first_column(sequence_, lane_row(r)), end = Side::end_column(sequence_, lane_row(r));
#pragma unroll
      for (int c = 0; c < 2; ++c)
        if (column + c >= end || (Side::kHasFirstColumn && column + c < first)) hide(r, c);
    }
    if constexpr (kHasBlockMask && !UserMask::kIsTrivial)
      if (n_block_ > listed_.whole())
#pragma unroll
        for (int r = 0; r < 2 * kMTiles; ++r)
#pragma unroll
          for (int c = 0; c < 2; ++c)
            if (!pair_mask_.shows(Side::query(lane_row(r), column + c), Side::key(lane_row(r), column + c))) hide(r, c);
  }

  __device__ __forceinline__ void hide(int r, int c) {
    acc_s_[r / 2][0][r % 2 * 2 + c] = -infinity();
    acc_dp_[r / 2][0][r % 2 * 2 + c] = 0.0f;
    if constexpr (Variant::kHasDerivative) derivative_[r / 2][0][r % 2 * 2 + c] = 0.0f;
  }

  // ---- the output ----

  __device__ __forceinline__ void write_out() {
    locate(reread_thread_in_block(), reread_block_in_grid());
    if constexpr (kConverts<Traits> && !Side::kColumnsAreQueries) find_scale_of_rows();
    write_gradient<typename Tile::Output>(ds_gradient_, Side::ds_gradient(tensors(), head_), first_output_dim_,
                                          scale_.inverse());
    if constexpr (Side::kMakesDv) {
      float factor = has_nan_probabilities() ? not_a_number() : 1.0f;
      if constexpr (Traits::kHasDropout) factor *= params_.dropout.scale;
      write_gradient<typename Tile::ValueOutput>(p_gradient_, tensors().dv(head_), first_value_dim(),
                                                 factor * scale_.inverse());
    }
  }

  // Of a p of NaN saturate() has made 0. All of a query's p are NaN where its lse is, and then its delta and dK are,
  // too.
  __device__ __forceinline__ bool has_nan_probabilities() const {
    bool has_nan = false;
#pragma unroll
    for (int r = 0; r < 2 * kMTiles; ++r) has_nan |= is_nan(ds_gradient_[r / 2][0][r % 2 * 2]);
    if (!any_in_block(has_nan)) return false;
    const TileRange tiles = column_tiles();
    const int end = Sequence<Traits>::minimum(tiles.end * Traits::kBlockN, seqlen_columns());
    has_nan = false;
    for (int i = 0; i < Side::kQueryHeads; ++i)
      for (int column = tiles.begin * Traits::kBlockN + thread_in_block(); column < end; column += Tile::kThreads)
        has_nan |= is_nan(
            load_global_f32(params_.softmax_lse + sequence_.statistics_offset(head_ * Side::kQueryHeads + i, column)));
    return any_in_block(has_nan);
  }

  // Of tile n_block_, behind the barrier that all its dS stand before.
  __device__ __forceinline__ void write_dq() const {
    dq_.write_tile(slot_ + Tile::kDsBegin, sequence_, tensors().dq(head_q_), n_block_ * Traits::kBlockN,
                   (params_.sign == 0 ? 1.0f : -1.0f) * scale_.inverse(), warp_, lane_);
  }

  // What is made of a sequence's queries where it has no keys: there are none to read a tensor of pairs at.
  __device__ __forceinline__ void write_without_keys() const {
    for (int i = 0; i < Side::kQueryHeads; ++i) {
      const int head = head_ * Side::kQueryHeads + i;
      Tile::Dq::write_delta(tensors(), head, warp_, lane_);
      Tile::Dq::write_zeros(tensors().dq(head), 0, seqlen_columns());
    }
  }

  // The queries that are in no tile.
  __device__ __forceinline__ void write_dq_of_unseen(const TileRange& columns) const {
    const int begin = Sequence<Traits>::minimum(columns.begin * Traits::kBlockN, seqlen_columns());
    const int end = Sequence<Traits>::maximum(columns.end * Traits::kBlockN, begin);
    for (int i = 0; i < Side::kQueryHeads; ++i) {
      const Matrix dq = tensors().dq(head_ * Side::kQueryHeads + i);
      Tile::Dq::write_zeros(dq, 0, begin);
      Tile::Dq::write_zeros(dq, end, seqlen_columns());
    }
  }

  template <class Output, class Gradient>
  __device__ __forceinline__ void write_gradient(const Gradient& gradient, const Matrix& matrix, int first_dim,
                                                 float factor) {
    float factors[2 * kMTiles];
#pragma unroll
    for (int r = 0; r < 2 * kMTiles; ++r) factors[r] = factor;
    Bits* rows = const_cast<Bits*>(matrix.base) + first_row() * matrix.row_stride;
    Output::template write<Rows>(gradient, factors, rows, matrix.row_stride, seqlen_rows() - first_row(), first_dim,
                                 warp_ * Tile::kStagingWarpBytes, lane_);
  }

  const FlashBwdParams& params_;
  int lane_, warp_;
  Sequence<Traits> sequence_;
  int row_begin_, head_, head_q_, first_output_dim_;
  GradientScale<Traits> scale_;
  Variant variant_;
  Dropout dropout_;
  ListedTiles<Traits::kBlockN> listed_;
  PairMask pair_mask_;
  typename Dropout::Kept kept_;  // of the step whose S and dP wait, or the one before
  Fetched fetched_;  // for the next step's scores, where they start from it, or for those of the step that waits
  typename Tile::SFragments s_rows_;
  typename Tile::DpFragments dp_rows_;
  Statistics row_statistics_[kMTiles];
  SStream s_columns_;
  DpStream dp_columns_;
  long long column_offset_;  // of the statistics of the column that this thread prefetches next
  int n_block_;              // the tile whose last step waits; the next iteration is that of tile n_block_ - 1
  bool has_step_;            // false before a head's first iteration
  SharedAddress slot_;       // where that tile lies; the next one is in the slot behind it
  Products acc_s_, acc_dp_;
  Products derivative_;  // of acc_s_ by its products, where scores tell it
  DsGradient ds_gradient_;
  PGradient p_gradient_;
  typename Tile::Dq dq_;                                    // where it is made
  typename Tile::SFragments::Step kept_s_rows_[kRowSteps];  // where S reads its rows from shared memory once
};

template <class Traits>
__device__ __forceinline__ void flash_bwd(const FlashBwdParams& params) {
  FlashBwd<Traits>(params).run();
}
