// Where the rows of a head's keys and values lie: at equal distances, or in pages.
#pragma once

#include "flash_fwd_params.cuh"
#include "primitives.cuh"
#include "sequence.cuh"
#include "tile_copy.cuh"

// n / d of 0 <= n < 2^31; runtime/request/divisor.h makes the Divisor.
__device__ __forceinline__ int divided(int n, const Divisor& by) {
  const unsigned long long product = static_cast<unsigned long long>(2u * static_cast<unsigned>(n)) * by.multiplier;
  return static_cast<int>(static_cast<unsigned>(product >> 32) >> by.shift);
}

// Pages of page_size rows, in the order of a sequence's table. Rows count from the sequence's first key.
template <class Stored>
struct PagedMatrix {
  using Bits = typename Stored::Bits;

  const Bits* base;  // of page 0, row 0
  long long row_stride, page_stride;
  const int* pages;
  int first_key;  // its place among the sequence's rows
  int page_size, num_pages;
  Divisor by_page_size;

  // Whatever the table says, no row outside of the tensor is read.
  __device__ __forceinline__ int page_of(int row) const {
    const int page = load_global_i32(pages + divided(first_key + row, by_page_size));
    return page < 0 ? 0 : page < num_pages ? page : num_pages - 1;
  }
  __device__ __forceinline__ int row_of_page(int row) const {
    return first_key + row - divided(first_key + row, by_page_size) * page_size;
  }
  __device__ __forceinline__ const Bits* row_at(int page, int row_of_page) const {
    return base + page * page_stride + row_of_page * row_stride;
  }
  __device__ __forceinline__ const Bits* row_at(int row) const { return row_at(page_of(row), row_of_page(row)); }

  // Whether no page ends within a tile of `rows` rows.
  __device__ __forceinline__ bool hold_tiles(int rows) const { return page_size % rows == 0 && first_key % rows == 0; }
};

template <bool kIsPaged, class Stored>
struct KeyMatrixOf {
  using Type = GlobalMatrix<Stored>;
};
template <class Stored>
struct KeyMatrixOf<true, Stored> {
  using Type = PagedMatrix<Stored>;
};
template <class Traits>
using KeyMatrix = typename KeyMatrixOf<Traits::kIsPaged, typename Traits::Stored>::Type;

// K's or V's rows of a sequence and a head; row 0 is the sequence's first key.
template <class Traits>
__device__ __forceinline__ KeyMatrix<Traits> key_matrix(const FlashFwdParams& params, const Sequence<Traits>& sequence,
                                                        const void* tensor, const TensorStrides& strides, int head) {
  const auto* base = static_cast<const typename Traits::Stored::Bits*>(tensor) + sequence.key_offset(strides, head);
  if constexpr (Traits::kIsPaged) {
    const KeyCacheParams& cache = params.cache;
    const int* const pages = cache.pages + sequence.batch() * cache.pages_stride;
    return {base,
            strides.row,
            strides.batch,
            pages,
            sequence.first_key_row(),
            cache.page_size,
            cache.num_pages,
            cache.by_page_size};
  } else {
    return {base, strides.row};
  }
}

// A tile of kRows rows, of K and of V. Where pages hold whole tiles (kIsInOnePage; of keys in pages alone), one look
// into the table does for it.
template <class Traits, int kRows, bool kIsInOnePage>
class KeyTile {
  using Matrix = KeyMatrix<Traits>;
  using Bits = typename Traits::Stored::Bits;

 public:
  // From row `first`, a multiple of kRows, which may lie at `end` or beyond: then it is not read.
  __device__ __forceinline__ KeyTile(const Matrix& matrix, int first, int end) : first_(first) {
    if constexpr (kIsInOnePage) {
      if (first >= end) return;
      page_ = matrix.page_of(first);
      row_of_page_ = matrix.row_of_page(first);
    }
  }

  // Row i of the tile, which is not to be read where it is not there.
  __device__ __forceinline__ const Bits* row(const Matrix& matrix, int i, bool is_there) const {
    if constexpr (kIsInOnePage)
      return matrix.row_at(page_, row_of_page_) + i * matrix.row_stride;
    else if constexpr (Traits::kIsPaged)
      return is_there ? matrix.row_at(first_ + i) : matrix.base;
    else
      return matrix.base + (first_ + i) * matrix.row_stride;
  }

 private:
  int first_;
  int page_ = 0, row_of_page_ = 0;  // of the first row
};
