// Backward attention, the two kernels that make gradients out of products:
//
//   S = scale Q K^T     P = exp(S - lse)     dP = dO V^T     dS = P (dP - delta) scale
//   dQ = dS K           dK = dS^T Q          dV = P^T dO
//
// Score features change S and with it dS: see score_feature.cuh.
//
// A block owns kBlockM rows of one side: queries for dQ, keys for dK and dV. A warp has 16 or 32 of them, and their two
// matrices (Q and dO, or K and V) at hand as A operands. The other side comes in tiles of kBlockN columns, last tile
// first, through a ring of three slots in shared memory. With rows as the M side, P and dS leave their products in the
// layout that the next ones take as A operand (see primitives.cuh): they stay in registers.
//
//   step j (8 columns):  S(j), dP(j)                          meanwhile   P(j-1), dS(j-1)
//                        gradients += dS(j-1), P(j-1) times columns of step j-1
//
// dK and dV of a group's query heads are summed in the same accumulators, one head after the other.
#pragma once

#include "flash_bwd_params.cuh"
#include "mask.cuh"
#include "primitives.cuh"
#include "row_fragments.cuh"
#include "row_output.cuh"
#include "score_variant.cuh"
#include "sequence.cuh"
#include "tile_copy.cuh"

enum class RowSide { kQueries, kKeys };

template <class Traits>
struct FlashBwdTile {
  static constexpr bool kRowsAreKeys = Traits::kRowSide == RowSide::kKeys;
  // Above 128, 16 rows of both dK and dV would take all of a thread's registers: a block makes half of the head dims.
  static constexpr int kOutputSplits = kRowsAreKeys && Traits::kHeadDim > 128 ? 2 : 1;
  static constexpr int kDims = Traits::kTileDims;
  static constexpr int kOutputDims = kDims / kOutputSplits;
  static constexpr int kRowsPerWarp = Traits::kBlockM / Traits::kNWarps;
  static constexpr int kMTiles = kRowsPerWarp / 16;
  static constexpr int kSteps = Traits::kBlockN / 8;
  static constexpr int kThreads = Traits::kNWarps * 32;
  using Fragments = RowFragments<Traits, kRowsPerWarp, kDims, Traits::kRegisterDims>;
  using Output = RowOutput<Traits, kRowsPerWarp, kOutputDims>;

  // Shared memory: three slots of (first matrix's tile, second matrix's tile, statistics), then each warp's rows beyond
  // kRegisterDims. Turn n reads tiles n+1 (for its first step) and n, and stores tile n-1 before its barrier, which
  // stands behind that first step.
  static constexpr int kSlots = 3;
  static constexpr int kTileBytes = Traits::kBlockN * row_pitch(kDims);
  static constexpr int kStatisticsBytes = kRowsAreKeys ? Traits::kBlockN * 8 : 0;
  static constexpr int kSlotBytes = 2 * kTileBytes + kStatisticsBytes;
  static constexpr int kStagingWarpBytes =
      Output::kStagingBytes > Fragments::kStagingBytes ? Output::kStagingBytes : Fragments::kStagingBytes;
  static constexpr int kRowsBegin = kSlots * kSlotBytes > Traits::kNWarps * kStagingWarpBytes
                                        ? kSlots * kSlotBytes
                                        : Traits::kNWarps * kStagingWarpBytes;
  static constexpr int kSharedBytes = kRowsBegin + Traits::kNWarps * 2 * Fragments::kSharedBytes;
};

template <class Traits>
class FlashBwd {
  using Tile = FlashBwdTile<Traits>;
  using Element = typename Traits::Element;
  using Bits = typename Element::Bits;
  using Matrix = GlobalMatrix<Element>;
  static constexpr bool kRowsAreKeys = Tile::kRowsAreKeys;
  static constexpr int kMTiles = Tile::kMTiles, kDTiles = Tile::kDims / 8, kSteps = Tile::kSteps;
  static constexpr int kOutputDTiles = Tile::kOutputDims / 8;
  static constexpr int kPitch = row_pitch(Tile::kDims);
  static constexpr int kGradients = kRowsAreKeys ? 2 : 1;
  static constexpr int kProducts = kSteps * kGradients * kMTiles * kOutputDTiles;  // of a turn's gradients

