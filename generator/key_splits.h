// How the decode kernel's keys are split over blocks, so that few rows fill a device.
#pragma once

#include "generator/kernel_spec.h"
#include "generator/problem.h"

namespace flash_attn_jit {

struct KeySplits {
  int count = 1;
  int keys = 0;  // of each but the last; a multiple of what the block's warps go over together
};

inline constexpr int kMostKeySplits = 128;

// For a decode kernel's spec, tile and all. `asked`: as many splits at the most; 0: as many as make the device busy.
// The same on every call: neither lengths on the device nor time have a say.
KeySplits split_keys(const KernelSpec& spec, const Problem& problem, std::int64_t asked = 0);

// What puts a decode kernel's splits together; its tile says nothing.
KernelSpec combine_of(KernelSpec decode);

// Blocks that the rows of a sequence and a key head take.
std::int64_t decode_blocks_of_head(const KernelSpec& spec, std::int64_t seqlen_q);

// Blocks that a problem has, without splits.
std::int64_t decode_row_blocks(const KernelSpec& spec, const Problem& problem);

}  // namespace flash_attn_jit
