// What default tiles depend on beside head dims and the kind of access, in every combination.
#pragma once

#include <vector>

#include "generator/kernel_spec.h"

namespace flash_attn_jit::testing {

// Visits a spec of every kind, dtype, mask, one of `feature_sets` and a head of keys for one of queries and for two.
template <class Visit>
void for_every_spec(int head_dim, const std::vector<FeatureSet>& feature_sets, Visit visit) {
  for (const KernelKind kind : kKernelKinds)
    for (const DType dtype : kDTypes)
      for (const Mask mask : kAllMasks)
        for (const FeatureSet& features : feature_sets)
          for (const int group_size : {1, 2}) {
            KernelSpec spec;
            spec.kind = kind;
            spec.dtype = dtype;
            spec.head_dim = head_dim;
            spec.mask = mask;
            spec.features = features;
            spec.group_size = group_size;
            visit(spec);
          }
}

}  // namespace flash_attn_jit::testing
