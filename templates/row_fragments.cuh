// One warp's rows as A operands of products, kept for the whole kernel: the first kRegisterDims dims in registers,
// the others read from shared memory at each use. Registers are what runs out first: 32 rows of head dim 128 alone
// would take 64 of them.
#pragma once

#include "primitives.cuh"
#include "tile_copy.cuh"

template <class Traits, int kRows, int kDims, int kRegisterDims>
class RowFragments {
  static constexpr int kMTiles = kRows / 16;
  static constexpr int kSharedDims = kDims - kRegisterDims;
  static constexpr int kSteps = (kDims + 15) / 16, kRegisterSteps = (kRegisterDims + 15) / 16;
  // Where the last step has 8 dims.
  static constexpr bool kHasHalfStep = kDims % 16 != 0;
  static constexpr int kWholeSteps = kDims / 16, kWholeRegisterSteps = kRegisterDims / 16;
  static_assert(kRegisterDims % 16 == 0 || kRegisterDims == kDims, "registers hold whole steps, or all dims");
  using Staged = WarpRows<Traits, kRows, 16>;
  using HalfStaged = WarpRows<Traits, kRows, 8>;

 public:
  static constexpr int kSharedBytes = kSharedDims > 0 ? kRows * row_pitch(kSharedDims) : 0;  // of a warp
  static constexpr int kStagingBytes = kRows * row_pitch(16);                                // of a warp

  // fragment[m] is 16 rows x 16 dims: a0 and a1 of the first 8 dims, then of the last 8, if the step has those.
  using Step = unsigned[kMTiles][4];

  // Rows [row, row + kRows) of the matrix, dims from `first_dim` on; rows from `seqlen` on are zero. The signs of pairs
  // are flipped by `sign`. `Order` is what a lane has of them. `factor`: of to_elements(). Uses `staging`. A block
  // barrier has to follow, before get() and before `staging` is used for anything else.
  template <class Order, class... Factor>
  __device__ __forceinline__ void load(const GlobalMatrix<typename Traits::Stored>& matrix, int row, int seqlen,
                                       unsigned sign, int lane, SharedAddress staging, SharedAddress shared,
                                       int first_dim = 0, Factor... factor) {
    typename Staged::Chunks chunks[kWholeSteps];
    typename HalfStaged::Chunks half;
#pragma unroll
    for (int step = 0; step < kWholeSteps; ++step)
      Staged::load(chunks[step], matrix, row, seqlen - row, first_dim + 16 * step, lane);
    if constexpr (kHasHalfStep) HalfStaged::load(half, matrix, row, seqlen - row, first_dim + 16 * kWholeSteps, lane);
    if constexpr (kHasHalfStep && kSharedDims == 0) {
      HalfStaged::template store_shared<Order>(staging, row_pitch(16), half, lane, sign, factor...);
      warp_barrier();
#pragma unroll
      for (int m = 0; m < kMTiles; ++m)
        load_half(registers_[kWholeSteps][m], staging + fragment_offset(m, row_pitch(16), lane));
      warp_barrier();
    }
#pragma unroll
    for (int step = 0; step < kWholeRegisterSteps; ++step) {
      Staged::template store_shared<Order>(staging, row_pitch(16), chunks[step], lane, sign, factor...);
      warp_barrier();
#pragma unroll
      for (int m = 0; m < kMTiles; ++m)
        ldmatrix_x4(registers_[step][m], staging + fragment_offset(m, row_pitch(16), lane));
      warp_barrier();
    }
#pragma unroll
    for (int step = kRegisterSteps; step < kWholeSteps; ++step)
      Staged::template store_shared<Order>(shared + (step - kRegisterSteps) * 16 * kElementBytes,
                                           row_pitch(kSharedDims), chunks[step], lane, sign, factor...);
    if constexpr (kHasHalfStep && kSharedDims > 0)
      HalfStaged::template store_shared<Order>(shared + (kWholeSteps - kRegisterSteps) * 16 * kElementBytes,
                                               row_pitch(kSharedDims), half, lane, sign, factor...);
    shared_ = shared + fragment_offset(0, row_pitch(kSharedDims), lane);
  }

  __device__ __forceinline__ void get(Step& fragment, int step) const {
#pragma unroll
    for (int m = 0; m < kMTiles; ++m)
      if (step < kRegisterSteps) {
#pragma unroll
        for (int i = 0; i < (kHasHalfStep && is_half(step) ? 2 : 4); ++i) fragment[m][i] = registers_[step][m][i];
      } else if (kHasHalfStep && is_half(step)) {
        load_half(fragment[m],
                  shared_ + m * 16 * row_pitch(kSharedDims) + (step - kRegisterSteps) * 16 * kElementBytes);
      } else {
        ldmatrix_x4(fragment[m],
                    shared_ + m * 16 * row_pitch(kSharedDims) + (step - kRegisterSteps) * 16 * kElementBytes);
      }
  }

 private:
  static __device__ __forceinline__ constexpr bool is_half(int step) { return step == kWholeSteps; }

  // The matrices of the first 8 dims.
  static __device__ __forceinline__ void load_half(unsigned (&fragment)[4], SharedAddress at) {
    unsigned two[2];
    ldmatrix_x2(two, at);
    fragment[0] = two[0];
    fragment[1] = two[1];
  }

  // ldmatrix's four matrices: rows 0-7 and 8-15 of the first 8 dims, then of the last 8.
  static __device__ __forceinline__ int fragment_offset(int m, int pitch, int lane) {
    return (16 * m + lane % 16) * pitch + lane / 16 * kChunkBytes;
  }

  unsigned registers_[kSteps][kMTiles][4];  // of which the first kRegisterSteps are used
  SharedAddress shared_;
};
