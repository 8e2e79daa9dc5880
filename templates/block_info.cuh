// Which part of the problem a block works on, and which keys its rows can see.
//
//             keys ->                          bottom-right causal, seqlen_k > seqlen_q:
//        0    n_unmasked      n_max
//   row  +--------+--------------+- - - -      row i sees key j when j <= i + seqlen_k - seqlen_q
//   m0   |########|##\           |
//        |########|#####\        |             # visible
//        |########|########\     |
//   m1   +--------+-----------\--+- - - -
//         no mask   masked tiles
#pragma once

#include "flash_fwd_params.cuh"
#include "primitives.cuh"

template <class Traits>
struct BlockInfo {
  int m_begin;       // first query row of the block
  int head, head_k, batch;
  int diagonal;      // seqlen_k - seqlen_q: row i sees keys up to i + diagonal
  int n_block_max;   // key tiles that some row of the block sees
  int n_unmasked;    // leading ones of them that every row sees whole

  __device__ __forceinline__ BlockInfo(const FlashFwdParams& params, int block) {
    const int m_turn = block % params.num_m_blocks;
    const int batch_head = block / params.num_m_blocks;
    // Causal blocks with the most keys go first, so that the short ones fill the last wave.
    const int m_block = Traits::kIsCausal ? params.num_m_blocks - 1 - m_turn : m_turn;
    head = batch_head % params.num_heads;
    head_k = head / Traits::kGroupSize;
    batch = batch_head / params.num_heads;
    m_begin = m_block * Traits::kBlockM;
    diagonal = params.seqlen_k - params.seqlen_q;

    int seen_by_some = params.seqlen_k, seen_by_all = params.seqlen_k;
    if (Traits::kIsCausal) {
      const int m_last = minimum(m_begin + Traits::kBlockM, params.seqlen_q) - 1;
      seen_by_some = maximum(minimum(m_last + diagonal + 1, params.seqlen_k), 0);
      seen_by_all = maximum(minimum(m_begin + diagonal + 1, params.seqlen_k), 0);
    }
    n_block_max = (seen_by_some + Traits::kBlockN - 1) / Traits::kBlockN;
    n_unmasked = seen_by_all / Traits::kBlockN;
  }

  // Keys that query row `row` sees, a prefix of them all.
  __device__ __forceinline__ int visible_keys(int row, int seqlen_k) const {
    return Traits::kIsCausal ? minimum(row + diagonal + 1, seqlen_k) : seqlen_k;
  }

 private:
  __device__ __forceinline__ static int minimum(int a, int b) { return a < b ? a : b; }
  __device__ __forceinline__ static int maximum(int a, int b) { return a > b ? a : b; }
};