  using Scores = float[kMTiles][4];       // of a step
  using Operands = unsigned[kMTiles][2];  // the same rounded to elements
  using Gradient = float[kMTiles][kOutputDTiles][4];
  using Stream = typename Traits::Copy::template Stream<Traits, Traits::kBlockN, Tile::kDims, Tile::kThreads>;

  // lse x log2(e) and delta x softmax_scale of the two rows or columns that an accumulator's pair of scores belongs to.
  struct Statistics {
    float lse[2], delta[2];
  };

  // What a thread brings of a tile, as it lies in memory: nothing waits for it before it is stored.
  struct Incoming {
    typename Stream::InFlight first, second;
    float lse, delta;
  };

 public:
  __device__ __forceinline__ explicit FlashBwd(const FlashBwdParams& params) : params_(params) {
    locate(thread_in_block(), block_in_grid());
  }

  __device__ __forceinline__ void run() {
    if (Traits::kIsVarlen && row_begin_ >= seqlen_rows()) return;
    clear(acc_first_);
    if (kRowsAreKeys) clear(acc_second_);
    const TileRange columns = column_tiles();
    if (columns.begin < columns.end) {
      load_rows();
      const int group_heads = kRowsAreKeys ? Traits::kGroupSize : 1;
      for (int i = 0; i < group_heads; ++i) {
        locate(reread_thread_in_block(), reread_block_in_grid());
        attend(head_ * group_heads + i);
      }
    }
    write_out();
  }

 private:
  // Which rows of which head are this warp's. Called again, with indices read anew, wherever they are needed after
  // turns: keeping them would take registers from the loop. As `thread` is unsigned, what divides a lane is a mask.
  __device__ __forceinline__ void locate(unsigned thread, int block) {
    lane_ = thread % 32;
    warp_ = thread / 32;
    const int split_block = block / Tile::kOutputSplits;
    const int turn = split_block % params_.num_row_blocks;
    const int batch_head = split_block / params_.num_row_blocks;
    first_output_dim_ = block % Tile::kOutputSplits * Tile::kOutputDims;
    const int heads = kRowsAreKeys ? params_.num_heads_k : params_.num_heads;
    // Causal blocks with the most columns go first, so that the short ones fill the last wave: the last queries, the
    // first keys.
    const bool last_first = Traits::kIsCausal && !kRowsAreKeys;
    row_begin_ = (last_first ? params_.num_row_blocks - 1 - turn : turn) * Traits::kBlockM;
    head_ = batch_head % heads;
    sequence_ = Sequence<Traits>(params_, batch_head / heads);
  }

  static __device__ __forceinline__ void clear(Gradient& gradient) {
#pragma unroll
    for (int m = 0; m < kMTiles; ++m)
#pragma unroll
      for (int d = 0; d < kOutputDTiles; ++d)
#pragma unroll
        for (int c = 0; c < 4; ++c) gradient[m][d][c] = 0.0f;
  }

  // ---- which columns the rows meet ----

  __device__ __forceinline__ int seqlen_rows() const {
    return kRowsAreKeys ? sequence_.seqlen_k() : sequence_.seqlen_q();
  }
  __device__ __forceinline__ int seqlen_columns() const {
    return kRowsAreKeys ? sequence_.seqlen_q() : sequence_.seqlen_k();
  }
  __device__ __forceinline__ TileRange column_tiles() const {
    return kRowsAreKeys ? sequence_.query_tiles(row_begin_, Traits::kBlockM)
                        : sequence_.key_tiles(row_begin_, Traits::kBlockM);
  }
  __device__ __forceinline__ int first_column(int row) const {
    return kRowsAreKeys ? sequence_.first_query(row) : sequence_.first_key(row);
  }
  __device__ __forceinline__ int end_column(int row) const {
    return kRowsAreKeys ? sequence_.end_query(row) : sequence_.end_key(row);
  }

  // May a tile begin before the first column of a row that meets it?
  static constexpr bool kHasFirstColumn = Traits::kIsLocal || (Traits::kIsCausal && kRowsAreKeys);

  // ---- memory ----

  // Head `head` of a tensor with q's rows, or with k's.
  __device__ __forceinline__ Matrix queries(const void* tensor, const TensorStrides& strides, int head) const {
    return {static_cast<const Bits*>(tensor) + sequence_.query_offset(strides, head), strides.row};
  }
  __device__ __forceinline__ Matrix keys(const void* tensor, const TensorStrides& strides, int head) const {
    return {static_cast<const Bits*>(tensor) + sequence_.key_offset(strides, head), strides.row};
  }
  __device__ __forceinline__ Matrix dout(int head) const {
    Matrix matrix = queries(params_.dout, params_.dout_strides, head);
    matrix.dim_stride = params_.dout_dim_stride;
    return matrix;
  }

