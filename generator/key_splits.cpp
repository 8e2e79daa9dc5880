#include "generator/key_splits.h"

#include <algorithm>

#include "generator/families/families.h"
#include "generator/integers.h"
#include "generator/tile_layout.h"

namespace flash_attn_jit {
namespace {

// Of a warp in a split: with fewer, what splits cost beside their loops tells.
constexpr std::int64_t kLeastIterations = 4;

// Fewer splits are taken where they keep the device this much less busy.
constexpr double kNearlyAsBusy = 0.9;

// The share of the device that works, in the mean of the rounds that `blocks` take.
double busy(std::int64_t blocks, std::int64_t at_once) {
  return static_cast<double>(blocks) / static_cast<double>(ceil_div(blocks, at_once) * at_once);
}

std::int64_t wanted_splits(std::int64_t blocks, std::int64_t at_once, std::int64_t most) {
  if (most <= 1 || blocks >= 4 * at_once) return 1;
  double busiest = 0;
  for (std::int64_t splits = 1; splits <= most; ++splits) busiest = std::max(busiest, busy(blocks * splits, at_once));
  std::int64_t splits = 1;
  while (busy(blocks * splits, at_once) < kNearlyAsBusy * busiest) ++splits;
  return splits;
}

}  // namespace

KernelSpec combine_of(KernelSpec decode) {
  decode.kind = KernelKind::kDecodeCombine;
  return normalized(decode);
}

std::int64_t decode_blocks_of_head(const KernelSpec& spec, std::int64_t seqlen_q) {
  return ceil_div(seqlen_q * spec.group_size, spec.tile.block_m);
}

std::int64_t decode_row_blocks(const KernelSpec& spec, const Problem& problem) {
  return decode_blocks_of_head(spec, problem.seqlen_q) * ceil_div(problem.batch_heads, spec.group_size);
}

KeySplits split_keys(const KernelSpec& spec, const Problem& problem, std::int64_t asked) {
  const std::int64_t step = columns_of_iteration(spec),
                     iterations = std::max<std::int64_t>(1, ceil_div(problem.seqlen_k, step));
  const std::int64_t at_once = std::int64_t{blocks_per_multiprocessor(spec.tile)} * problem.multiprocessors;
  const std::int64_t blocks = std::max<std::int64_t>(1, decode_row_blocks(spec, problem));
  const std::int64_t most = std::min<std::int64_t>(kMostKeySplits, iterations / kLeastIterations);
  std::int64_t count = asked > 0 ? asked : wanted_splits(blocks, at_once, most);
  count = std::clamp<std::int64_t>(count, 1, std::min<std::int64_t>(kMostKeySplits, iterations));
  const std::int64_t keys = ceil_div(iterations, count) * step;
  return {static_cast<int>(ceil_div(iterations * step, keys)), static_cast<int>(keys)};
}

}  // namespace flash_attn_jit
