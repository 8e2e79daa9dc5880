// Forward attention: out = softmax(softmax_scale q k^T + mask) v, and the log-sum-exp of every row.
//
// A block owns kBlockM query rows of one head, a warp 16 or 32 of them. Keys come in tiles of kBlockN, last tile first,
// through shared memory. The main loop is a pipeline of two stages, so that the tensor cores have something to do while
// exponentials are on their way. The iteration of tile n works on tiles n and n + 1 (exponents t, probabilities P):
//
//   S(n) = Q K(n)^T            meanwhile   P(n+1) = 2^t(n+1), row_sum += P(n+1)
//   O   += P(n+1) V(n+1)       meanwhile   t(n) = S(n) scale - row_max, and has a maximum risen?
//
// and prefetches K(n-1) and V(n). The prologue fetches the last tile's K, the epilogue uses up the first tile's
// exponents.
//
// The lines of an iteration make one block without branches, in which ptxas interleaves products and exponentials by
// itself; only loads from global memory, stores and the barrier stay at the points of schedule.cuh.
//
// S leaves its product in the layout that O's product takes as operand (see primitives.cuh): P stays in registers.
#pragma once

#include "accumulator.cuh"
#include "block_info.cuh"
#include "block_mask.cuh"
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
struct FlashFwdTile {
  static constexpr int kDims = Traits::kTileDims, kValueDims = Traits::kTileDimsV;
  static constexpr int kRowsPerWarp = Traits::kBlockM / Traits::kNWarps;
  static constexpr int kMTiles = kRowsPerWarp / 16;
  static constexpr int kNTiles = Traits::kBlockN / 8;
  static constexpr int kDTiles = kValueDims / 8;  // of O
  static constexpr int kThreads = Traits::kNWarps * 32;

  // Shared memory: slots for tiles of K, slots for tiles of V, then each warp's rows of Q beyond kRegisterDims.
  //
  // Iteration n reads K(n) and V(n+1), and commits K(n-1) and V(n) before its barrier. Slow warps then may be as far
  // back as just behind the barrier of iteration n+1. They have read K(n+1), so two slots do; V(n+2) they still read,
  // unless the barrier is the last thing in an iteration, so V takes three, or two.
  static constexpr int kKeyTileBytes = Traits::kBlockN * row_pitch(kDims);
  static constexpr int kValueTileBytes = Traits::kBlockN * row_pitch(kValueDims);
  static constexpr int kKeySlots = 2;
  static constexpr int kValueSlots = kCommitsLast<Traits> ? 2 : 3;
  static constexpr int kSlotBytes = kKeySlots * kKeyTileBytes + kValueSlots * kValueTileBytes;
  using QueryFragments = RowFragments<Traits, kRowsPerWarp, kDims, kRegisterDimsOf<Traits, kDims>>;
  static constexpr int kQWarpBytes = QueryFragments::kSharedBytes;

  // Q on its way in and out on its way back pass through the slots' memory.
  using Output = RowOutput<OfValues<Traits>, kRowsPerWarp, kValueDims>;
  static constexpr int kStagingWarpBytes = Output::kStagingBytes;
  static_assert(QueryFragments::kStagingBytes <= kStagingWarpBytes, "Q is staged in less than out");
  static constexpr int kStagingBytes = Traits::kNWarps * kStagingWarpBytes;
  static constexpr int kQueryBegin = kSlotBytes > kStagingBytes ? kSlotBytes : kStagingBytes;
  static constexpr int kSharedBytes = kQueryBegin + Traits::kNWarps * kQWarpBytes;
};

template <class Traits>
class FlashFwd {
  using Tile = FlashFwdTile<Traits>;
  using Element = typename Traits::Element;
  using Bits = typename Traits::Stored::Bits;
  using Matrix = GlobalMatrix<typename Traits::Stored>;
  static constexpr int kMTiles = Tile::kMTiles, kNTiles = Tile::kNTiles, kDTiles = Tile::kDTiles;
  static constexpr int kPitch = row_pitch(Tile::kDims), kValuePitch = row_pitch(Tile::kValueDims);
  static constexpr int kProducts = kMTiles * kNTiles * kDTiles;  // tensor instructions of O's product

