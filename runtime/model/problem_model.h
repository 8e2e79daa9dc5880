// From the cost of a kernel's blocks to the time of a whole problem on a card.
#pragma once

#include <cstdint>
#include <vector>

#include "generator/kernel_spec.h"
#include "runtime/model/card.h"
#include "runtime/model/kernel_model.h"

namespace flash_attn_jit {

struct ProblemSize {
  std::int64_t batch = 1, num_heads = 1, num_heads_k = 1, seqlen_q = 1, seqlen_k = 1;
  // Of a kernel with a window; negative: without end.
  std::int64_t window_left = -1, window_right = -1;
  // Of a kernel with an attn_bias: as many pairs of a sequence and a head it tells apart, batch x num_heads where it is
  // not broadcast. 0: what it reads is not counted.
  std::int64_t bias_heads = 0;
};

struct ProblemPrediction {
  std::int64_t blocks = 0;
  int blocks_per_multiprocessor = 0;
  double waves = 0;       // rounds of blocks over the card, the last one's part counted
  double iterations = 0;  // of a block, in the mean
  double masked_iterations = 0;
  double cycles = 0;        // of the card
  double dram_seconds = 0;  // each byte once, at the card's nominal bandwidth
  double copy_seconds = 0;  // and at what copies get of it, where that is known: no kernel is faster
  double seconds = 0;       // at the clock that the card sustains
  double seconds_at_boost = 0;
  double useful_flops = 0;   // multiplications and additions that the problem needs of this kernel
  double share_of_peak = 0;  // of the tensor cores', at either clock

  bool is_bound_by_dram() const { return seconds == copy_seconds; }
  // Of the bandwidth that copies get.
  double share_of_copies() const { return copy_seconds / seconds; }
};

// Throws UnsupportedError where a size is below 1 or heads do not go into groups.
ProblemPrediction predict(const KernelSpec& spec, const ProblemSize& size, const std::vector<BlockCost>& costs,
                          const Card& card);

}  // namespace flash_attn_jit
