// Problems that share a tuning record: a kernel without its tile, and sizes that lie in the same buckets.
#pragma once

#include <compare>
#include <cstdint>
#include <string>
#include <string_view>

#include "generator/kernel_spec.h"
#include "generator/tile_chooser.h"

namespace flash_attn_jit {

// The buckets double: a bucket holds what is greater than half of its upper end, the least bucket all below too, the
// greatest all above.
struct Buckets {
  std::int64_t least, greatest;  // upper ends, powers of two

  std::int64_t of(std::int64_t size) const;
};
inline constexpr Buckets kSeqlenBuckets{64, 1 << 17};
inline constexpr Buckets kBatchHeadsBuckets{1, 1 << 12};

// Of the queries. Where the query heads of a group are rows of one block, queries count by the rows that they make:
// those of a warp's 16 rows are alike, and each doubling beyond them may want another tile.
Buckets query_buckets(const KernelSpec& spec);

struct ProblemClass {
  KernelSpec spec;  // with an empty tile
  // Upper ends of the buckets, powers of two.
  std::int64_t seqlen_q = 0, seqlen_k = 0;
  std::int64_t batch_heads = 0;  // batch x num_heads

  std::string kernel() const;  // "fwd hdim128 fp16 causal gqa8 vec16"
  std::string text() const;    // "fwd hdim128 fp16 causal gqa8 vec16 q1024 k1024 bh64"

  friend auto operator<=>(const ProblemClass&, const ProblemClass&) = default;
};

// Every problem has one: asked at every launch, so nothing is allocated.
ProblemClass class_of(const KernelSpec& spec, const Problem& problem);

// Of ProblemClass::kernel(): a spec with an empty tile. Throws SpecError.
KernelSpec parse_kernel_without_tile(std::string_view text);

}  // namespace flash_attn_jit