  using Variant = ScoreVariant<Traits>;
  using Columns = ColumnOrder<kReadsNeighbours<Traits>, kNTiles>;
  using Rows = Softmax<Element, kMTiles, kNTiles, Variant::kIsLarge>;
  using Scores = typename Rows::Scores;
  using Exponents = typename Rows::Exponents;
  using Probabilities = typename Rows::Probabilities;
  using Dropout = DropoutOf<Traits, false, kMTiles, kNTiles, kReadsNeighbours<Traits>>;
  using Points = Schedule<Traits, kProducts>;
  using KeyStream = typename Traits::Copy::template Stream<Traits, Traits::kBlockN, Tile::kDims, Tile::kThreads>;
  using ValueStream =
      typename Traits::Copy::template Stream<OfValues<Traits>, Traits::kBlockN, Tile::kValueDims, Tile::kThreads>;
  using KeysInFlight = typename KeyStream::InFlight;
  using ValuesInFlight = typename ValueStream::InFlight;

  // Tiles that a block mask lists, or all of a range.
  static constexpr bool kHasBlockMask = Traits::kHasBlockMask;
  static constexpr bool kMayHideRows = Variant::kMayHideRows || kHasBlockMask;

 public:
  __device__ __forceinline__ explicit FlashFwd(const FlashFwdParams& params)
      : params_(params),
        block_(params, block_in_grid()),
        lane_(thread_in_block() % 32),
        warp_(thread_in_block() / 32),
        softmax_(exponent_scale<Variant>(params)),
        k_stream_(keys(params.k, params.k_strides)),
        v_stream_(keys(params.v, params.v_strides)) {
    variant_.prepare(params, block_.sequence, block_.head, reciprocal(params.softmax_scale_log2));
    if constexpr (Traits::kHasDropout)
      dropout_.prepare(params.dropout, block_.sequence.batch() * params.num_heads + block_.head);
    if constexpr (kHasBlockMask) {
      listed_ = {params.user.block_mask, block_.sequence, block_.head, block_.m_begin};
      pair_mask_.prepare(params, block_.sequence, block_.head);
    }
  }

  __device__ __forceinline__ void run() {
    if (!block_.has_rows()) return;
    const TileRange tiles = tiles_of(block_.m_begin, Traits::kBlockM);
    if (tiles.begin < tiles.end) attend(tiles);
    write_out();
  }

 private:
  __device__ __forceinline__ int first_row() const { return block_.m_begin + warp_ * Tile::kRowsPerWarp; }

  // Those that some of the rows see.
  __device__ __forceinline__ TileRange tiles_of(int row, int rows) const {
    if constexpr (kHasBlockMask) return {0, 0, listed_.whole(), listed_.count()};
    return shown_tiles<Traits>(block_.sequence.key_tiles(row, rows), variant_, block_.sequence);
  }

  // The keys or values of the block's head.
  __device__ __forceinline__ KeyMatrix<Traits> keys(const void* tensor, const TensorStrides& strides) const {
    return key_matrix(params_, block_.sequence, tensor, strides, block_.head_k);
  }
  __device__ __forceinline__ Matrix queries() const {
    return {static_cast<const Bits*>(params_.q) + block_.sequence.query_offset(params_.q_strides, block_.head),
            params_.q_strides.row};
  }

  // Every tile from the last to the first. Unmasked iterations rely on every row's having a maximum. So the masked ones
  // go on until they have done one tile that every row sees whole; where even that was nothing but -inf for some row,
  // all iterations are masked.
  __device__ __forceinline__ void attend(const TileRange& tiles) {
    query_.template load<MemoryOrder>(queries(), first_row(), block_.sequence.seqlen_q(), params_.sign, lane_,
                                      warp_ * Tile::kStagingWarpBytes, Tile::kQueryBegin + warp_ * Tile::kQWarpBytes);
    block_barrier();  // every warp has its Q out of the slots' memory
    if constexpr (Variant::kHidesTiles) leave_none_waiting();
    prologue(tiles.end - 1);
    TileRange of_warp = kHasBlockMask ? tiles : block_.sequence.key_tiles(first_row(), Tile::kRowsPerWarp);
    if constexpr (Variant::kHidesKeys) of_warp.end = Sequence<Traits>::minimum(of_warp.end, tiles.end);
    masked_iterations(tiles.whole_end > tiles.begin ? tiles.whole_end - 1 : tiles.begin, of_warp);
    if constexpr (Variant::kMayHideRows)
      while (n_block_ > tiles.begin && lacks_maximum()) masked_iterations(n_block_ - 1, of_warp);
    if (lacks_maximum()) {
      masked_iterations(tiles.begin, of_warp);
    } else {
      unmasked_iterations(tiles.whole_begin, of_warp);
      if (Traits::kIsLocal) masked_iterations(tiles.begin, of_warp);
    }
    if (is_waiting(of_warp)) use_exponents();  // the epilogue
    block_barrier();                           // the slots' memory is free for the output
  }

