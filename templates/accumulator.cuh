// What a warp holds of 16 x 8 products: kMTiles of them under each other, kNTiles side by side. A lane has rows
// lane_row(lane) + 8 r, r < 2 kMTiles, and of them columns lane_column(lane) + 8 n and the one after it: see the
// fragments that primitives.cuh draws.
#pragma once

#include "primitives.cuh"

template <int kMTiles, int kNTiles>
using Accumulator = float[kMTiles][kNTiles][4];

__device__ __forceinline__ int lane_row(int lane) { return lane / 4; }
__device__ __forceinline__ int lane_column(int lane) { return lane % 4 * 2; }

// visit(element, r, column) for all elements. Columns count from the lane's own.
template <class Float, int kMTiles, int kNTiles, class Visit>
__device__ __forceinline__ void for_each(Float (&acc)[kMTiles][kNTiles][4], Visit visit) {
#pragma unroll
  for (int m = 0; m < kMTiles; ++m)
#pragma unroll
    for (int n = 0; n < kNTiles; ++n)
#pragma unroll
      for (int c = 0; c < 4; ++c) visit(acc[m][n][c], 2 * m + c / 2, 8 * n + c % 2);
}

// visit(element, column) for those of row r.
template <class Float, int kMTiles, int kNTiles, class Visit>
__device__ __forceinline__ void for_each_in_row(Float (&acc)[kMTiles][kNTiles][4], int r, Visit visit) {
#pragma unroll
  for (int n = 0; n < kNTiles; ++n)
#pragma unroll
    for (int c = 0; c < 2; ++c) visit(acc[r / 2][n][r % 2 * 2 + c], 8 * n + c);
}

// Element i in the order in which the next product needs them as its A operand: all of 8 columns first. A flat loop
// over these is what the compiler keeps in order; nested loops come out in another, which moves a kernel's registers.
template <int kMTiles>
struct OperandOrder {
  int m, n, c;  // acc[m][n][c]
  int row;

  __device__ __forceinline__ constexpr explicit OperandOrder(int i)
      : m(i / 4 % kMTiles), n(i / 4 / kMTiles), c(i % 4), row(2 * m + c / 2) {}
};

template <int kMTiles, int kNTiles>
__device__ __forceinline__ void copy(const Accumulator<kMTiles, kNTiles>& from, Accumulator<kMTiles, kNTiles>& to) {
#pragma unroll
  for (int i = 0; i < kMTiles * kNTiles * 4; ++i) {
    const OperandOrder<kMTiles> at(i);
    to[at.m][at.n][at.c] = from[at.m][at.n][at.c];
  }
}