  __device__ __forceinline__ int first_row() const { return row_begin_ + warp_ * Tile::kRowsPerWarp; }

  __device__ __forceinline__ void load_rows() {
    const Matrix first =
        kRowsAreKeys ? keys(params_.k, params_.k_strides, head_) : queries(params_.q, params_.q_strides, head_);
    const Matrix second = kRowsAreKeys ? keys(params_.v, params_.v_strides, head_) : dout(head_);
    const SharedAddress staging = warp_ * Tile::kStagingWarpBytes;
    const SharedAddress rows = Tile::kRowsBegin + warp_ * 2 * Tile::Fragments::kSharedBytes;
    first_rows_.load(first, first_row(), seqlen_rows(), params_.sign, lane_, staging, rows);
    second_rows_.load(second, first_row(), seqlen_rows(), 0, lane_, staging, rows + Tile::Fragments::kSharedBytes);
    if (!kRowsAreKeys) {
#pragma unroll
      for (int m = 0; m < kMTiles; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = first_row() + 16 * m + 8 * half + lane_ / 4;
          float lse, delta;
          load_statistics(sequence_.statistics_offset(head_, row), row < sequence_.seqlen_q(), lse, delta);
          row_statistics_[m].lse[half] = scaled_lse(lse);
          row_statistics_[m].delta[half] = scaled_delta(delta);
        }
    }
    block_barrier();  // every warp has its rows out of the slots' memory
  }

  // Of a query, or of none: there P and dS come out as 0.
  __device__ __forceinline__ void load_statistics(long long offset, bool exists, float& lse, float& delta) const {
    lse = infinity();
    delta = 0.0f;
    if (exists) {
      lse = load_global_f32(params_.softmax_lse + offset);
      delta = load_global_f32(params_.delta + offset);
    }
  }

  __device__ __forceinline__ float scaled_lse(float lse) const { return lse * kLog2E; }
  __device__ __forceinline__ float scaled_delta(float delta) const { return delta * params_.softmax_scale; }

  // The turn to tile n brings tile n - 1. Turn 0 brings tile 0 again, which nobody uses: that costs less than a branch.
  __device__ __forceinline__ int incoming_tile() const { return n_block_ > 1 ? n_block_ - 2 : 0; }

  __device__ __forceinline__ void advance() {
    if (n_block_ > 1) {
      first_stream_.advance();
      second_stream_.advance();
      column_offset_ -= Traits::kBlockN;
    }
  }

  static __device__ __forceinline__ bool has_column() { return thread_in_block() < Traits::kBlockN; }

  // Brings a tile that is whole.
  __device__ __forceinline__ void prefetch(Incoming& in, SharedAddress slot) {
    advance();
    first_stream_.prefetch(in.first, slot);
    second_stream_.prefetch(in.second, slot + Tile::kTileBytes);
    if (kRowsAreKeys) load_statistics(column_offset_, has_column(), in.lse, in.delta);
  }

  // The same where it may be the last tile, which need not be whole.
  __device__ __forceinline__ void prefetch_bounded(Incoming& in, SharedAddress slot, int tile) {
    const int columns = seqlen_columns() - tile * Traits::kBlockN;
    first_stream_.prefetch_bounded(in.first, slot, columns);
    second_stream_.prefetch_bounded(in.second, slot + Tile::kTileBytes, columns);
    if (kRowsAreKeys)
      load_statistics(column_offset_, has_column() && thread_in_block() < columns, in.lse, in.delta);
  }

  // Two columns' statistics lie together, the lse of both first: one 16-byte read fetches what a lane needs.
  __device__ __forceinline__ void commit(const Incoming& in, SharedAddress slot) const {
    Stream::commit(in.first, slot);
    Stream::commit(in.second, slot + Tile::kTileBytes);
    if (kRowsAreKeys && has_column()) {
      const SharedAddress at =
          slot + 2 * Tile::kTileBytes + thread_in_block() / 2 * 16 + thread_in_block() % 2 * 4;
      store_shared_f32(at, scaled_lse(in.lse));
      store_shared_f32(at + 8, scaled_delta(in.delta));
    }
    block_barrier();
  }