  __device__ __forceinline__ bool lacks_maximum() const {
    return softmax_.template lacks_maximum<Variant::kMayHideRows>();
  }

  static __device__ __forceinline__ bool sees(const TileRange& tiles, int n) {
    return n < tiles.end && (!Traits::kIsLocal || n >= tiles.begin);
  }

  // ---- the slots ----

  // Where an iteration's K(n) lies, and where its V(n+1).
  struct Slots {
    SharedAddress k, v;
  };

  static constexpr SharedAddress kFirstValueSlot = Tile::kKeySlots * Tile::kKeyTileBytes;

  // Those of the next iteration.
  __device__ __forceinline__ Slots next_slots() const {
    constexpr SharedAddress kKeyTile = Tile::kKeyTileBytes, kValueTile = Tile::kValueTileBytes;
    constexpr SharedAddress kLastValueSlot = kFirstValueSlot + (Tile::kValueSlots - 1) * kValueTile;
    return {slots_.k == 0 ? kKeyTile : 0, slots_.v == kLastValueSlot ? kFirstValueSlot : slots_.v + kValueTile};
  }

  // Before the iteration of tile `last`, the first one.
  __device__ __forceinline__ void prologue(int last) {
    n_block_ = last + 1;
    slots_ = {0, kFirstValueSlot};
    k_stream_.go_to(tile());
    if constexpr (!kHasBlockMask) v_stream_.go_to(last + 1);
    KeysInFlight k;
    k_stream_.prefetch_bounded(k, slots_.k, block_.sequence.seqlen_k() - tile() * Traits::kBlockN);
    fetch_pairs<false>(last);
    KeyStream::template commit<Columns>(k, slots_.k);
    block_barrier();
  }

  // The tile of the next iteration, and the one that its K(n-1) is of. Iteration 0 prefetches K(0) once more and does
  // not use it: that costs less than a branch.
  __device__ __forceinline__ int tile() const {
    if constexpr (kHasBlockMask) return listed_.current();
    return n_block_ - 1;
  }
  __device__ __forceinline__ int prefetched_tile() const {
    if constexpr (kHasBlockMask) return listed_.next();
    return n_block_ > 1 ? n_block_ - 2 : 0;
  }

  // To K(n-1) and V(n).
  __device__ __forceinline__ void advance() {
    if constexpr (kHasBlockMask) {
      k_stream_.go_to(listed_.next() - listed_.current());
      v_stream_.go_to(listed_.current() - listed_.previous());
      return;
    }
    if (n_block_ > 1) k_stream_.advance();
    v_stream_.advance();
  }

  // Tiles that are whole, but those that are listed come in any order.
  __device__ __forceinline__ void prefetch(KeysInFlight& k, ValuesInFlight& v, const Slots& slots) {
    if constexpr (kHasBlockMask) return prefetch_bounded(k, v, slots);
    advance();
    k_stream_.prefetch(k, slots.k);
    v_stream_.prefetch(v, slots.v);
  }

  // The same where one of the two may be the sequence's last tile, which need not be whole.
  __device__ __forceinline__ void prefetch_bounded(KeysInFlight& k, ValuesInFlight& v, const Slots& slots) {
    advance();
    k_stream_.prefetch_bounded(k, slots.k, block_.sequence.seqlen_k() - prefetched_tile() * Traits::kBlockN);
    v_stream_.prefetch_bounded(v, slots.v, block_.sequence.seqlen_k() - tile() * Traits::kBlockN);
  }

  // What the scores of tile n need from memory; behind iteration 0, which has none to come, tile 0's.
  template <bool kIsWhole>
  __device__ __forceinline__ void fetch_pairs(int n) {
    const int key = (n > 0 ? n : 0) * Traits::kBlockN + Columns::first(lane_);
    fetch_tile<kIsWhole, Columns, kMTiles, kNTiles>(fetched_, variant_, block_.sequence, lane_query(), key);
  }

  // Which of the two comes first is ptxas's matter: head dim 128, causal, reaches 0.911 of a T4's peak so, in bfloat16
  // 0.890, and the other way round 0.876 and 0.815.
  static __device__ __forceinline__ void commit(const KeysInFlight& k, const ValuesInFlight& v, const Slots& slots) {
    if constexpr (kConverts<Traits>) KeyStream::template commit<Columns>(k, slots.k);
    ValueStream::template commit<Columns>(v, slots.v);
    if constexpr (!kConverts<Traits>) KeyStream::template commit<Columns>(k, slots.k);
    block_barrier();
  }

