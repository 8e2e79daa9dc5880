// The two sides whose rows a block of the backward kernel may own, and what follows from that:
//
//                              QueryRows (dQ)    KeyRows (dK, dV)
//   row operands of S and dP   Q, dO             K, V
//   column operands            K, V              Q, dO
//   gradient from dS           dQ                dK
//   gradient from P            none              dV
//
// AllKeyRows are KeyRows where one block has all keys of a sequence: then it has all of dS, and makes dQ and delta too.
#pragma once

#include "flash_bwd_params.cuh"
#include "primitives.cuh"
#include "sequence.cuh"
#include "tile_copy.cuh"

enum class RowSide { kQueries, kKeys, kAllKeys };

// Heads of the tensors, from the sequence's first row on.
template <class Traits>
struct FlashBwdTensors {
  using Matrix = GlobalMatrix<typename Traits::Stored>;
  using Bits = typename Traits::Stored::Bits;

  const FlashBwdParams& params;
  const Sequence<Traits>& sequence;

  __device__ __forceinline__ Matrix q(int head) const { return queries(params.q, params.q_strides, head); }
  __device__ __forceinline__ Matrix k(int head) const { return keys(params.k, params.k_strides, head); }
  __device__ __forceinline__ Matrix v(int head) const { return keys(params.v, params.v_strides, head); }
  __device__ __forceinline__ Matrix dq(int head) const { return queries(params.dq, params.dq_strides, head); }
  __device__ __forceinline__ Matrix dk(int head) const { return keys(params.dk, params.dk_strides, head); }
  __device__ __forceinline__ Matrix dv(int head) const { return keys(params.dv, params.dv_strides, head); }
  __device__ __forceinline__ Matrix out(int head) const { return queries(params.out, params.out_strides, head); }
  __device__ __forceinline__ Matrix dout(int head) const {
    Matrix matrix = queries(params.dout, params.dout_strides, head);
    matrix.dim_stride = params.dout_dim_stride;
    return matrix;
  }

 private:
  __device__ __forceinline__ Matrix queries(const void* tensor, const TensorStrides& strides, int head) const {
    return {static_cast<const Bits*>(tensor) + sequence.query_offset(strides, head), strides.row};
  }
  __device__ __forceinline__ Matrix keys(const void* tensor, const TensorStrides& strides, int head) const {
    return {static_cast<const Bits*>(tensor) + sequence.key_offset(strides, head), strides.row};
  }
};

template <class Traits>
struct QueryRows {
  using Tensors = FlashBwdTensors<Traits>;
  using Matrix = typename Tensors::Matrix;

  static constexpr bool kColumnsAreQueries = false;
  static constexpr bool kMakesDv = false;
  static constexpr bool kMakesDq = false;  // beside its rows' gradients
  static constexpr int kQueryHeads = 1;    // whose gradients are summed
  // Causal blocks with the most columns go first, so that the short ones fill the last wave; most block masks hide what
  // a causal mask does.
  static constexpr bool kLastRowsFirst = Traits::kIsCausal || Traits::kHasBlockMask;
  // May a tile begin before the first column that some row of the block sees in it?
  static constexpr bool kHasFirstColumn = Traits::kIsLocal;

  static __device__ __forceinline__ int heads(const FlashBwdParams& params) { return params.num_heads; }
  static __device__ __forceinline__ int query(int row, int /*column*/) { return row; }
  static __device__ __forceinline__ int key(int /*row*/, int column) { return column; }

  static __device__ __forceinline__ Matrix s_rows(const Tensors& of, int head) { return of.q(head); }
  static __device__ __forceinline__ Matrix dp_rows(const Tensors& of, int head) { return of.dout(head); }
  static __device__ __forceinline__ Matrix s_columns(const Tensors& of, int head_q) {
    return of.k(head_q / Traits::kGroupSize);
  }
  static __device__ __forceinline__ Matrix dp_columns(const Tensors& of, int head_q) {
    return of.v(head_q / Traits::kGroupSize);
  }
  static __device__ __forceinline__ Matrix ds_gradient(const Tensors& of, int head) { return of.dq(head); }

  static __device__ __forceinline__ int seqlen_rows(const Sequence<Traits>& sequence) { return sequence.seqlen_q(); }
  static __device__ __forceinline__ int seqlen_columns(const Sequence<Traits>& sequence) { return sequence.seqlen_k(); }
  static __device__ __forceinline__ TileRange column_tiles(const Sequence<Traits>& sequence, int row, int rows) {
    return sequence.key_tiles(row, rows);
  }
  static __device__ __forceinline__ int first_column(const Sequence<Traits>& sequence, int row) {
    return sequence.first_key(row);
  }
  static __device__ __forceinline__ int end_column(const Sequence<Traits>& sequence, int row) {
    return sequence.end_key(row);
  }
};

template <class Traits>
struct KeyRows {
  using Tensors = FlashBwdTensors<Traits>;
  using Matrix = typename Tensors::Matrix;

  static constexpr bool kColumnsAreQueries = true;
  static constexpr bool kMakesDv = true;
  static constexpr bool kMakesDq = false;
  static constexpr int kQueryHeads = Traits::kGroupSize;
  static constexpr bool kLastRowsFirst = false;
  static constexpr bool kHasFirstColumn = Traits::kIsLocal || Traits::kIsCausal;

  static __device__ __forceinline__ int heads(const FlashBwdParams& params) { return params.num_heads_k; }
  static __device__ __forceinline__ int query(int /*row*/, int column) { return column; }
  static __device__ __forceinline__ int key(int row, int /*column*/) { return row; }

  static __device__ __forceinline__ Matrix s_rows(const Tensors& of, int head) { return of.k(head); }
  static __device__ __forceinline__ Matrix dp_rows(const Tensors& of, int head) { return of.v(head); }
  static __device__ __forceinline__ Matrix s_columns(const Tensors& of, int head_q) { return of.q(head_q); }
  static __device__ __forceinline__ Matrix dp_columns(const Tensors& of, int head_q) { return of.dout(head_q); }
  static __device__ __forceinline__ Matrix ds_gradient(const Tensors& of, int head) { return of.dk(head); }

  static __device__ __forceinline__ int seqlen_rows(const Sequence<Traits>& sequence) { return sequence.seqlen_k(); }
  static __device__ __forceinline__ int seqlen_columns(const Sequence<Traits>& sequence) { return sequence.seqlen_q(); }
  static __device__ __forceinline__ TileRange column_tiles(const Sequence<Traits>& sequence, int row, int rows) {
    return sequence.query_tiles(row, rows);
  }
  static __device__ __forceinline__ int first_column(const Sequence<Traits>& sequence, int row) {
    return sequence.first_query(row);
  }
  static __device__ __forceinline__ int end_column(const Sequence<Traits>& sequence, int row) {
    return sequence.end_query(row);
  }
};

template <class Traits>
struct AllKeyRows : KeyRows<Traits> {
  static constexpr bool kMakesDq = true;
};

template <class Traits, RowSide kSide>
struct SideOf {
  using Type = QueryRows<Traits>;
};
template <class Traits>
struct SideOf<Traits, RowSide::kKeys> {
  using Type = KeyRows<Traits>;
};
template <class Traits>
struct SideOf<Traits, RowSide::kAllKeys> {
  using Type = AllKeyRows<Traits>;
};
