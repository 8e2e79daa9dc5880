// Forward attention of few queries: what counts is how fast keys and values come from memory.
//
// A block has kBlockM rows of one key head: row r is query r / group of query head r % group of those that share the
// head, so that keys are read once for all of them. A warp has 16 or 32 of the rows; the warps that have the same ones
// take turns with tiles of kBlockN keys. Other blocks have other parts of the keys (splits).
//
// K and V go from global memory straight into the operands of tensor instructions, 16 bytes a lane, and wait in
// registers: nothing is shared, nothing waits for a barrier, and a warp has the next tile's K on its way while it works
// on O, and its V while it works on S. The order of the dims in a product's sum is free, and so is that of O's columns:
//
//   S = Q K^T   lane 4g + t has dims 32c + 8t .. + 7 of key g (and of rows g, g + 8 of Q). Its word j is the B operand
//               (A operand) of product j, whose dims 2t', 2t' + 1 are 32c + 8t' + 2j and the one behind it.
//   O += P V    lane 4g + t has dims 64c + 8g .. + 7 of keys 2t and 2t + 1. Element j of both, packed, is the B operand
//               of product j, whose column g' is dim 64c + 8g' + j. So in O a lane has dims 64c + 16t .. + 15.
#pragma once

#include "accumulator.cuh"
#include "flash_decode_params.cuh"
#include "key_rows.cuh"
#include "paged_stream.cuh"
#include "primitives.cuh"
#include "row_parts.cuh"
#include "score_variant.cuh"
#include "sequence.cuh"
#include "sink.cuh"
#include "softmax.cuh"
#include "tile_copy.cuh"

template <class Traits>
struct FlashDecodeTile {
  // Of a warp. O of 32 rows has room in registers up to head dim 128.
  static constexpr int kMostRows = Traits::kHeadDim <= 128 && Traits::kHeadDimV <= 128 ? 32 : 16;
  static constexpr int kRows = Traits::kBlockM < kMostRows ? Traits::kBlockM : kMostRows;
  static constexpr int kMTiles = kRows / 16;

  static constexpr int kRowGroups = Traits::kBlockM / kRows;       // of warps that share rows
  static constexpr int kKeyGroups = Traits::kNWarps / kRowGroups;  // of warps that share keys
  static_assert(kRowGroups * kKeyGroups == Traits::kNWarps, "every group of rows has as many warps");

  // Shared memory. First the chunks of Q that registers have no room for: of each group of rows, of each chunk, of each
  // of the lane's rows, as the lanes read them. Then, in their place, 64 dims of O of every warp but those of the first
  // key group, which put them together; as the lanes have them, too. Behind both those warps' row_max and row_sum.
  static constexpr int kKeyChunks = (Traits::kHeadDim + 31) / 32;
  static constexpr int kRegisterChunks = (kRegisterDimsOf<Traits, Traits::kHeadDim> + 31) / 32;
  static constexpr int kSharedChunks = kKeyChunks - kRegisterChunks;
  static constexpr int kChunkOfLanes = 32 * kChunkBytes;
  static constexpr int kQueryBytes = kRowGroups * kSharedChunks * 2 * kMTiles * kChunkOfLanes;
  static constexpr int kMergedDims = 64;
  static constexpr int kMergedWarps = (kKeyGroups - 1) * kRowGroups;
  static constexpr int kWarpBytes = kRows * kMergedDims * 4;
  static constexpr int kRowsBegin = kQueryBytes > kMergedWarps* kWarpBytes ? kQueryBytes : kMergedWarps * kWarpBytes;
  static constexpr int kRowBytes = 8;
  static constexpr int kSharedBytes = kRowsBegin + kMergedWarps * kRows * kRowBytes;
};

template <class Traits>
class FlashDecode {
  using Tile = FlashDecodeTile<Traits>;
  using Element = typename Traits::Element;
  using Bits = typename Traits::Stored::Bits;
  using Matrix = KeyMatrix<Traits>;
  static constexpr int kGroup = Traits::kGroupSize;
  static constexpr int kKeys = Traits::kBlockN, kSteps = kKeys / 8;
  static constexpr int kKeysOfAllWarps = Tile::kKeyGroups * kKeys;
  static constexpr int kKeyChunks = Tile::kKeyChunks, kValueChunks = (Traits::kHeadDimV + 63) / 64;
  static constexpr int kMTiles = Tile::kMTiles, kLaneRows = 2 * kMTiles;

