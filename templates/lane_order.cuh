// Which rows and columns of a tile a lane has, of those that stand in its accumulators (see accumulator.cuh). In
// memory's order a lane's columns lie apart, two by two, and its rows 8 apart:
//
//   column   0  1   2  3   4  5   6  7 |  8  9  10 11  ...        in neighbours' order, of 2 tiles of 8 columns:
//   lane %4  0  0   1  1   2  2   3  3 |  0  0   1  1             0  0  0  0  1  1  1  1  2  2  2  2  3  3  3  3
//
// The order of keys says nothing about attention: where something is read for every pair of query and key, tiles are
// stored so that a lane's keys are neighbours in memory, and it reads them at once. Where kMoves,
// `position` is where a row of memory is stored in the tile.
#pragma once

#include "primitives.cuh"

// The keys that a lane has of a query, from the first one on.
template <bool kIsAtOnce, int kStep, int kRun>
struct LaneKeys {
  static constexpr bool kAtOnce = kIsAtOnce;
  static __device__ __forceinline__ constexpr int at(int i) { return i / kRun * kStep + i % kRun; }
};

template <bool kNeighbours, int kNTiles>
struct ColumnOrder {
  static constexpr bool kMoves = kNeighbours;
  static constexpr int kStep = kNeighbours ? 2 : 8;  // from tile n to n + 1
  using Keys = LaneKeys<kNeighbours, kStep, 2>;

  static __device__ __forceinline__ int first(int lane) { return lane % 4 * (kNeighbours ? 2 * kNTiles : 2); }
  static __device__ __forceinline__ int position(int column) {
    constexpr int kOfLane = 2 * kNTiles;
    return column % kOfLane / 2 * 8 + column / kOfLane * 2 + column % 2;
  }
};

template <bool kNeighbours, int kMTiles>
struct RowOrder {
  static constexpr bool kMoves = kNeighbours;
  static constexpr int kStep = kNeighbours ? 1 : 8;  // from row r to r + 1
  using Keys = LaneKeys<kNeighbours, kStep, 1>;

  static __device__ __forceinline__ int first(int lane) { return lane / 4 * (kNeighbours ? 2 * kMTiles : 1); }
  static __device__ __forceinline__ int position(int row) {
    constexpr int kOfLane = 2 * kMTiles;
    return row % kOfLane * 8 + row / kOfLane;
  }
};

using MemoryOrder = RowOrder<false, 1>;
