// Problems that share a tuning record: a kernel without its tile, and sizes that lie in the same buckets.
#pragma once

#include <compare>
#include <cstdint>
#include <string>

#include "generator/kernel_spec.h"
#include "generator/tile_chooser.h"

namespace flash_attn_jit {

struct ProblemClass {
  KernelSpec spec;  // with an empty tile
  // Upper ends of the buckets, powers of two.
  std::int64_t seqlen_q = 0, seqlen_k = 0;
  std::int64_t batch_heads = 0;  // batch x num_heads

  // "fwd hdim128 fp16 causal gqa8 vec16 q1024 k1024 bh64"
  std::string text() const;

  friend auto operator<=>(const ProblemClass&, const ProblemClass&) = default;
};

// Every problem has one: asked at every launch, so nothing is allocated.
ProblemClass class_of(const KernelSpec& spec, const Problem& problem);

}  // namespace flash_attn_jit
