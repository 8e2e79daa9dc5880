// The forward kernel's argument.
#pragma once

#include "attention_params.cuh"

// For division by a number that the launch knows: a kernel multiplies instead, which takes a tenth of the instructions.
struct Divisor {
  unsigned multiplier;
  int shift;
};

// What a cache of keys and values adds, which is longer than its sequences.
struct KeyCacheParams {
  // A sequence's keys are [leftpad, used + used_more) of its rows; null: from the first, to the last.
  const int* used;     // (batch)
  const int* leftpad;  // (batch)
  int used_more;       // rows that were appended behind `used`

  // Pages: k and v are (num_pages, page_size, num_heads_k, head_dim), and rows p page_size and on of sequence b lie in
  // page pages[b][p].
  const int* pages;  // (batch, ...)
  long long pages_stride;
  int page_size, num_pages;
  Divisor by_page_size;
};

// See sink.cuh.
struct SinkParams {
  const float* logits;  // (num_heads)
};

struct FlashFwdParams : AttentionParams {
  const void* q;
  const void* k;
  const void* v;
  void* out;
  float* softmax_lse;  // (batch, num_heads, seqlen_q), varlen (num_heads, total_q); contiguous

  TensorStrides q_strides, k_strides, v_strides, out_strides;

  // ceil(rows / kBlockM). The grid is flat: num_m_blocks x num_heads x batch, rows are those of q; of the decode kernel
  // num_m_blocks x splits x num_heads_k x batch, rows are those of q times the heads of a group.
  int num_m_blocks;

  // Last, so that kernels without them are the same.
  KeyCacheParams cache;
  SinkParams sinks;
  DropoutParams dropout;
  UserParams user;
};
