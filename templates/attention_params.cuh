// What every kernel is told of the problem, shared by device code and host code. Strides count elements.
#pragma once

struct TensorStrides {
  long long batch, row, head;
};

constexpr float kLog2E = 1.44269504088896341f;

// ---- of the score features, a struct each ----

struct SoftcapParams {
  float product_scale;  // |softmax_scale| / softcap: tanh's argument is this times a product q k
};

struct AlibiParams {
  const float* slopes;  // (batch, num_heads); the batch stride may be 0
  long long batch_stride;
};

// (batch, num_heads, seqlen_q, seqlen_k); strides count bytes, and are 0 where it is broadcast.
struct PairTensorParams {
  const void* data;
  long long batch_stride, head_stride;
  int query_stride, key_stride;
};

// See bounded_bias(): in units of the least scale still finite. A row whose lse is below kLeastLse sees nothing but
// what a mask put out of the way with such a number: float32 has no digits left for its scores, and it has no
// gradients.
constexpr float kMostBias = 1e15f, kLeastLse = -1e6f;

// ---- of all kernels ----

struct AttentionParams {
  int seqlen_q, seqlen_k;  // varlen: of the longest sequence
  int num_heads, num_heads_k;

  // Varlen: sequence b has the rows [cu_seqlens[b], cu_seqlens[b + 1]) of its tensors, whose batch strides are 0. Keys
  // in pages lie elsewhere: see KeyCacheParams.
  const int* cu_seqlens_q;
  const int* cu_seqlens_k;
  int total_q;  // rows of q, all sequences together

  // Query i sees key j where -window_left <= j - (i + seqlen_k - seqlen_q) <= window_right.
  int window_left, window_right;

  float softmax_scale_log2;  // |softmax_scale| x log2(e), or softcap x log2(e); at least 2^-70, so that a masked score
                             // of -inf stays -inf
  unsigned sign;             // 0x80008000 where softmax_scale is negative: flips the signs of fp16 pairs, else 0

  SoftcapParams softcap;
  AlibiParams alibi;
  PairTensorParams pairs;
};

// ---- of a user's functions, which the kernels' own parameters hold: see user_functions.cuh ----

// A tensor that they read. Dimensions that it lacks are 1 long.
constexpr int kMostUserTensors = 8, kMostUserDims = 4;
struct UserTensor {
  const void* data;
  int sizes[kMostUserDims];
  int strides[kMostUserDims];  // in elements
};
struct UserTensors {
  UserTensor tensor[kMostUserTensors];
};

// Which blocks of pairs a kernel's rows see, as lists: of block r of `row_block` rows, the blocks of columns that are
// seen in part, which mask_mod is asked of, and those that are seen whole. Rows are queries or keys, columns the
// others.
struct BlockLists {
  const int* counts;   // (batch, num_heads, blocks of rows)
  const int* columns;  // (batch, num_heads, blocks of rows, room)
  int room;
};
struct BlockMaskParams {
  BlockLists partial, whole;            // `whole` may be null
  long long batch_stride, head_stride;  // in blocks of rows; 0 where it is the same for all
  int row_block, column_block;          // rows and columns of a block
  int column_blocks;                    // that there are
};

struct UserParams {
  UserTensors tensors;
  BlockMaskParams block_mask;
  float product_scale;  // softmax_scale, of which `sign` has the sign
};

// ---- of dropout, which the kernels' own parameters hold: see dropout.cuh ----

constexpr int kDropoutDigits = 16;
struct DropoutParams {
  const int* seed;                  // 2 of them
  unsigned digits[kDropoutDigits];  // of the share of pairs that are kept, the last one first: all ones or all zeros
  float scale;                      // 1 / that share
  float dp_scale;                   // backward: softmax_scale x scale
};
