// The argument of the decode kernels: forward's, and how the keys are split over blocks.
#pragma once

#include "flash_fwd_params.cuh"

struct FlashDecodeParams : FlashFwdParams {
  // One split writes out and softmax_lse. More of them write what they found of each row to `partial_out` and
  // `partial_rows`, and flash_decode_combine() puts it together.
  int num_splits;
  int keys_per_split;  // a multiple of what the warps that share rows go over together

  // A row is a number of softmax_lse, in its order.
  int total_rows;
  float* partial_out;   // (num_splits, total_rows, kTileDimsV): O before the division by row_sum
  float* partial_rows;  // (num_splits, total_rows, 2): row_max and row_sum
};
