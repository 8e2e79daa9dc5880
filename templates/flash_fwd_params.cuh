// The forward kernel's argument.
#pragma once

#include "attention_params.cuh"

struct FlashFwdParams : AttentionParams {
  const void* q;
  const void* k;
  const void* v;
  void* out;
  float* softmax_lse;  // (batch, num_heads, seqlen_q), varlen (num_heads, total_q); contiguous

  TensorStrides q_strides, k_strides, v_strides, out_strides;

  int num_m_blocks;  // ceil(seqlen_q / kBlockM); the grid is num_m_blocks x num_heads x batch, flat
};