  template <bool kIsInOnePage>
  using Keys = KeyTile<Traits, kKeys, kIsInOnePage>;  // where a warp's next ones lie
  using Variant = ScoreVariant<Traits>;
  using Columns = ColumnOrder<false, kSteps>;
  using Fetched = typename Variant::template Fetched<2 * kSteps, Columns::Keys::kAtOnce>[kLaneRows];  // heads differ
  using Rows = Softmax<Element, kMTiles, kSteps, Variant::kIsLarge>;
  using Output = Accumulator<kMTiles, 8 * kValueChunks>;
  using QueryChunks = Vec16[kLaneRows][Tile::kRegisterChunks > 0 ? Tile::kRegisterChunks : 1];  // of the lane's rows
  using KeyChunks = Vec16[kSteps][kKeyChunks];
  using ValueChunks = Vec16[kSteps][2][kValueChunks];

 public:
  __device__ __forceinline__ FlashDecode(const FlashDecodeParams& params, int block)
      : params_(params),
        sequence_(params, block / params.num_m_blocks / params.num_splits / params.num_heads_k),
        head_k_(block / params.num_m_blocks / params.num_splits % params.num_heads_k),
        split_(block / params.num_m_blocks % params.num_splits),
        block_row_(block % params.num_m_blocks * Traits::kBlockM),
        lane_(thread_in_block() % 32),
        warp_(thread_in_block() / 32),
        row_group_(warp_ % Tile::kRowGroups),
        key_group_(warp_ / Tile::kRowGroups),
        first_row_(block_row_ + row_group_ * Tile::kRows),
        softmax_(params.softmax_scale_log2) {}

  __device__ __forceinline__ void run() {
    if (block_row_ >= rows()) return;
    if (Tile::kSharedChunks > 0) {
      share_queries();
      block_barrier();
    }
    if (first_row_ < rows()) attend();
    RowPart rows_of_lane[kLaneRows];
    put_together(rows_of_lane);
    if (key_group_ == 0) write(rows_of_lane);
  }

 private:
  // ---- rows and keys ----

  __device__ __forceinline__ int rows() const { return sequence_.seqlen_q() * kGroup; }
  __device__ __forceinline__ int row_of_lane(int r) const { return first_row_ + lane_row(lane_) + 8 * r; }
  static __device__ __forceinline__ int query_of(int row) { return row / kGroup; }
  __device__ __forceinline__ int head_of(int row) const { return head_k_ * kGroup + row % kGroup; }

  // The part of [first, end) that the split has.
  struct KeyRange {
    int first, end;
  };
  __device__ __forceinline__ KeyRange of_split(int first, int end) const {
    const int begin = split_ * params_.keys_per_split;
    return {Sequence<Traits>::maximum(first, begin), Sequence<Traits>::minimum(end, begin + params_.keys_per_split)};
  }
  __device__ __forceinline__ KeyRange seen_by(int query) const {
    return of_split(sequence_.first_key(query), sequence_.end_key(query));
  }

  // ---- memory to operands ----

  // Dims [dim, dim + 8) of a row, or zeros. Of every row kSpan dims are read at a time, which may be more than it has.
  template <class TensorTraits, int kSpan>
  static __device__ __forceinline__ void load(Vec16& chunk, const Bits* row, int dim, bool is_there) {
    constexpr int kDims = TensorTraits::kHeadDim;
    if (is_there && (kDims % kSpan == 0 || dim < kDims))
      load_chunk<TensorTraits>(chunk, row + dim, dim, 1);
    else
      chunk = Vec16{};
  }

  // Chunk c of the lane's row r.
  __device__ __forceinline__ void load_query(Vec16& chunk, int r, int c) const {
    const int row = row_of_lane(r);
    const TensorStrides& strides = params_.q_strides;
    const Bits* const query = static_cast<const Bits*>(params_.q) + sequence_.query_offset(strides, head_of(row)) +
                              query_of(row) * strides.row;
    load<Traits, 32>(chunk, query, 32 * c + lane_ % 4 * kChunkDims, row < rows());
#pragma unroll
    for (int j = 0; j < 4; ++j) chunk.word[j] ^= params_.sign;
    to_elements<Traits>(chunk);
  }

