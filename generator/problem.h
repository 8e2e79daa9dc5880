// The sizes of a problem, as far as they decide how it is done.
#pragma once

#include <cstdint>

namespace flash_attn_jit {

// What decides among the tiles of a spec. Of a batch of different lengths the lengths are the greatest.
struct Problem {
  std::int64_t seqlen_q = 0, seqlen_k = 0;
  std::int64_t batch_heads = 0;                     // batch x num_heads
  int multiprocessors = 0;                          // of the device
  std::int64_t window = 0;                          // columns that a row sees at the most, where the mask is a window
  std::int64_t mask_block_q = 0, mask_block_k = 0;  // with a block mask: queries and keys of one of its blocks

  friend bool operator==(const Problem&, const Problem&) = default;
};

}  // namespace flash_attn_jit
