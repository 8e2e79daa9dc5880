// What a kernel reads and writes of a problem, every tensor once.
#pragma once

#include "generator/kernel_spec.h"

namespace flash_attn_jit {

// Rows for each query and for each key, of head_dim elements and of v's head dim, and float32 numbers for each query.
struct RowTraffic {
  int query_rows, query_value_rows, key_rows, value_rows, query_numbers;
};

RowTraffic row_traffic(KernelKind kind);

// Bytes. `queries` are rows of q, of all heads and sequences; `keys` of k; `pairs` the elements of an attn_bias that
// are read, each once: what a spec does not tell, because an attn_bias may be broadcast.
double kernel_traffic(const KernelSpec& spec, double queries, double keys, double pairs);

}  // namespace flash_attn_jit
