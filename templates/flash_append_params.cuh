// The append kernel's argument.
#pragma once

#include "flash_fwd_params.cuh"

// Rotary embedding: a pair of dims is turned by the angle of its place in the sequence.
struct RotaryParams {
  const void* cos;  // (rows, dims / 2); row p is of place p
  const void* sin;
  long long cos_stride, sin_stride;  // of rows
  int rows;
  int dims;          // of a head, those that are turned; 0: none
  bool interleaved;  // pairs are dims 2i and 2i + 1, or i and i + dims / 2
};

struct FlashAppendParams {
  const void* k_new;  // (batch, seqlen_new, num_heads_k, head_dim)
  const void* v_new;
  const void* q;  // (batch, seqlen_q, num_heads, head_dim); seqlen_q is 0 where none is to be turned
  void* k;        // the cache: rows of each sequence, or pages
  void* v;
  void* q_turned;
  TensorStrides k_new_strides, v_new_strides, q_strides, k_strides, v_strides, q_turned_strides;
  int batch, seqlen_new, seqlen_q, num_heads, num_heads_k;

  int cache_rows;        // of a sequence
  bool queries_advance;  // query i has place used + i, or all have place used
  KeyCacheParams cache;  // new row i goes to row used + i
  RotaryParams rotary;
};