  static __device__ __forceinline__ SharedAddress next_slot(SharedAddress slot) {
    return slot == (Tile::kSlots - 1) * Tile::kSlotBytes ? 0 : slot + Tile::kSlotBytes;
  }

  // ---- the products of a step: 8 columns ----

  // B operands of 8 columns x 32 dims: matrix i has dims 8i... For S and dP as they lie, for gradients transposed.
  __device__ __forceinline__ SharedAddress fragment_address(SharedAddress tile, int step, int d) const {
    return tile + (lane_ % 8 + 8 * step) * kPitch + (lane_ / 8 + d) * kChunkBytes;
  }

  __device__ __forceinline__ void load_columns(unsigned (&b)[4], SharedAddress tile, int step, int d) const {
    if (kDTiles - d >= 4) {
      ldmatrix_x4(b, fragment_address(tile, step, d));
    } else {
      unsigned two[2];
      ldmatrix_x2(two, fragment_address(tile, step, d));
      b[0] = two[0];
      b[1] = two[1];
    }
  }

  __device__ __forceinline__ void load_columns_transposed(unsigned (&b)[4], SharedAddress tile, int step, int d) const {
    if (kOutputDTiles - d >= 4) {
      ldmatrix_x4_trans(b, fragment_address(tile, step, d));
    } else {
      unsigned two[2];
      ldmatrix_x2_trans(two, fragment_address(tile, step, d));
      b[0] = two[0];
      b[1] = two[1];
    }
  }

  // S and dP of a step of the tile in `slot`.
  __device__ __forceinline__ void scores(SharedAddress slot, int step) {
#pragma unroll
    for (int d = 0; d < kDTiles; d += 4) {
      unsigned first[4], second[4];
      load_columns(first, slot, step, d);
      load_columns(second, slot + Tile::kTileBytes, step, d);
#pragma unroll
      for (int i = 0; i < (kDTiles - d < 4 ? kDTiles - d : 4); i += 2) {
        typename Tile::Fragments::Step a, b;
        first_rows_.get(a, (d + i) / 2);
        second_rows_.get(b, (d + i) / 2);
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
          for (int m = 0; m < kMTiles; ++m) {
            multiply(acc_s_[m], a[m], half, first[i + half], d + i + half);
            multiply(acc_dp_[m], b[m], half, second[i + half], d + i + half);
          }
      }
    }
  }

  static __device__ __forceinline__ void multiply(float (&acc)[4], const unsigned (&a)[4], int half, unsigned b,
                                                  int d) {
    if (d == 0)
      Element::multiply(acc, a[0], a[1], b);
    else
      Element::multiply_add(acc, a[2 * half], a[2 * half + 1], b);
  }

