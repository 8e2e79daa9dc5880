// How much arithmetic a kernel's problem is, whatever tile computes it.
#pragma once

#include "runtime/tuner/record.h"

namespace flash_attn_jit {

// Pairs of a query and a key that the mask lets see each other, in one head of one sequence.
double visible_pairs(Mask mask, std::int64_t seqlen_q, std::int64_t seqlen_k, std::int64_t window_left,
                     std::int64_t window_right);

// Floating-point operations of the problem that was measured: a multiplication and an addition for each pair that is
// visible, each head dim and each product of the kernel's kind (2 forward; dK and dV 4 and dQ 3, each of which makes
// the scores for itself). Nothing for padding, nor for what a tile computes of masked pairs. The preprocess kernel,
// which has no such product, multiplies out with dout.
double flops(const TuningRecord& record);

}  // namespace flash_attn_jit
