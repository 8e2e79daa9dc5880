#include "runtime/tuner/flops.h"

#include <algorithm>

#include "generator/families/families.h"
#include "generator/tile_layout.h"

namespace flash_attn_jit {
namespace {

// The sum of clamp(first + i, 0, most) for i of 0 to count - 1.
double clamped_sum(double first, double count, double most) {
  const double below = std::clamp(-first, 0.0, count);           // terms that are 0 for being negative
  const double rising = std::clamp(most - first, below, count);  // from here on they are `most`
  const double terms = rising - below;
  return terms * (first + below) + terms * (terms - 1) / 2 + (count - rising) * most;
}

}  // namespace

double visible_pairs(Mask mask, std::int64_t seqlen_q, std::int64_t seqlen_k, std::int64_t window_left,
                     std::int64_t window_right) {
  const double queries = static_cast<double>(seqlen_q), keys = static_cast<double>(seqlen_k);
  if (mask == Mask::kNone) return queries * keys;
  if (mask == Mask::kCausal) window_left = -1, window_right = 0;
  // Query i stands at key i + keys - queries, and sees those from `left` before it to `right` behind it.
  const double place = keys - queries;
  const double ends =
      window_right < 0 ? queries * keys : clamped_sum(place + static_cast<double>(window_right) + 1, queries, keys);
  const double begins = window_left < 0 ? 0 : clamped_sum(place - static_cast<double>(window_left), queries, keys);
  return ends - begins;
}

double flops(const TuningRecord& record) {
  const KernelSpec& spec = record.key.problem.spec;
  const double heads = static_cast<double>(record.batch) * static_cast<double>(record.num_heads);
  if (family_of(spec.kind).products == 0) return 2 * heads * static_cast<double>(record.seqlen_q) * spec.head_dim;
  return 2 * heads * product_dims(spec) *
         visible_pairs(spec.mask, record.seqlen_q, record.seqlen_k, record.window_left, record.window_right);
}

}  // namespace flash_attn_jit
