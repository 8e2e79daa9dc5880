// One sequence of the batch: where its rows lie, and which keys its queries see.
//
//               keys ->
//            +-----------------+
//   queries  |####\            |     Query i sees the keys [first_key(i), end_key(i)), a window around the diagonal
//      |     |######\          |     j = i + seqlen_k - seqlen_q, which ends in the bottom right corner.
//      v     | \######\        |
//            |   \######\      |     causal: the window's right half is empty, its left half has no end
//            |     \######\    |     full: neither half has an end
//            |       \######\  |
//            +-----------------+     Key j is seen by the queries [first_query(j), end_query(j)).
//
// All four bounds grow with the row that is asked about.
#pragma once

#include "attention_params.cuh"
#include "primitives.cuh"

// The tiles of columns that some row of a run sees are [begin, end). Every row of it sees those in [whole_begin,
// whole_end) whole; there may be none.
struct TileRange {
  int begin, whole_begin, whole_end, end;
};

template <class Traits>
class Sequence {
 public:
  Sequence() = default;

  template <class Params>
  __device__ __forceinline__ Sequence(const Params& params, int batch) : params_(&params), batch_(batch) {
    if constexpr (Traits::kIsVarlen) {
      q_begin_ = load_global_i32(params.cu_seqlens_q + batch);
      if constexpr (!Traits::kIsPaged) k_begin_ = load_global_i32(params.cu_seqlens_k + batch);
      seqlen_q_ = load_global_i32(params.cu_seqlens_q + batch + 1) - q_begin_;
      if constexpr (Traits::kIsPaged)
        seqlen_k_ = keys_in_pages();
      else
        seqlen_k_ = load_global_i32(params.cu_seqlens_k + batch + 1) - k_begin_;
    }
    if constexpr (Traits::kHasKeyLengths) take_key_lengths(params.cache);
  }

  __device__ __forceinline__ int batch() const { return batch_; }
  __device__ __forceinline__ int seqlen_q() const { return Traits::kIsVarlen ? seqlen_q_ : params_->seqlen_q; }
  __device__ __forceinline__ int seqlen_k() const { return kHasOwnKeys ? seqlen_k_ : params_->seqlen_k; }

  // The first of its keys among the rows that it has in k and v.
  __device__ __forceinline__ int first_key_row() const { return Traits::kHasKeyLengths ? leftpad_ : 0; }

  // ---- memory: element offsets from a tensor's first element ----

  __device__ __forceinline__ long long query_offset(const TensorStrides& strides, int head) const {
    return offset(strides, head, q_begin_);
  }
  __device__ __forceinline__ long long key_offset(const TensorStrides& strides, int head) const {
    if constexpr (Traits::kIsPaged) return head * strides.head;
    return offset(strides, head, k_begin_) + first_key_row() * strides.row;
  }

  // Of query row `row` in softmax_lse and delta.
  __device__ __forceinline__ long long statistics_offset(int head, int row) const {
    if constexpr (Traits::kIsVarlen) return static_cast<long long>(head) * params_->total_q + q_begin_ + row;
    return (static_cast<long long>(batch_) * params_->num_heads + head) * params_->seqlen_q + row;
  }

  // ---- what sees what ----

  // The key that lies on the diagonal is i + diagonal().
  __device__ __forceinline__ int diagonal() const { return seqlen_k() - seqlen_q(); }

  __device__ __forceinline__ int first_key(int query) const {
    if constexpr (!Traits::kIsLocal) return 0;
    // Rows beyond the last query see its last key at least, so that they have a maximum like all others.
    return maximum(minimum(query + diagonal(), seqlen_k() - 1) - params_->window_left, 0);
  }
  __device__ __forceinline__ int end_key(int query) const {
    if constexpr (Traits::kIsLocal) return minimum(query + diagonal() + params_->window_right + 1, seqlen_k());
    return Traits::kIsCausal ? minimum(query + diagonal() + 1, seqlen_k()) : seqlen_k();
  }
  __device__ __forceinline__ bool sees_keys(int query) const { return first_key(query) < end_key(query); }

  __device__ __forceinline__ int first_query(int key) const {
    if constexpr (Traits::kIsLocal) return maximum(key - diagonal() - params_->window_right, 0);
    return Traits::kIsCausal ? maximum(key - diagonal(), 0) : 0;
  }
  __device__ __forceinline__ int end_query(int key) const {
    if constexpr (!Traits::kIsLocal) return seqlen_q();
    return minimum(key - diagonal() + params_->window_left + 1, seqlen_q());
  }

  // Of the queries [query, query + rows), and of the keys [key, key + rows).
  __device__ __forceinline__ TileRange key_tiles(int query, int rows) const {
    const int last = minimum(query + rows, seqlen_q()) - 1, first = minimum(query, last);
    return tile_range(first_key(first), first_key(last), end_key(first), end_key(last));
  }
  __device__ __forceinline__ TileRange query_tiles(int key, int rows) const {
    const int last = minimum(key + rows, seqlen_k()) - 1, first = minimum(key, last);
    return tile_range(first_query(first), first_query(last), end_query(first), end_query(last));
  }

  static __device__ __forceinline__ int minimum(int a, int b) { return a < b ? a : b; }
  static __device__ __forceinline__ int maximum(int a, int b) { return a > b ? a : b; }

 private:
  static constexpr bool kHasOwnKeys = Traits::kIsVarlen || Traits::kHasKeyLengths;

  // Of varlen queries: cu_seqlens_k says how many, if it is there, and not where.
  __device__ __forceinline__ int keys_in_pages() const {
    if (params_->cu_seqlens_k == nullptr) return params_->seqlen_k;
    const int* const at = params_->cu_seqlens_k + batch_;
    return minimum(maximum(load_global_i32(at + 1) - load_global_i32(at), 0), params_->seqlen_k);
  }

  // Whatever they say, no row beyond the sequence's is read.
  template <class KeyCache>
  __device__ __forceinline__ void take_key_lengths(const KeyCache& cache) {
    const int rows = Traits::kIsVarlen ? seqlen_k_ : params_->seqlen_k;
    const int used =
        cache.used != nullptr ? minimum(load_global_i32(cache.used + batch_), rows) + cache.used_more : rows;
    const int leftpad = cache.leftpad != nullptr ? load_global_i32(cache.leftpad + batch_) : 0;
    const int end = minimum(maximum(used, 0), rows);
    leftpad_ = minimum(maximum(leftpad, 0), end);
    seqlen_k_ = end - leftpad_;
  }

  __device__ __forceinline__ long long offset(const TensorStrides& strides, int head, int begin) const {
    const long long of_head = head * strides.head;
    return of_head + (Traits::kIsVarlen ? begin * strides.row : batch_ * strides.batch);
  }

  // From the first and the last row's bounds.
  static __device__ __forceinline__ TileRange tile_range(int first_begin, int last_begin, int first_end, int last_end) {
    constexpr int kN = Traits::kBlockN;
    return {first_begin / kN, (last_begin + kN - 1) / kN, maximum(first_end, 0) / kN,
            (maximum(last_end, 0) + kN - 1) / kN};
  }

  const AttentionParams* params_;
  int batch_;
  int q_begin_, k_begin_, seqlen_q_, seqlen_k_;  // varlen; the last with key lengths too
  int leftpad_;                                  // with key lengths
};
