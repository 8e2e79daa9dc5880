// B operands of products whose columns are rows of a tile in shared memory (tile_copy.cuh).
#pragma once

#include "primitives.cuh"
#include "tile_copy.cuh"

// Where lanes read 8 columns x 32 dims from dim 8 d on: matrix i has dims 8 (d + i)... As they lie, or transposed.
__device__ __forceinline__ SharedAddress column_address(SharedAddress tile, int pitch, int step, int d, int lane) {
  return tile + (lane % 8 + 8 * step) * pitch + (lane / 8 + d) * kChunkBytes;
}

// Columns [8 step, 8 step + 8), dims from 8 d on: 32 of them, or what is left of kDims.
template <int kDims>
__device__ __forceinline__ void load_columns(unsigned (&b)[4], SharedAddress tile, int step, int d, int lane) {
  constexpr int kDTiles = kDims / 8, kLast = kDTiles - 1;
  if (kDTiles - d >= 4) {
    ldmatrix_x4(b, column_address(tile, row_pitch(kDims), step, d, lane));
  } else if (kDTiles % 2 == 0 || d < kLast) {
    unsigned two[2];
    ldmatrix_x2(two, column_address(tile, row_pitch(kDims), step, d, lane));
    b[0] = two[0];
    b[1] = two[1];
  }
  if (kDTiles % 2 != 0 && kDTiles - d < 4)
    ldmatrix_x1(b[kLast % 4], column_address(tile, row_pitch(kDims), step, kLast, lane));
}

// The same transposed, of kDTiles x 8 dims of rows that lie `pitch` bytes apart.
template <int kDTiles>
__device__ __forceinline__ void load_columns_transposed(unsigned (&b)[4], SharedAddress tile, int pitch, int step,
                                                        int d, int lane) {
  constexpr int kLast = kDTiles - 1;
  if (kDTiles - d >= 4) {
    ldmatrix_x4_trans(b, column_address(tile, pitch, step, d, lane));
  } else if (kDTiles % 2 == 0 || d < kLast) {
    unsigned two[2];
    ldmatrix_x2_trans(two, column_address(tile, pitch, step, d, lane));
    b[0] = two[0];
    b[1] = two[1];
  }
  if (kDTiles % 2 != 0 && kDTiles - d < 4)
    ldmatrix_x1_trans(b[kLast % 4], column_address(tile, pitch, step, kLast, lane));
}
