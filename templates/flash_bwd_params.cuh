// The backward kernels' argument.
#pragma once

#include "attention_params.cuh"

// What the gradient of attn_bias goes into: (batches, heads, rows, keys), contiguous. An element is the sum over
// ceil(sequences / batches) sequences and ceil(num_heads / heads) query heads, neighbours each, and with one row over
// all queries.
struct BiasGradientParams {
  void* data;
  bool is_float32;  // or of 16 bits, as tensors are
  int sequences;    // of the problem
  int batches, heads, rows, keys;
};

struct FlashBwdParams : AttentionParams {
  const void* q;
  const void* k;
  const void* v;
  const void* out;
  const void* dout;
  void* dq;
  void* dk;
  void* dv;
  const float* softmax_lse;  // what forward wrote
  float* delta;              // like softmax_lse: see row_delta.cuh, written by the preprocess kernel

  TensorStrides q_strides, k_strides, v_strides, out_strides, dout_strides, dq_strides, dk_strides, dv_strides;
  long long dout_dim_stride;  // between two head dims of dout; 1 where kVectorAccess

  int num_row_blocks;   // blocks along the side whose gradient a kernel makes; the grid is flat
  float softmax_scale;  // what a score's gradient is multiplied by

  // Last, so that kernels without them are the same.
  const float* dlse;  // softmax_lse's gradient, like it; null: it has none
  BiasGradientParams dbias;
  DropoutParams dropout;
  float* peaks;  // like delta, where tensors are bfloat16: see gradient_scale.cuh
  UserParams user;
};
