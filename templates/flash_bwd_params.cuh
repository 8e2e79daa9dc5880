// The backward kernels' argument, shared by device code and host code. Strides count elements.
#pragma once

struct TensorStrides {
  long long batch, row, head;
};

struct FlashBwdParams {
  const void* q;
  const void* k;
  const void* v;
  const void* out;
  const void* dout;
  void* dq;
  void* dk;
  void* dv;
  const float* softmax_lse;  // (batch, num_heads, seqlen_q), contiguous: what forward wrote
  float* delta;              // like softmax_lse: sum over the head dims of dout * out, written by the preprocess kernel

  TensorStrides q_strides, k_strides, v_strides, out_strides, dout_strides, dq_strides, dk_strides, dv_strides;

  int seqlen_q;
  int seqlen_k;
  int num_heads;
  int num_heads_k;
  int num_row_blocks;        // blocks along the side whose gradient a kernel makes; the grid is flat
  float softmax_scale;
  float softmax_scale_log2;  // |softmax_scale| x log2(e), at least 2^-100
  unsigned sign;             // 0x80008000 where softmax_scale is negative: flips the sign of fp16 pairs, else 0
};
