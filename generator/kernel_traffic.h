// What a kernel reads and writes of a problem, every tensor once.
#pragma once

#include "generator/kernel_spec.h"

namespace flash_attn_jit {

// Bytes. `queries` are rows of q, of all heads and sequences; `keys` of k.
double kernel_traffic(const KernelSpec& spec, double queries, double keys);

}  // namespace flash_attn_jit
