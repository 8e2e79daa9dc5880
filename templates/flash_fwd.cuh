// Forward attention: out = softmax(softmax_scale q k^T + mask) v, and the log-sum-exp of every row.
//
// A block owns kBlockM query rows of one head, a warp 16 or 32 of them. Keys come in tiles of kBlockN, last tile first,
// through a ring of kStages in shared memory. One turn of the main loop works on two tiles at once, so that the tensor
// cores always have something to do while exponentials are on their way:
//
//   turn of tile n:   S(n-1) = Q K(n-1)^T      between its products:  P(n) = 2^(S(n) scale - row_max), row_sum += P(n)
//                     O     += P(n) V(n)       between its products:  the maxima of S(n-1)
//
// S leaves its product in the layout that O's product takes as operand (see primitives.cuh), so P never leaves registers.
#pragma once

#include "block_info.cuh"
#include "flash_fwd_params.cuh"
#include "mask.cuh"
#include "primitives.cuh"
#include "softmax.cuh"
#include "tile_copy.cuh"

// The numbers that follow from Traits.
template <class Traits>
struct FlashFwdTile {
  static constexpr int kDims = (Traits::kHeadDim + 15) / 16 * 16;
  static constexpr int kRowsPerWarp = Traits::kBlockM / Traits::kNWarps;
  static constexpr int kMTiles = kRowsPerWarp / 16;
  static constexpr int kNTiles = Traits::kBlockN / 8;
  static constexpr int kDTiles = kDims / 8;
  static constexpr int kThreads = Traits::kNWarps * 32;

  // Shared memory: the ring of (K tile, V tile) stages, then each warp's rows of Q beyond kQRegisterDims.
  static constexpr int kTileBytes = Traits::kBlockN * row_pitch(kDims);
  static constexpr int kStageBytes = 2 * kTileBytes;
  static constexpr int kQSharedDims = kDims - Traits::kQRegisterDims;
  static constexpr int kQWarpBytes = kQSharedDims > 0 ? kRowsPerWarp * row_pitch(kQSharedDims) : 0;

  // Q on its way in and out on its way back pass through the ring's memory, a few dims at a time.
  static constexpr int kStagingDims = kDims % 32 == 0 ? 32 : 16;
  static constexpr int kStagingWarpBytes = kRowsPerWarp * row_pitch(kStagingDims);
  static constexpr int kRingBytes = Traits::kStages * kStageBytes > Traits::kNWarps * kStagingWarpBytes
                                        ? Traits::kStages * kStageBytes
                                        : Traits::kNWarps * kStagingWarpBytes;
  static constexpr int kSharedBytes = kRingBytes + Traits::kNWarps * kQWarpBytes;
};

// One warp's rows of Q as A operands: the first kQRegisterDims dims in registers, the others read from shared memory
// at each use.
template <class Traits>
class QueryFragments {
  using Tile = FlashFwdTile<Traits>;
  static constexpr int kRegisterSteps = Traits::kQRegisterDims / 16;

 public:
  // fragment[m] is 16 rows x 16 dims: a0 and a1 of the first 8 dims, then of the last 8.
  using Step = unsigned[Tile::kMTiles][4];

  // Rows [row, row + kRowsPerWarp) of `q`; those from seqlen_q on are zero. Uses `staging` and leaves it free.
  __device__ __forceinline__ void load(const FlashFwdParams& params, const unsigned short* q, int row, int lane,
                                       SharedAddress staging, SharedAddress shared) {
    const unsigned short* rows = q + row * params.q_row_stride;
    const int valid = params.seqlen_q - row;
#pragma unroll
    for (int dim = 0; dim < Traits::kQRegisterDims; dim += 16) {
      load_warp_rows<Traits, Tile::kRowsPerWarp, 16>(staging, rows, params.q_row_stride, valid, dim, lane,
                                                     params.q_sign);
      warp_barrier();
#pragma unroll
      for (int m = 0; m < Tile::kMTiles; ++m)
        ldmatrix_x4(registers_[dim / 16][m], staging + fragment_offset(m, 0, row_pitch(16), lane));
      warp_barrier();
    }
    if constexpr (Tile::kQSharedDims > 0) {
      load_warp_rows<Traits, Tile::kRowsPerWarp, Tile::kQSharedDims>(shared, rows, params.q_row_stride, valid,
                                                                     Traits::kQRegisterDims, lane, params.q_sign);
      shared_ = shared + fragment_offset(0, 0, row_pitch(Tile::kQSharedDims), lane);
      warp_barrier();
    }
  }

