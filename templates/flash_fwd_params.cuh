// The forward kernel's argument, shared by device code and host code. Strides count elements.
#pragma once

struct FlashFwdParams {
  const void* q;
  const void* k;
  const void* v;
  void* out;
  float* softmax_lse;  // (batch, num_heads, seqlen_q), contiguous

  long long q_batch_stride, q_row_stride, q_head_stride;
  long long k_batch_stride, k_row_stride, k_head_stride;
  long long v_batch_stride, v_row_stride, v_head_stride;
  long long out_batch_stride, out_row_stride, out_head_stride;

  int seqlen_q;
  int seqlen_k;
  int num_heads;
  int num_m_blocks;          // ceil(seqlen_q / kBlockM); the grid is num_m_blocks x num_heads x batch, flat
  float softmax_scale_log2;  // |softmax_scale| x log2(e), at least 2^-100 so that a masked -inf stays -inf
  unsigned q_sign;           // 0x80008000 where softmax_scale is negative: flips the sign of Q's fp16 pairs, else 0
};
