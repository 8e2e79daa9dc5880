#include "generator/kernel_traffic.h"

#include "generator/families/families.h"

namespace flash_attn_jit {
namespace {

constexpr double kElementBytes = 2, kNumberBytes = 4;  // fp16; float32

}  // namespace

RowTraffic row_traffic(KernelKind kind) {
  const KernelResults& made = family_of(kind).results;
  if (made.cache)
    return {.query_rows = 0,
            .query_value_rows = 0,
            .key_rows = 2,
            .value_rows = 2,
            .query_numbers = 0};  // new k, v; where they go
  const bool has_scores = family_of(kind).products > 0;
  return {.query_rows = (has_scores ? 1 : 0) + (made.dq ? 1 : 0),    // q; dq
          .query_value_rows = 1 + (made.delta ? 1 : 0),              // out or dout; out
          .key_rows = (has_scores ? 1 : 0) + (made.dkdv ? 1 : 0),    // k; dk
          .value_rows = (has_scores ? 1 : 0) + (made.dkdv ? 1 : 0),  // v; dv
          .query_numbers = has_scores && !made.out ? 2 : 1};         // softmax_lse, delta
}

double kernel_traffic(const KernelSpec& spec, double queries, double keys, double pairs) {
  const RowTraffic rows = row_traffic(spec.kind);
  const double row_bytes = spec.head_dim * kElementBytes, value_row_bytes = spec.value_head_dim() * kElementBytes;
  return queries * (rows.query_rows * row_bytes + rows.query_value_rows * value_row_bytes +
                    rows.query_numbers * kNumberBytes) +
         keys * (rows.key_rows * row_bytes + rows.value_rows * value_row_bytes) +
         pairs * spec.features.pair_bytes() * (family_of(spec.kind).results.dbias ? 2 : 1);  // read, and written
}

}  // namespace flash_attn_jit