  __device__ __forceinline__ void get(Step& fragment, int step) const {
#pragma unroll
    for (int m = 0; m < Tile::kMTiles; ++m)
      if (step < kRegisterSteps) {
#pragma unroll
        for (int i = 0; i < 4; ++i) fragment[m][i] = registers_[step < kRegisterSteps ? step : 0][m][i];
      } else {
        ldmatrix_x4(fragment[m], shared_ + m * 16 * row_pitch(Tile::kQSharedDims) + (step - kRegisterSteps) * 32);
      }
  }

 private:
  // ldmatrix's four matrices: rows 0-7 and 8-15 of the first 8 dims, then of the last 8.
  static __device__ __forceinline__ int fragment_offset(int m, int step, int pitch, int lane) {
    return (16 * m + lane % 16) * pitch + step * 32 + lane / 16 * kChunkBytes;
  }

  unsigned registers_[kRegisterSteps > 0 ? kRegisterSteps : 1][Tile::kMTiles][4];
  SharedAddress shared_ = 0;
};

template <class Traits>
class FlashFwd {
  using Tile = FlashFwdTile<Traits>;
  static constexpr int kMTiles = Tile::kMTiles, kNTiles = Tile::kNTiles, kDTiles = Tile::kDTiles;
  static constexpr int kPitch = row_pitch(Tile::kDims);
  static constexpr int kScores = kMTiles * kNTiles * 4;           // a lane's scores of one tile
  static constexpr int kProducts = kScores / 4 * kDTiles;         // tensor instructions of each of the two products

  using Scores = float[kMTiles][kNTiles][4];
  using Probabilities = unsigned[kMTiles][kNTiles][2];
  using Stream = TileStream<Traits, Traits::kBlockN, Tile::kDims, Tile::kThreads>;

 public:
  __device__ __forceinline__ explicit FlashFwd(const FlashFwdParams& params)
      : params_(params),
        block_(params),
        lane_(thread_in_block() % 32),
        warp_(thread_in_block() / 32),
        row_(block_.m_begin + warp_ * Tile::kRowsPerWarp),
        softmax_(params.softmax_scale_log2),
        k_stream_(head_base(params.k, params.k_batch_stride, params.k_head_stride, block_.head_k), params.k_row_stride,
                  last_tile()),
        v_stream_(head_base(params.v, params.v_batch_stride, params.v_head_stride, block_.head_k), params.v_row_stride,
                  last_tile()) {}

  __device__ __forceinline__ void run() {
#pragma unroll
    for (int m = 0; m < kMTiles; ++m)
#pragma unroll
      for (int d = 0; d < kDTiles; ++d)
#pragma unroll
        for (int c = 0; c < 4; ++c) acc_o_[m][d][c] = 0.0f;

    query_.load(params_, head_base(params_.q, params_.q_batch_stride, params_.q_head_stride, block_.head), row_, lane_,
                staging(), Tile::kRingBytes + warp_ * Tile::kQWarpBytes);
    if (block_.n_block_max > 0) attend();
    block_barrier();
    write_out();
  }

 private:
  __device__ __forceinline__ int last_tile() const { return block_.n_block_max > 0 ? block_.n_block_max - 1 : 0; }
  __device__ __forceinline__ SharedAddress staging() const { return warp_ * Tile::kStagingWarpBytes; }
  __device__ __forceinline__ const unsigned short* head_base(const void* tensor, long long batch_stride,
                                                             long long head_stride, int head) const {
    return static_cast<const unsigned short*>(tensor) + block_.batch * batch_stride + head * head_stride;
  }

  __device__ __forceinline__ void attend() {
    fill_ring();
    scores_of_first_tile();
    int n = last_tile();
    n = turns<true>(n, block_.n_unmasked > 0 ? block_.n_unmasked : 0);
    n = turns<false>(n, 0);
    last_turn();
  }

  // Brings the first two tiles; every turn then brings the one after the next.
  __device__ __forceinline__ void fill_ring() {
    block_barrier();  // every warp has its Q out of the ring's memory
#pragma unroll
    for (int stage = 0; stage < 2; ++stage) {
      k_stream_.template load<true>(params_.seqlen_k);
      v_stream_.template load<true>(params_.seqlen_k);
      k_stream_.store(stage * Tile::kStageBytes);
      v_stream_.store(stage * Tile::kStageBytes + Tile::kTileBytes);
    }
    stage_ = 0;
    block_barrier();
  }

  static __device__ __forceinline__ SharedAddress next_stage(SharedAddress stage) {
    return stage == (Traits::kStages - 1) * Tile::kStageBytes ? 0 : stage + Tile::kStageBytes;
  }