  static constexpr int kSteps = (Tile::kDims + 15) / 16;  // of 16 dims; the last one may have 8
  static constexpr bool kHasHalfStep = Tile::kDims % 16 != 0;
  static __device__ __forceinline__ constexpr bool is_half(int step) { return step == Tile::kDims / 16; }

  // K fragments of 16 keys x 16 dims are the B operands of 2 x 2 products:
  //   matrix 0: keys 0-7, dims 0-7   1: keys 0-7, dims 8-15   2: keys 8-15, dims 0-7   3: keys 8-15, dims 8-15
  using KeyFragment = unsigned[4];
  __device__ __forceinline__ void load_k(KeyFragment& k, SharedAddress slot, int n, int step) const {
    const SharedAddress keys = slot + n * 8 * kPitch + step * 16 * kElementBytes;
    if (kHasHalfStep && is_half(step)) {  // 0 and 2
      unsigned two[2];
      ldmatrix_x2(two, keys + lane_ % 16 * kPitch);
      k[0] = two[0];
      k[2] = two[1];
    } else {
      const int lane_offset = (lane_ % 8 + lane_ / 16 * 8) * kPitch + lane_ / 8 % 2 * kChunkBytes;
      ldmatrix_x4(k, keys + lane_offset);
    }
  }

  // V fragments of 8 keys x 32 dims, transposed, are the B operands of 4 independent products: matrix i has dims 8i..
  __device__ __forceinline__ void load_v(unsigned (&v)[4], SharedAddress slot, int n, int d) const {
    const int lane_offset = lane_ % 8 * kValuePitch + lane_ / 8 * kChunkBytes;
    const SharedAddress address = slot + lane_offset + n * 8 * kValuePitch + d * kChunkBytes;
    if (kDTiles - d >= 4) {
      ldmatrix_x4_trans(v, address);
    } else if (kDTiles % 2 == 0 || d < kDTiles - 1) {
      unsigned two[2];
      ldmatrix_x2_trans(two, address);
      v[0] = two[0];
      v[1] = two[1];
    }
    if (kDTiles % 2 != 0 && kDTiles - d < 4)
      ldmatrix_x1_trans(v[kDTiles % 4 - 1], address + (kDTiles % 4 - 1) * kChunkBytes);
  }

  // The fragments with which the next multiply_keys() begins, read ahead so that it need not wait for them.
  __device__ __forceinline__ void load_first_k(SharedAddress slot) {
#pragma unroll
    for (int n = 0; n < kNTiles; n += 2) load_k(first_k_[n / 2], slot, n, 0);
  }

  // ---- the two products ----