  // P and dS of a step of tile n, which lies in `slot`, from its S and dP.
  __device__ __forceinline__ void differentiate(const Scores& s, const Scores& dp, int n, SharedAddress slot, int step,
                                                Operands& p, Operands& ds) const {
    Statistics columns;
    if (kRowsAreKeys) {
      Vec16 four;
      load_shared_16B(four, slot + 2 * Tile::kTileBytes + (step * 4 + lane_ % 4) * 16);
      columns = {{float_of_bits(four.word[0]), float_of_bits(four.word[1])},
                 {float_of_bits(four.word[2]), float_of_bits(four.word[3])}};
    }
#pragma unroll
    for (int m = 0; m < kMTiles; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float each_p[2], each_ds[2];
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const float lse = kRowsAreKeys ? columns.lse[c] : row_statistics_[m].lse[half];
          const float delta = kRowsAreKeys ? columns.delta[c] : row_statistics_[m].delta[half];
          const float score = s[m][2 * half + c];
          const int row = lane_row(m, half), column = n * Traits::kBlockN + 8 * step + c + lane_ % 4 * 2;
          const int query = kRowsAreKeys ? column : row, key = kRowsAreKeys ? row : column;
          each_p[c] = exp2_approx(variant_.bias(fma_rounded(score, params_.softmax_scale_log2, -lse), sequence_, query, key));
          each_ds[c] = variant_.gradient(
              each_p[c] * fma_rounded(dp[m][2 * half + c], params_.softmax_scale, -delta), score);
        }
        p[m][half] = Element::pack(each_p[0], each_p[1]);
        ds[m][half] = Element::pack(each_ds[0], each_ds[1]);
      }
  }

  // gradient += operands x the step's columns of a tile.
  template <class Meanwhile>
  __device__ __forceinline__ void accumulate(Gradient& gradient, const Operands& operands, SharedAddress tile, int step,
                                             Meanwhile meanwhile) {
#pragma unroll
    for (int d = 0; d < kOutputDTiles; d += 4) {
      unsigned b[4];
      load_columns_transposed(b, tile + first_output_dim_ * kElementBytes, step, d);
#pragma unroll
      for (int i = 0; i < (kOutputDTiles - d < 4 ? kOutputDTiles - d : 4); ++i)
#pragma unroll
        for (int m = 0; m < kMTiles; ++m) {
          Element::multiply_add(gradient[m][d + i], operands[m][0], operands[m][1], b[i]);
          meanwhile();
        }
    }
  }

  // dQ or dK from dS and the first tile, dV from P and the second.
  template <class Meanwhile>
  __device__ __forceinline__ void accumulate_step(const Operands& p, const Operands& ds, SharedAddress slot, int step,
                                                  Meanwhile meanwhile) {
    if (kRowsAreKeys) accumulate(acc_second_, p, slot + Tile::kTileBytes, step, meanwhile);
    accumulate(acc_first_, ds, slot, step, meanwhile);
  }

  // The last product of the first `eighth` eighths of a turn's gradients.
  static __device__ __forceinline__ constexpr int last_before(int eighth) {
    return eighth > 0 ? (kProducts * eighth + 7) / 8 - 1 : 0;
  }

  // ---- the turns ----

  // All columns of one query head, last tile first. The last one need not be whole, so that it counts as masked.
  __device__ __forceinline__ void attend(int head_q) {
    head_q_ = head_q;
    variant_.prepare(params_, sequence_, head_q, 1.0f);
    const TileRange columns = column_tiles();
    start_head(columns.end);
    const int whole_end = Sequence<Traits>::minimum(columns.whole_end, columns.end - 1);
    masked_turns(Sequence<Traits>::maximum(whole_end, columns.begin));
    unmasked_turns(Sequence<Traits>::maximum(columns.whole_begin, columns.begin));
    if (kHasFirstColumn) masked_turns(columns.begin);
    finish_step();
    block_barrier();  // the slots' memory is free
  }

  // Brings the last tile.
  __device__ __forceinline__ void start_head(int tiles) {
    const Matrix first = kRowsAreKeys ? queries(params_.q, params_.q_strides, head_q_)
                                            : keys(params_.k, params_.k_strides, head_q_ / Traits::kGroupSize);
    const Matrix second = kRowsAreKeys ? dout(head_q_)
                                             : keys(params_.v, params_.v_strides, head_q_ / Traits::kGroupSize);
    first_stream_ = Stream(first);
    second_stream_ = Stream(second);
    n_block_ = tiles;
    slot_ = 0;
    has_step_ = false;
    first_stream_.go_to(n_block_ - 1);
    second_stream_.go_to(n_block_ - 1);
    column_offset_ = sequence_.statistics_offset(head_q_, (n_block_ - 1) * Traits::kBlockN + thread_in_block());
    Incoming in;
    prefetch_bounded(in, next_slot(slot_), n_block_ - 1);
    commit(in, next_slot(slot_));
  }

  // Turns to the tiles down to n_end, some of whose columns some rows do not meet. One thing comes after the other here:
  // these turns are few.
  __device__ __forceinline__ void masked_turns(int n_end) {
    while (n_block_ > n_end) {
      const SharedAddress slot = next_slot(slot_);
      Incoming in;
      advance();
      prefetch_bounded(in, next_slot(slot), incoming_tile());
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        if (step > 0)
          use_step(n_block_ - 1, slot, step - 1);
        else if (has_step_)
          use_step(n_block_, slot_, kSteps - 1);
        scores(slot, step);
        transform_scores();
        mask(step);
      }
      has_step_ = true;
      commit(in, next_slot(slot));
      slot_ = slot;
      --n_block_;
    }
  }

  __device__ __forceinline__ void unmasked_turns(int n_end) {
    while (n_block_ > n_end) turn();
  }

  // Uses up the step whose S and dP are at hand.
  __device__ __forceinline__ void use_step(int n, SharedAddress slot, int step) {
    Operands p, ds;
    differentiate(acc_s_, acc_dp_, n, slot, step, p, ds);
    accumulate_step(p, ds, slot, step, [] {});
  }

  __device__ __forceinline__ void finish_step() { use_step(n_block_, slot_, kSteps - 1); }

  // Turns to the next tile n. Its barrier stands among the products, so that warps leave it with work at hand.
  __device__ __forceinline__ void turn() {
    const SharedAddress slot = next_slot(slot_), free = next_slot(slot);
    Incoming in;
    int product = 0;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const SharedAddress step_slot = step == 0 ? slot_ : slot;
      const int previous = step == 0 ? kSteps - 1 : step - 1;
      Scores s, dp;
      Operands p, ds;
#pragma unroll
      for (int m = 0; m < kMTiles; ++m)
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          s[m][c] = acc_s_[m][c];
          dp[m][c] = acc_dp_[m][c];
        }
      differentiate(s, dp, step == 0 ? n_block_ : n_block_ - 1, step_slot, previous, p, ds);
      scores(slot, step);
      transform_scores();
      accumulate_step(p, ds, step_slot, previous, [&] {
        if (product == last_before(Traits::kLoadEighth)) prefetch(in, free);
        if (product == last_before(Traits::kBarrierEighth)) commit(in, free);
        ++product;
      });
    }
    slot_ = slot;
    --n_block_;
  }

  // Row r of a 16-row tile's upper or lower half that this lane holds scores of.
  __device__ __forceinline__ int lane_row(int m, int half) const { return first_row() + 16 * m + 8 * half + lane_ / 4; }

  __device__ __forceinline__ void transform_scores() {
#pragma unroll
    for (int m = 0; m < kMTiles; ++m)
#pragma unroll
      for (int c = 0; c < 4; ++c) acc_s_[m][c] = variant_.score(acc_s_[m][c]);
  }

  // Of the step's scores, those that belong to no visible pair become P = 0 and dS = 0.
  __device__ __forceinline__ void mask(int step) {
    const int column = (n_block_ - 1) * Traits::kBlockN + 8 * step + lane_ % 4 * 2;
#pragma unroll
    for (int m = 0; m < kMTiles; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int first = first_column(lane_row(m, half)), end = end_column(lane_row(m, half));
#pragma unroll
        for (int c = 0; c < 2; ++c)
          if (column + c >= end || (kHasFirstColumn && column + c < first)) {
            acc_s_[m][2 * half + c] = -infinity();
            acc_dp_[m][2 * half + c] = 0.0f;
          }
      }
  }

  // ---- the output ----

  __device__ __forceinline__ void write_out() {
    locate(reread_thread_in_block(), reread_block_in_grid());
    if (kRowsAreKeys) {
      write_gradient(acc_first_, keys(params_.dk, params_.dk_strides, head_));
      write_gradient(acc_second_, keys(params_.dv, params_.dv_strides, head_));
    } else {
      write_gradient(acc_first_, queries(params_.dq, params_.dq_strides, head_));
    }
  }

  __device__ __forceinline__ void write_gradient(const Gradient& gradient, const Matrix& matrix) {
    float ones[2 * kMTiles];
#pragma unroll
    for (int r = 0; r < 2 * kMTiles; ++r) ones[r] = 1.0f;
    Bits* rows = const_cast<Bits*>(matrix.base) + first_row() * matrix.row_stride;
    Tile::Output::write(gradient, ones, rows, matrix.row_stride, seqlen_rows() - first_row(), first_output_dim_,
                        warp_ * Tile::kStagingWarpBytes, lane_);
  }

  const FlashBwdParams& params_;
  int lane_, warp_;
  Sequence<Traits> sequence_;
  int row_begin_, head_, head_q_, first_output_dim_;
  ScoreVariant<Traits> variant_;
  typename Tile::Fragments first_rows_, second_rows_;
  Statistics row_statistics_[kMTiles];
  Stream first_stream_, second_stream_;
  long long column_offset_;  // of the statistics of the column that this thread brings next
  int n_block_;         // the tile whose last step is at hand; the turn goes to the one before it
  bool has_step_;       // false before a head's first turn
  SharedAddress slot_;  // where that tile lies; the next one is in the slot behind it
  Scores acc_s_, acc_dp_;
  Gradient acc_first_, acc_second_;
};

template <class Traits>
__device__ __forceinline__ void flash_bwd(const FlashBwdParams& params) {
  FlashBwd<Traits>(params).run();
}