  // K fragments of 16 keys x 16 dims are the B operands of 2 x 2 products:
  //   matrix 0: keys 0-7, dims 0-7   1: keys 0-7, dims 8-15   2: keys 8-15, dims 0-7   3: keys 8-15, dims 8-15
  __device__ __forceinline__ SharedAddress k_lane(SharedAddress stage) const {
    return stage + (lane_ % 8 + lane_ / 16 * 8) * kPitch + lane_ / 8 % 2 * kChunkBytes;
  }

  // V fragments of 8 keys x 32 dims, transposed, are the B operands of 4 independent products: matrix i has dims 8i..
  __device__ __forceinline__ SharedAddress v_lane(SharedAddress stage) const {
    return stage + Tile::kTileBytes + lane_ % 8 * kPitch + lane_ / 8 * kChunkBytes;
  }

  // S = Q K^T of the tile at `stage`. `between(i)` is called after tensor instruction i of kProducts.
  template <class Between>
  __device__ __forceinline__ void scores(Scores& acc_s, SharedAddress stage, Between between) {
    const SharedAddress k_tile = k_lane(stage);
#pragma unroll
    for (int step = 0; step < Tile::kDims / 16; ++step) {
      typename QueryFragments<Traits>::Step q;
      query_.get(q, step);
#pragma unroll
      for (int n = 0; n < kNTiles; n += 2) {
        unsigned k[4];
        ldmatrix_x4(k, k_tile + n * 8 * kPitch + step * 32);
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
          for (int n_in = 0; n_in < 2; ++n_in)
#pragma unroll
            for (int m = 0; m < kMTiles; ++m) {
              const unsigned b = k[2 * n_in + half];
              if (step == 0 && half == 0)
                mma_m16n8k8_zero(acc_s[m][n + n_in], q[m][0], q[m][1], b);
              else
                mma_m16n8k8(acc_s[m][n + n_in], q[m][2 * half], q[m][2 * half + 1], b);
              between(((step * (kNTiles / 2) + n / 2) * 4 + half * 2 + n_in) * kMTiles + m);
            }
      }
    }
  }

  // O += P V of the tile at `stage`.
  template <class Between>
  __device__ __forceinline__ void accumulate(const Probabilities& p, SharedAddress stage, Between between) {
    const SharedAddress v_tile = v_lane(stage);
#pragma unroll
    for (int n = 0; n < kNTiles; ++n)
#pragma unroll
      for (int d = 0; d < kDTiles; d += 4) {
        unsigned v[4];
        load_v(v, v_tile + n * 8 * kPitch + d * kChunkBytes, d);
#pragma unroll
        for (int d_in = 0; d_in < (kDTiles - d < 4 ? kDTiles - d : 4); ++d_in)
#pragma unroll
          for (int m = 0; m < kMTiles; ++m) {
            mma_m16n8k8(acc_o_[m][d + d_in], p[m][n][0], p[m][n][1], v[d_in]);
            between((n * kDTiles + d + d_in) * kMTiles + m);
          }
      }
  }

  static __device__ __forceinline__ void load_v(unsigned (&v)[4], SharedAddress address, int d) {
    if (kDTiles - d >= 4) {
      ldmatrix_x4_trans(v, address);
    } else {
      unsigned two[2];
      ldmatrix_x2_trans(two, address);
      v[0] = two[0];
      v[1] = two[1];
    }
  }

  // Element i of a lane's scores, in the order in which accumulate() needs them: all of one 8-key tile first.
  static constexpr int n_of(int i) { return i / (4 * kMTiles); }
  static constexpr int m_of(int i) { return i / 4 % kMTiles; }

  // Exponential number i: t becomes p; every second one packs a pair.
  __device__ __forceinline__ void exponentiate(Scores& t, Probabilities& p, int i) {
    const int n = n_of(i), m = m_of(i), c = i % 4;
    t[m][n][c] = exp2_approx(t[m][n][c]);
    softmax_.row_sum[2 * m + c / 2] += t[m][n][c];
    if (c % 2 == 1) p[m][n][c / 2] = pack_fp16(t[m][n][c - 1], t[m][n][c]);
  }

  __device__ __forceinline__ void exponents(Scores& t) const {
#pragma unroll
    for (int i = 0; i < kScores; ++i)
      t[m_of(i)][n_of(i)][i % 4] = softmax_.exponent(acc_s_[m_of(i)][n_of(i)][i % 4], 2 * m_of(i) + i % 4 / 2);
  }

  __device__ __forceinline__ void mask(int n) {
    apply_mask<Traits>(acc_s_, block_, params_.seqlen_k, row_ + lane_ / 4, n * Traits::kBlockN + lane_ % 4 * 2);
  }

  __device__ __forceinline__ void scores_of_first_tile() {
    scores(acc_s_, stage_, [](int) {});
    mask(last_tile());
    softmax_.correct(acc_s_, acc_o_);
  }