  // S = Q K^T of the tile in slots_.k, whose first fragments are in first_k_; or more than that from the start.
  __device__ __forceinline__ void multiply_keys() {
    if constexpr (Variant::kStartsScores) {
      for_each(scores_.s, [](float& s, int, int) { s = 0.0f; });
      to_scores<Columns>(scores_.s, variant_, fetched_, block_.sequence, lane_query(), lane_key());
    }
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      typename Tile::QueryFragments::Step q;
      query_.get(q, step);
#pragma unroll
      for (int n = 0; n < kNTiles; n += 2) {
        KeyFragment k;
        if (step > 0) load_k(k, slots_.k, n, step);
#pragma unroll
        for (int half = 0; half < (kHasHalfStep && is_half(step) ? 1 : 2); ++half)
#pragma unroll
          for (int i = 0; i < 2; ++i)
#pragma unroll
            for (int m = 0; m < kMTiles; ++m) {
              const unsigned b = step > 0 ? k[2 * i + half] : first_k_[n / 2][2 * i + half];
              if (step == 0 && half == 0 && !Variant::kStartsScores)
                Element::multiply(scores_.s[m][n + i], q[m][0], q[m][1], b);
              else
                Element::multiply_add(scores_.s[m][n + i], q[m][2 * half], q[m][2 * half + 1], b);
            }
      }
    }
  }

  __device__ __forceinline__ void products_to_scores() {
    if constexpr (!Variant::kStartsScores)
      to_scores<Columns>(scores_.s, variant_, fetched_, block_.sequence, lane_query(), lane_key());
  }

  // O += P V of the tile in slots_.v. `meanwhile(i)` is called after tensor instruction i of kProducts.
  template <class Meanwhile>
  __device__ __forceinline__ void accumulate(const Probabilities& p, Meanwhile meanwhile) {
    int product = 0;
#pragma unroll
    for (int n = 0; n < kNTiles; ++n)
#pragma unroll
      for (int d = 0; d < kDTiles; d += 4) {
        unsigned v[4];
        load_v(v, slots_.v, n, d);
#pragma unroll
        for (int i = 0; i < (kDTiles - d < 4 ? kDTiles - d : 4); ++i)
#pragma unroll
          for (int m = 0; m < kMTiles; ++m) {
            Element::multiply_add(acc_o_[m][d + i], p[m][n][0], p[m][n][1], v[i]);
            meanwhile(product++);
          }
      }
  }

  // ---- the iterations, n = n_block_ - 1 ----

  // Down to tile n_end, where some rows do not see some keys; a warp leaves out tiles that none of its rows sees. One
  // thing comes after the other here: these iterations are few.
  __device__ __forceinline__ void masked_iterations(int n_end, const TileRange& of_warp) {
    while (n_block_ > n_end) {
      KeysInFlight k;
      ValuesInFlight v;
      prefetch_bounded(k, v, next_slots());
      if (is_waiting(of_warp)) use_exponents();
      if (sees(of_warp, n_block_ - 1) && is_shown()) {
        load_first_k(slots_.k);
        multiply_keys();
        products_to_scores();
        apply_mask<Columns>(scores_.s, block_.sequence, lane_query(), lane_key());
        if constexpr (kHasBlockMask && !UserMask::kIsTrivial)
          if (n_block_ > listed_.whole()) apply_mask<Columns>(scores_.s, pair_mask_, lane_query(), lane_key());
        float remainder[2 * kMTiles] = {};
        if (softmax_.must_correct(scores_)) softmax_.correct(scores_, acc_o_, remainder);
        softmax_.to_exponents(scores_, remainder, exponents_);
        is_waiting_ = true;
      } else if constexpr (Variant::kHidesTiles) {
        leave_none_waiting();
      }
      fetch_pairs<false>(n_block_ - 2);
      slots_ = next_slots();
      commit(k, v, slots_);
      leave_tile();
    }
    load_first_k(slots_.k);
  }

  __device__ __forceinline__ void leave_tile() {
    --n_block_;
    if constexpr (kHasBlockMask) listed_.step();
  }

  // Of tile n_block_.
  __device__ __forceinline__ void to_probabilities(Exponents& t, Probabilities& p) {
    typename Dropout::Kept kept[Dropout::kLaneGroups];
    if constexpr (Traits::kHasDropout) {
      dropout_.make(first_row(), n_block_ * Traits::kBlockN, lane_);
#pragma unroll
      for (int g = 0; g < Dropout::kLaneGroups; ++g) kept[g] = dropout_.get(g, lane_);
    }
    softmax_.to_probabilities(t, p,
                              [&](int r, int n, int c) { return Dropout::keeps(kept[Dropout::group(n)], r, n, c); });
  }

  // O += P V of a tile whose exponents wait, and whose V has come.
  __device__ __forceinline__ void use_exponents() {
    Probabilities p;
    to_probabilities(exponents_, p);
    accumulate(p, [](int) {});
  }

  // Down to tile n_end, where every row sees every key. The correction stands outside the loop that nearly every
  // iteration stays in.
  __device__ __forceinline__ void unmasked_iterations(int n_end, const TileRange& of_warp) {
    while (n_block_ > n_end) {
      bool must_correct = false;
      if (!is_shown())
        pass();
      else if (!is_whole())
        masked_iterations(n_block_ - 1, of_warp);
      else
        do {
          iterate();
          const float largest = softmax_.to_exponents(scores_, exponents_);
          must_correct = any_in_warp(largest > kMaxRise);
        } while (n_block_ > n_end && !must_correct && is_shown() && is_whole());
      if (must_correct) softmax_.correct_exponents(exponents_, acc_o_);
    }
  }

  // Whether all keys of the tile exist, which may be any of those that are listed.
  __device__ __forceinline__ bool is_whole() const {
    return !kHasBlockMask || (tile() + 1) * Traits::kBlockN <= block_.sequence.seqlen_k();
  }

  // ---- tiles that an attn_bias hides from all rows of the warp ----

  // Does some row see some key of the next iteration's tile?
  __device__ __forceinline__ bool is_shown() const {
    if constexpr (!Variant::kHidesTiles) return true;
    bool is_shown = false;
#pragma unroll
    for (int r = 0; r < (Variant::kIsOneRow ? 1 : 2 * kMTiles); ++r) is_shown |= Variant::shows(fetched_[r]);
    return any_in_warp(is_shown);
  }

  // Whether the exponents of tile n_block_ wait for their V.
  __device__ __forceinline__ bool is_waiting(const TileRange& of_warp) const {
    return Variant::kHidesTiles ? is_waiting_ : sees(of_warp, n_block_);
  }
  __device__ __forceinline__ void leave_none_waiting() {
    is_waiting_ = false;
    for_each(exponents_.t, [](float& t, int, int) { t = -infinity(); });  // an iteration uses some in any case
  }

  // An iteration that leaves its tile out.
  __device__ __forceinline__ void pass() {
    KeysInFlight k;
    ValuesInFlight v;
    const Slots next = next_slots();
    prefetch(k, v, next);
    fetch_pairs<true>(n_block_ - 2);
    if (is_waiting_) use_exponents();
    leave_none_waiting();
    commit(k, v, next);
    load_first_k(next.k);
    slots_ = next;
    leave_tile();
  }

  // From the exponents of tile n + 1 to the scores of tile n. The barrier stands among the products, so that warps
  // leave it with work to do. Which product does what is settled when the loop is unrolled.
  __device__ __forceinline__ void iterate() {
    const Slots next = next_slots();
    Exponents t;
    Probabilities p;
    KeysInFlight k;
    ValuesInFlight v;
    copy(exponents_.t, t.t);
    to_probabilities(t, p);
    multiply_keys();
    products_to_scores();
    accumulate(p, [&](int product) {
      if (product == Points::kPrefetch) {
        prefetch(k, v, next);
        fetch_pairs<true>(n_block_ - 2);
      }
      if (product == Points::kCommit) commit(k, v, next);
      if (product == Points::kFirstKeys) load_first_k(next.k);
    });
    slots_ = next;
    leave_tile();
    is_waiting_ = true;
  }

  // The lane's first row and column of scores_.
  __device__ __forceinline__ int lane_query() const { return first_row() + lane_row(lane_); }
  __device__ __forceinline__ int lane_key() const { return tile() * Traits::kBlockN + Columns::first(lane_); }

  // ---- the output ----

  // out = O / row_sum.
  __device__ __forceinline__ void write_out() {
    const BlockInfo<Traits> block(params_, reread_block_in_grid());
    const int thread = reread_thread_in_block();
    const int lane = thread % 32, warp = thread / 32;
    const int row = block.m_begin + warp * Tile::kRowsPerWarp;
    const TensorStrides& strides = params_.out_strides;
    Bits* out = static_cast<Bits*>(params_.out) + block.sequence.query_offset(strides, block.head) + row * strides.row;
    float inverse[2 * kMTiles];
#pragma unroll
    for (int r = 0; r < 2 * kMTiles; ++r) {
      inverse[r] = finish_row<kMayHideRows>(params_, block, row + lane_row(lane) + 8 * r, softmax_.row_max[r],
                                            softmax_.total(r), lane_column(lane) == 0);
      if constexpr (Traits::kHasDropout) inverse[r] *= params_.dropout.scale;
    }
    Tile::Output::template write<MemoryOrder>(acc_o_, inverse, out, strides.row, block.sequence.seqlen_q() - row, 0,
                                              warp * Tile::kStagingWarpBytes, lane);
  }

  const FlashFwdParams& params_;
  const BlockInfo<Traits> block_;
  const int lane_, warp_;
  Rows softmax_;
  Variant variant_;
  Dropout dropout_;
  ListedTiles<Traits::kBlockN> listed_;
  PairMask pair_mask_;
  FetchedTile<kMTiles, kNTiles, Variant, Columns> fetched_;  // for the scores of the next iteration
  KeyStream k_stream_;
  ValueStream v_stream_;
  typename Tile::QueryFragments query_;
  int n_block_;  // the tile of exponents_; the next iteration is that of tile n_block_ - 1
  Slots slots_;  // of the next iteration
  bool is_waiting_;
  KeyFragment first_k_[kNTiles / 2];
  Scores scores_;
  Exponents exponents_;
  Accumulator<kMTiles, kDTiles> acc_o_ = {};
};

template <class Traits>
__device__ __forceinline__ void flash_fwd(const FlashFwdParams& params) {
  FlashFwd<Traits>(params).run();
}
