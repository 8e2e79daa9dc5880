#include "generator/kernel_traffic.h"

#include "generator/families/families.h"

namespace flash_attn_jit {
namespace {

constexpr double kElementBytes = 2, kStatisticBytes = 4;  // fp16; softmax_lse and delta are float32

}  // namespace

double kernel_traffic(const KernelSpec& spec, double queries, double keys) {
  const KernelFamily& family = family_of(spec.kind);
  const KernelResults& made = family.results;
  const bool has_scores = family.products > 0;
  // q with out or dout; out for delta; dq. softmax_lse, and in backward delta. k and v, dk and dv.
  const int query_rows = (has_scores ? 2 : 1) + (made.delta ? 1 : 0) + (made.dq ? 1 : 0);
  const int statistics = has_scores && !made.out ? 2 : 1;
  const int key_rows = (has_scores ? 2 : 0) + (made.dkdv ? 2 : 0);
  const double row_bytes = spec.head_dim * kElementBytes;
  return queries * (query_rows * row_bytes + statistics * kStatisticBytes) + keys * key_rows * row_bytes;
}

}  // namespace flash_attn_jit
