// Which part of the problem a block works on, and which keys its rows can see.
//
//             keys ->                          bottom-right causal, seqlen_k > seqlen_q:
//        0    n_unmasked      n_max
//   row  +--------+--------------+- - - -      row i sees key j when j <= i + seqlen_k - seqlen_q
//        |########|##\           |
//        |########|#####\        |             # visible
//        |########|########\     |
//   row  +--------+-----------\--+- - - -
//         no mask   masked tiles
#pragma once

#include "flash_fwd_params.cuh"
#include "primitives.cuh"

// Key tiles that some rows see.
struct KeyTiles {
  int n_max;       // those that at least one of the rows sees, in part or whole
  int n_unmasked;  // the leading ones of them that every row sees whole
};

template <class Traits>
struct BlockInfo {
  int m_begin;       // first query row of the block
  int head, head_k, batch;
  int diagonal;      // seqlen_k - seqlen_q: row i sees keys up to i + diagonal

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
  }

  // Of the query rows [row, row + rows).
  __device__ __forceinline__ KeyTiles key_tiles(const FlashFwdParams& params, int row, int rows) const {
    const int last = minimum(row + rows, params.seqlen_q) - 1;
    const int seen_by_some = maximum(visible_keys(last, params.seqlen_k), 0);
    const int seen_by_all = maximum(visible_keys(row, params.seqlen_k), 0);
    return {(seen_by_some + Traits::kBlockN - 1) / Traits::kBlockN, seen_by_all / Traits::kBlockN};
  }

  // Keys that query row `row` sees, a prefix of them all.
  __device__ __forceinline__ int visible_keys(int row, int seqlen_k) const {
    return Traits::kIsCausal ? minimum(row + diagonal + 1, seqlen_k) : seqlen_k;
  }

 private:
  __device__ __forceinline__ static int minimum(int a, int b) { return a < b ? a : b; }
  __device__ __forceinline__ static int maximum(int a, int b) { return a > b ? a : b; }
};
