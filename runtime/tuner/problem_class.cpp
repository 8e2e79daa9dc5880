#include "runtime/tuner/problem_class.h"

#include <algorithm>
#include <bit>

namespace flash_attn_jit {

std::int64_t Buckets::of(std::int64_t size) const {
  return static_cast<std::int64_t>(std::bit_ceil(static_cast<std::uint64_t>(std::clamp(size, least, greatest))));
}

std::string ProblemClass::kernel() const {
  const std::string text = spec.text();
  return text.substr(0, text.rfind(' '));  // the last word is the tile
}

std::string ProblemClass::text() const {
  return kernel() + " q" + std::to_string(seqlen_q) + " k" + std::to_string(seqlen_k) + " bh" +
         std::to_string(batch_heads);
}

ProblemClass class_of(const KernelSpec& spec, const Problem& problem) {
  ProblemClass found{spec, kSeqlenBuckets.of(problem.seqlen_q), kSeqlenBuckets.of(problem.seqlen_k),
                     kBatchHeadsBuckets.of(problem.batch_heads)};
  found.spec.tile = {};
  return found;
}

KernelSpec parse_kernel_without_tile(std::string_view text) {
  return KernelSpec::parse(std::string(text) + " " + TileConfig{}.text());
}

}  // namespace flash_attn_jit
