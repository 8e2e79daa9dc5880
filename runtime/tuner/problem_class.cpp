#include "runtime/tuner/problem_class.h"

#include <algorithm>
#include <bit>

#include "generator/families/families.h"

namespace flash_attn_jit {
namespace {

constexpr unsigned kRowsOfWarp = 16;

}  // namespace

std::int64_t Buckets::of(std::int64_t size) const {
  return static_cast<std::int64_t>(std::bit_ceil(static_cast<std::uint64_t>(std::clamp(size, least, greatest))));
}

Buckets query_buckets(const KernelSpec& spec) {
  if (!family_of(spec.kind).warps_share_rows) return kSeqlenBuckets;
  const unsigned queries_of_warp = kRowsOfWarp / static_cast<unsigned>(std::max(spec.group_size, 1));
  return {std::bit_floor(std::max(queries_of_warp, 1u)), kSeqlenBuckets.greatest};
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
  ProblemClass found{spec, query_buckets(spec).of(problem.seqlen_q), kSeqlenBuckets.of(problem.seqlen_k),
                     kBatchHeadsBuckets.of(problem.batch_heads)};
  found.spec.tile = {};
  return found;
}

KernelSpec parse_kernel_without_tile(std::string_view text) {
  return KernelSpec::parse(std::string(text) + " " + TileConfig{}.text());
}

}  // namespace flash_attn_jit
