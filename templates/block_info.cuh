// Which part of the problem a block of the forward kernel works on.
#pragma once

#include "flash_fwd_params.cuh"
#include "primitives.cuh"
#include "sequence.cuh"

template <class Traits>
struct BlockInfo {
  int m_begin;  // first query row of the block
  int head, head_k;
  Sequence<Traits> sequence;

  __device__ __forceinline__ BlockInfo(const FlashFwdParams& params, int block)
      : sequence(params, block / params.num_m_blocks / params.num_heads) {
    const int m_order = block % params.num_m_blocks;
    // Causal blocks with the most keys go first, so that the short ones fill the last wave; most block masks hide what
    // a causal mask does.
    const int m_block = Traits::kIsCausal || Traits::kHasBlockMask ? params.num_m_blocks - 1 - m_order : m_order;
    m_begin = m_block * Traits::kBlockM;
    head = block / params.num_m_blocks % params.num_heads;
    head_k = head / Traits::kGroupSize;
  }

  __device__ __forceinline__ bool has_rows() const { return !Traits::kIsVarlen || m_begin < sequence.seqlen_q(); }
};