  // The turns of tiles n, n - 1, ... until the scores at hand are those of tile `n_end`. Returns n_end or n.
  template <bool kMasked>
  __device__ __forceinline__ int turns(int n, int n_end) {
    while (n > n_end) {
      bool must_correct;
      do {
        --n;
        turn<kMasked>(n);
        must_correct = softmax_.must_correct(acc_s_);
      } while (n > n_end && !must_correct);
      if (must_correct) softmax_.correct(acc_s_, acc_o_);
    }
    return n;
  }

  // Uses up the scores at hand and leaves those of tile n.
  template <bool kMasked>
  __device__ __forceinline__ void turn(int n) {
    Scores t;
    Probabilities p;
    exponents(t);
    const SharedAddress next = next_stage(stage_);
    scores(acc_s_, next, [&](int product) {
#pragma unroll
      for (int i = product * kScores / kProducts; i < (product + 1) * kScores / kProducts; ++i) exponentiate(t, p, i);
    });
    if (kMasked) mask(n);
    k_stream_.template load<false>(0);
    v_stream_.template load<false>(0);
    accumulate(p, stage_, [](int) {});
    const SharedAddress free = next_stage(next);
    k_stream_.store(free);
    v_stream_.store(free + Tile::kTileBytes);
    block_barrier();
    stage_ = next;
  }

  __device__ __forceinline__ void last_turn() {
    Scores t;
    Probabilities p;
    exponents(t);
#pragma unroll
    for (int i = 0; i < kScores; ++i) exponentiate(t, p, i);
    accumulate(p, stage_, [](int) {});
  }

  // out = O / row_sum, through this warp's staging rows so that whole 32-byte sectors are written.
  __device__ __forceinline__ void write_out() {
    const int rows = params_.seqlen_q - row_;
    float inverse[2 * kMTiles];
#pragma unroll
    for (int r = 0; r < 2 * kMTiles; ++r) inverse[r] = finish_row(r);

    unsigned short* out = static_cast<unsigned short*>(params_.out) + block_.batch * params_.out_batch_stride +
                          block_.head * params_.out_head_stride + row_ * params_.out_row_stride;
#pragma unroll
    for (int dim = 0; dim < Tile::kDims; dim += Tile::kStagingDims) {
#pragma unroll
      for (int m = 0; m < kMTiles; ++m)
#pragma unroll
        for (int d = 0; d < Tile::kStagingDims / 8; ++d)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const float* acc = &acc_o_[m][dim / 8 + d][2 * half];
            const float scale = inverse[2 * m + half];
            store_shared_4B(staging() + (16 * m + 8 * half + lane_ / 4) * row_pitch(Tile::kStagingDims) +
                                d * kChunkBytes + lane_ % 4 * 4,
                            pack_fp16(acc[0] * scale, acc[1] * scale));
          }
      warp_barrier();
      store_warp_rows<Traits, Tile::kRowsPerWarp, Tile::kStagingDims>(out, params_.out_row_stride, rows, dim,
                                                                      staging(), lane_);
      warp_barrier();
    }
  }

  // Writes the log-sum-exp of row r and returns what its accumulators are multiplied by. A row that sees no key gets
  // +inf and 0; one that sees only scores of -inf gets 1 / 0, whose product with 0 is NaN, as in the formula.
  __device__ __forceinline__ float finish_row(int r) {
    const int row = row_ + lane_ / 4 + 8 * r;
    const float sum = softmax_.total(r);
    const bool sees_keys = block_.visible_keys(row, params_.seqlen_k) > 0;
    if (row < params_.seqlen_q && lane_ % 4 == 0) {
      constexpr float kLn2 = 0.693147180559945309f;
      const float lse = sees_keys ? (softmax_.row_max[r] + log2_approx(sum)) * kLn2 : infinity();
      const long long head_row = (static_cast<long long>(block_.batch) * params_.num_heads + block_.head);
      store_global_f32(params_.softmax_lse + head_row * params_.seqlen_q + row, lse);
    }
    return sees_keys ? reciprocal(sum) : 0.0f;
  }

  const FlashFwdParams& params_;
  const BlockInfo<Traits> block_;
  const int lane_, warp_;
  const int row_;  // the warp's first query row
  Softmax<kMTiles, kNTiles> softmax_;
  Stream k_stream_, v_stream_;
  QueryFragments<Traits> query_;
  SharedAddress stage_ = 0;  // of the tile whose scores are at hand
  Scores acc_s_;
  float acc_o_[kMTiles][kDTiles][4];
};

template <class Traits>
__device__ __forceinline__ void flash_fwd(const FlashFwdParams& params) {
  FlashFwd<Traits>(params).run();
}