  __device__ __forceinline__ void load_queries(QueryChunks& q) const {
#pragma unroll
    for (int r = 0; r < kLaneRows; ++r)
#pragma unroll
      for (int c = 0; c < Tile::kRegisterChunks; ++c) load_query(q[r][c], r, c);
  }

  __device__ __forceinline__ SharedAddress shared_query(int r, int c) const {
    const int place = (row_group_ * Tile::kSharedChunks + c - Tile::kRegisterChunks) * kLaneRows + r;
    return place * Tile::kChunkOfLanes + lane_ * kChunkBytes;
  }
  __device__ __forceinline__ void share_queries() const {
    if (key_group_ > 0) return;
#pragma unroll
    for (int c = Tile::kRegisterChunks; c < kKeyChunks; ++c)
#pragma unroll
      for (int r = 0; r < kLaneRows; ++r) {
        Vec16 chunk;
        load_query(chunk, r, c);
        store_shared_16B(shared_query(r, c), chunk);
      }
  }

  __device__ __forceinline__ Matrix keys(const void* tensor, const TensorStrides& strides) const {
    return key_matrix(params_, sequence_, tensor, strides, head_k_);
  }

  // The tile's first `count` keys; the others are zero.
  template <class Keys>
  __device__ __forceinline__ void load_keys(KeyChunks& k, const Matrix& matrix, const Keys& tile, int count) const {
#pragma unroll
    for (int n = 0; n < kSteps; ++n) {
      const int i = 8 * n + lane_ / 4;
      const Bits* const row = tile.row(matrix, i, i < count);
#pragma unroll
      for (int c = 0; c < kKeyChunks; ++c) load<Traits, 32>(k[n][c], row, 32 * c + lane_ % 4 * kChunkDims, i < count);
    }
  }
  template <class Keys>
  __device__ __forceinline__ void load_values(ValueChunks& v, const Matrix& matrix, const Keys& tile, int count) const {
#pragma unroll
    for (int n = 0; n < kSteps; ++n)
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        const int i = 8 * n + lane_ % 4 * 2 + pair;
        const Bits* const row = tile.row(matrix, i, i < count);
#pragma unroll
        for (int c = 0; c < kValueChunks; ++c)
          load<OfValues<Traits>, 64>(v[n][pair][c], row, 64 * c + lane_ / 4 * kChunkDims, i < count);
      }
  }

  // ---- the two products ----

  __device__ __forceinline__ void multiply_keys(typename Rows::Scores& scores, const QueryChunks& q,
                                                const KeyChunks& k) const {
#pragma unroll
    for (int c = 0; c < kKeyChunks; ++c) {
      Vec16 rows[kLaneRows];
#pragma unroll
      for (int r = 0; r < kLaneRows; ++r)
        if (c < Tile::kRegisterChunks)
          rows[r] = q[r][c < Tile::kRegisterChunks ? c : 0];
        else
          load_shared_16B(rows[r], shared_query(r, c));
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int n = 0; n < kSteps; ++n) {
          const unsigned keys = to_elements<Traits>(k[n][c].word[j]);
#pragma unroll
          for (int m = 0; m < kMTiles; ++m)
            if (c == 0 && j == 0)
              Element::multiply(scores.s[m][n], rows[2 * m].word[j], rows[2 * m + 1].word[j], keys);
            else
              Element::multiply_add(scores.s[m][n], rows[2 * m].word[j], rows[2 * m + 1].word[j], keys);
        }
    }
  }

  __device__ __forceinline__ void accumulate(const typename Rows::Probabilities& p, const ValueChunks& v) {
#pragma unroll
    for (int n = 0; n < kSteps; ++n)
#pragma unroll
      for (int c = 0; c < kValueChunks; ++c)
#pragma unroll
        for (int j = 0; j < kChunkDims; ++j) {
          const unsigned first = v[n][0][c].word[j / 2], second = v[n][1][c].word[j / 2];
          const unsigned both =
              to_elements<Traits>(j % 2 == 0 ? low_halves(first, second) : high_halves(first, second));
#pragma unroll
          for (int m = 0; m < kMTiles; ++m) Element::multiply_add(acc_o_[m][8 * c + j], p[m][n][0], p[m][n][1], both);
        }
  }

  // ---- the main loop ----

  __device__ __forceinline__ void attend() {
    const Matrix key_rows = keys(params_.k, params_.k_strides), value_rows = keys(params_.v, params_.v_strides);
    if constexpr (Traits::kIsPaged)
      if (key_rows.hold_tiles(kKeys)) return attend<Keys<true>>(key_rows, value_rows);
    attend<Keys<false>>(key_rows, value_rows);
  }

  // Every row of the warp sees the keys [whole.first, whole.end) of those that some row sees.
  template <class Keys>
  __device__ __forceinline__ void attend(const Matrix& key_rows, const Matrix& value_rows) {
    const int first_query = query_of(first_row_);
    const int last_query = query_of(Sequence<Traits>::minimum(first_row_ + Tile::kRows, rows()) - 1);
    const KeyRange seen = of_split(sequence_.first_key(first_query), sequence_.end_key(last_query));
    const KeyRange whole = of_split(sequence_.first_key(last_query), sequence_.end_key(first_query));
    QueryChunks q;
    KeyChunks k;
    ValueChunks v;
    load_queries(q);
    prepare_variants();
    int key = seen.first / kKeys * kKeys + key_group_ * kKeys;
    Keys tile(key_rows, key, seen.end), next(key_rows, key + kKeysOfAllWarps, seen.end);
    load_keys(k, key_rows, tile, seen.end - key);
    load_values(v, value_rows, tile, seen.end - key);
    Fetched fetched;
    if (key < seen.end) fetch_pairs(fetched, key);
    for (; key < seen.end; key += kKeysOfAllWarps) {
      const int left = seen.end - key - kKeysOfAllWarps;
      tile = next;
      typename Rows::Scores scores;
      multiply_keys(scores, q, k);
      load_keys(k, key_rows, tile, left);
      next = Keys(key_rows, key + 2 * kKeysOfAllWarps, seen.end);
      to_scores(scores, fetched, key);
      fetch_pairs(fetched, key + kKeysOfAllWarps);
      if (key < whole.first || key + kKeys > whole.end) mask(scores, key);
      typename Rows::Probabilities p;
      to_probabilities(scores, p);
      accumulate(p, v);
      load_values(v, value_rows, tile, left);
    }
  }

  __device__ __forceinline__ void prepare_variants() {
#pragma unroll
    for (int r = 0; r < kLaneRows; ++r)
      variant_[r].prepare(params_, sequence_, head_of(row_of_lane(r)), reciprocal(params_.softmax_scale_log2));
  }

  // What the scores of a tile's keys need from memory.
  __device__ __forceinline__ void fetch_pairs(Fetched& fetched, int key) const {
    if constexpr (Variant::kReadsPairs)
#pragma unroll
      for (int r = 0; r < kLaneRows; ++r)
        variant_[r].template fetch<typename Columns::Keys, 2 * kSteps, false, false>(
            fetched[r], sequence_, query_of(row_of_lane(r)), key + lane_column(lane_));
  }

  __device__ __forceinline__ void to_scores(typename Rows::Scores& scores, const Fetched& fetched, int key) const {
#pragma unroll
    for (int r = 0; r < kLaneRows; ++r) {
      const int query = query_of(row_of_lane(r));
      for_each_in_row(scores.s, r, [&](float& s, int column) {
        const int of_key = key + lane_column(lane_) + column;
        s = variant_[r].bias(variant_[r].score(s, query, of_key), fetched[r], column / 8 * 2 + column % 2, sequence_,
                             query, of_key);
      });
    }
  }

  __device__ __forceinline__ void mask(typename Rows::Scores& scores, int key) const {
#pragma unroll
    for (int r = 0; r < kLaneRows; ++r) {
      const KeyRange seen = seen_by(query_of(row_of_lane(r)));
      for_each_in_row(scores.s, r, [&](float& s, int column) {
        const int at = key + lane_column(lane_) + column;
        if (at < seen.first || at >= seen.end) s = -infinity();
      });
    }
  }

  __device__ __forceinline__ void to_probabilities(const typename Rows::Scores& scores,
                                                   typename Rows::Probabilities& p) {
    float remainder[kLaneRows] = {};
    if (softmax_.must_correct(scores)) softmax_.correct(scores, acc_o_, remainder);
    typename Rows::Exponents exponents;
    softmax_.to_exponents(scores, remainder, exponents);
    softmax_.to_probabilities(exponents, p, [](int, int, int) { return true; });
  }

  // ---- the warps that have the same rows, put together ----

  // Of a warp of key group `group`, which is not the first.
  __device__ __forceinline__ int merged_warp(int group) const { return (group - 1) * Tile::kRowGroups + row_group_; }
  __device__ __forceinline__ SharedAddress shared_row(int group, int r) const {
    return Tile::kRowsBegin + (merged_warp(group) * Tile::kRows + lane_row(lane_) + 8 * r) * Tile::kRowBytes;
  }
  __device__ __forceinline__ SharedAddress shared_output(int group, int r, int quarter) const {
    return merged_warp(group) * Tile::kWarpBytes + ((4 * r + quarter) * 32 + lane_) * kChunkBytes;
  }

  // Element i of the 16 dims 64c + 16t and on that the lane has of its row r.
  __device__ __forceinline__ float& output(int r, int c, int i) {
    return acc_o_[r / 2][8 * c + i % 8][r % 2 * 2 + i / 8];
  }

  // In the warps of the first key group: their rows of all keys that the block has, O too.
  __device__ __forceinline__ void put_together(RowPart (&all)[kLaneRows]) {
#pragma unroll
    for (int r = 0; r < kLaneRows; ++r) all[r] = {softmax_.row_max[r], softmax_.total(r)};
    if (Tile::kKeyGroups > 1) {
      if (Tile::kSharedChunks > 0) block_barrier();  // every warp is done with Q
      if (key_group_ > 0) store_rows(all);
      float weight[Tile::kKeyGroups][kLaneRows];
#pragma unroll
      for (int c = 0; c < kValueChunks; ++c) {
        if (c > 0) block_barrier();  // the dims before are out of shared memory
        if (key_group_ > 0) store_outputs(c);
        block_barrier();
        if (key_group_ > 0) continue;
        if (c == 0) add_rows(all, weight);
        add_outputs(c, weight);
      }
    }
  }

  __device__ __forceinline__ void store_rows(const RowPart (&part)[kLaneRows]) const {
    if (lane_column(lane_) != 0) return;
#pragma unroll
    for (int r = 0; r < kLaneRows; ++r) {
      store_shared_f32(shared_row(key_group_, r), part[r].row_max);
      store_shared_f32(shared_row(key_group_, r) + 4, part[r].row_sum);
    }
  }

  // And what the parts' O are to be multiplied by.
  __device__ __forceinline__ void add_rows(RowPart (&all)[kLaneRows],
                                           float (&weight)[Tile::kKeyGroups][kLaneRows]) const {
#pragma unroll
    for (int r = 0; r < kLaneRows; ++r) {
      RowPart parts[Tile::kKeyGroups] = {all[r]};
#pragma unroll
      for (int group = 1; group < Tile::kKeyGroups; ++group) {
        const SharedAddress at = shared_row(group, r);
        parts[group] = {load_shared_f32(at), load_shared_f32(at + 4)};
        all[r].row_max = max_ignoring_nan(all[r].row_max, parts[group].row_max);
      }
      all[r].row_sum = 0.0f;
#pragma unroll
      for (int group = 0; group < Tile::kKeyGroups; ++group) {
        weight[group][r] = weight_of(parts[group], all[r].row_max);
        all[r].row_sum = fma_rounded(parts[group].row_sum, weight[group][r], all[r].row_sum);
      }
    }
  }

  __device__ __forceinline__ void store_outputs(int c) {
#pragma unroll
    for (int r = 0; r < kLaneRows; ++r)
#pragma unroll
      for (int quarter = 0; quarter < 4; ++quarter) {
        Vec16 four;
#pragma unroll
        for (int j = 0; j < 4; ++j) four.word[j] = bits_of_float(output(r, c, 4 * quarter + j));
        store_shared_16B(shared_output(key_group_, r, quarter), four);
      }
  }

  __device__ __forceinline__ void add_outputs(int c, const float (&weight)[Tile::kKeyGroups][kLaneRows]) {
#pragma unroll
    for (int r = 0; r < kLaneRows; ++r)
#pragma unroll
      for (int quarter = 0; quarter < 4; ++quarter) {
#pragma unroll
        for (int j = 0; j < 4; ++j) output(r, c, 4 * quarter + j) *= weight[0][r];
#pragma unroll
        for (int group = 1; group < Tile::kKeyGroups; ++group) {
          Vec16 four;
          load_shared_16B(four, shared_output(group, r, quarter));
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            float& o = output(r, c, 4 * quarter + j);
            o = fma_rounded(float_of_bits(four.word[j]), weight[group][r], o);
          }
        }
      }
  }

  // ---- the result ----

  __device__ __forceinline__ void write(RowPart (&all)[kLaneRows]) {
#pragma unroll
    for (int r = 0; r < kLaneRows; ++r) {
      const int row = row_of_lane(r);
      if (row >= rows()) continue;
      const KeyRange seen = seen_by(query_of(row));
      if (seen.first >= seen.end || (Variant::kReadsPairs && all[r].row_sum == 0.0f)) all[r].row_max = -infinity();
      // Of several splits none has the sink: it counts once, where they are put together.
      float weight = 1.0f;
      if constexpr (Traits::kHasSink)
        if (params_.num_splits == 1) weight = add_sink(all[r], params_.sinks, head_of(row));
#pragma unroll
      for (int c = 0; c < kValueChunks; ++c)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int dim = 64 * c + lane_ % 4 * 16 + kChunkDims * half;
          float o[kChunkDims];
#pragma unroll
          for (int i = 0; i < kChunkDims; ++i) o[i] = output(r, c, kChunkDims * half + i);
          if constexpr (Traits::kHasSink)
#pragma unroll
            for (int i = 0; i < kChunkDims; ++i) o[i] *= weight;
          if (dim >= Traits::kTileDimsV) continue;
          if (params_.num_splits == 1)
            write_result(row, dim, all[r], o);
          else
            write_part(row, dim, all[r], o);
        }
    }
  }

  __device__ __forceinline__ void write_result(int row, int dim, const RowPart& all,
                                               const float (&o)[kChunkDims]) const {
    const TensorStrides& strides = params_.out_strides;
    Bits* const out = static_cast<Bits*>(params_.out) + sequence_.query_offset(strides, head_of(row)) +
                      query_of(row) * strides.row + dim;
    Vec16 chunk;
    pack_chunk<typename Traits::Stored>(chunk, o, inverse_sum(all));
    store_chunk<OfValues<Traits>>(out, dim, chunk);
    if (dim == 0) store_global_f32(params_.softmax_lse + statistics_of(row), log_sum_exp(all));
  }

  __device__ __forceinline__ void write_part(int row, int dim, const RowPart& all, const float (&o)[kChunkDims]) const {
    const long long place = static_cast<long long>(split_) * params_.total_rows + statistics_of(row);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      Vec16 four;
#pragma unroll
      for (int j = 0; j < 4; ++j) four.word[j] = bits_of_float(o[4 * half + j]);
      store_global_16B(params_.partial_out + place * Traits::kTileDimsV + dim + 4 * half, four);
    }
    if (dim != 0) return;
    store_global_f32(params_.partial_rows + 2 * place, all.row_max);
    store_global_f32(params_.partial_rows + 2 * place + 1, all.row_sum);
  }

  __device__ __forceinline__ long long statistics_of(int row) const {
    return sequence_.statistics_offset(head_of(row), query_of(row));
  }

  const FlashDecodeParams& params_;
  const Sequence<Traits> sequence_;
  const int head_k_, split_, block_row_;
  const int lane_, warp_, row_group_, key_group_;
  const int first_row_;  // of the warp
  Rows softmax_;
  Variant variant_[kLaneRows];  // of the lane's rows
  Output acc_o_ = {};
};

template <class Traits>
__device__ __forceinline__ void flash_decode(const FlashDecodeParams& params) {
  FlashDecode<Traits>(params, block_in_grid()).run();
}
