// B operands of products whose columns are rows of a tile in shared memory (tile_copy.cuh).
#pragma once

#include "primitives.cuh"
#include "tile_copy.cuh"

// Where lanes read 8 columns x 32 dims from dim 8 d on: matrix i has dims 8 (d + i)... As they lie, or transposed.
__device__ __forceinline__ SharedAddress column_address(SharedAddress tile, int pitch, int step, int d, int lane) {
  return tile + (lane % 8 + 8 * step) * pitch + (lane / 8 + d) * kChunkBytes;
}

// Columns [8 step, 8 step + 8), dims from 8 d on: 32 of them, or the last 16 of kDims.
template <int kDims>
__device__ __forceinline__ void load_columns(unsigned (&b)[4], SharedAddress tile, int step, int d, int lane) {
  if (kDims / 8 - d >= 4) {
    ldmatrix_x4(b, column_address(tile, row_pitch(kDims), step, d, lane));
  } else {
    unsigned two[2];
    ldmatrix_x2(two, column_address(tile, row_pitch(kDims), step, d, lane));
    b[0] = two[0];
    b[1] = two[1];
  }
}
