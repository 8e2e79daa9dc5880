// New keys and values go into their cache, keys turned by their places; queries, turned, into a tensor of their own.
//
// A warp has a row of one head. Dims are read one at a time: they come in pairs that may lie apart, and rows are few.
#pragma once

#include "flash_append_params.cuh"
#include "primitives.cuh"
#include "tile_copy.cuh"

template <class Traits>
class FlashAppend {
  using Stored = typename Traits::Stored;
  using Bits = typename Stored::Bits;

 public:
  __device__ __forceinline__ explicit FlashAppend(const FlashAppendParams& params) : params_(params) {}

  // Rows of a sequence: new keys, new values, queries.
  __device__ __forceinline__ void run(int row, int lane) const {
    const int of_keys = params_.seqlen_new * params_.num_heads_k;
    const int of_sequence = 2 * of_keys + params_.seqlen_q * params_.num_heads;
    const int batch = row / of_sequence, i = row % of_sequence;
    if (batch >= params_.batch) return;
    const int used = params_.cache.used != nullptr ? load_global_i32(params_.cache.used + batch) : 0;
    if (i < of_keys)
      append(params_.k_new, params_.k_new_strides, params_.k, params_.k_strides, batch, i, used, true, lane);
    else if (i < 2 * of_keys)
      append(params_.v_new, params_.v_new_strides, params_.v, params_.v_strides, batch, i - of_keys, used, false, lane);
    else
      turn_query(batch, i - 2 * of_keys, used, lane);
  }

 private:
  static __device__ __forceinline__ long long offset(const TensorStrides& strides, int batch, int row, int head) {
    return batch * strides.batch + row * strides.row + head * strides.head;
  }

  // Whatever the lengths and the table say, nothing is written outside of the cache.
  __device__ __forceinline__ void append(const void* from, const TensorStrides& from_strides, void* to,
                                         const TensorStrides& to_strides, int batch, int i, int used, bool is_key,
                                         int lane) const {
    if (used < 0 || used >= params_.cache_rows) return;
    const int row = i / params_.num_heads_k, head = i % params_.num_heads_k, place = used + row;
    if (place >= params_.cache_rows) return;
    const Bits* const x = static_cast<const Bits*>(from) + offset(from_strides, batch, row, head);
    const KeyCacheParams& cache = params_.cache;
    int block = batch, row_of_block = place;
    if (cache.pages != nullptr) {
      block = load_global_i32(cache.pages + batch * cache.pages_stride + place / cache.page_size);
      row_of_block = place % cache.page_size;
      if (block < 0 || block >= cache.num_pages) return;
    }
    write(x, static_cast<Bits*>(to) + offset(to_strides, block, row_of_block, head), place, is_key,
          is_key ? Traits::kHeadDim : Traits::kHeadDimV, lane);
  }

  __device__ __forceinline__ void turn_query(int batch, int i, int used, int lane) const {
    const int row = i / params_.num_heads, head = i % params_.num_heads;
    const Bits* const x = static_cast<const Bits*>(params_.q) + offset(params_.q_strides, batch, row, head);
    Bits* const y = static_cast<Bits*>(params_.q_turned) + offset(params_.q_turned_strides, batch, row, head);
    write(x, y, params_.queries_advance ? used + row : used, true, Traits::kHeadDim, lane);
  }

  __device__ __forceinline__ void write(const Bits* x, Bits* y, int place, bool turns, int dims, int lane) const {
    for (int dim = lane; dim < dims; dim += 32) {
      const bool turned = turns && dim < params_.rotary.dims;
      store_global_2B(y + dim, turned ? turned_dim(x, dim, place) : load_global_2B(x + dim));
    }
  }

  // x cos - y sin for a pair's first dim x, y cos + x sin for its second, y.
  __device__ __forceinline__ unsigned turned_dim(const Bits* x, int dim, int place) const {
    const RotaryParams& rotary = params_.rotary;
    const int half = rotary.dims / 2;
    const int pair = rotary.interleaved ? dim / 2 : dim % half;
    const bool is_first = rotary.interleaved ? dim % 2 == 0 : dim < half;
    const int apart = rotary.interleaved ? 1 : half;
    const int row = place < 0 ? 0 : place < rotary.rows ? place : rotary.rows - 1;
    const float cos = number(rotary.cos, row * rotary.cos_stride + pair);
    const float sin = number(rotary.sin, row * rotary.sin_stride + pair);
    const float own = Stored::low(load_global_2B(x + dim));
    const float other = Stored::low(load_global_2B(x + (is_first ? dim + apart : dim - apart)));
    return Stored::pack(fma_rounded(own, cos, is_first ? -other * sin : other * sin), 0.0f);
  }

  static __device__ __forceinline__ float number(const void* numbers, long long at) {
    return Stored::low(load_global_2B(static_cast<const Bits*>(numbers) + at));
  }

  const FlashAppendParams& params_;
};

template <class Traits>
__device__ __forceinline__ void flash_append(const FlashAppendParams& params) {
  FlashAppend<Traits>(params).run(block_in_grid() * Traits::kNWarps + thread_in_block() / 32, thread_in_block() % 32);
}
