#include "generator/kernel_selection.h"
#include "generator/families/families.h"

#include <algorithm>

#include "generator/errors.h"
#include "generator/legality.h"

namespace flash_attn_jit {
namespace {

std::vector<GlobalAccess> accesses_of(const KernelSpec& spec) {
  if (spec.head_dim % 8 == 0 && spec.value_head_dim() % 8 == 0)
    return {GlobalAccess::kVector16B, GlobalAccess::kElement2B};
  return {GlobalAccess::kElement2B};
}

// Every spec of `specs` with every value in `field`.
template <class Value>
void cross(std::vector<KernelSpec>& specs, const std::vector<Value>& values, Value KernelSpec::* field) {
  std::vector<KernelSpec> product;
  for (const KernelSpec& spec : specs)
    for (const Value value : values) {
      product.push_back(spec);
      product.back().*field = value;
    }
  specs = std::move(product);
}

std::vector<FeatureSet> feature_sets(const KernelSelection& selection) {
  std::vector<FeatureSet> sets;
  for (const FeatureSet set : all_feature_sets()) {
    bool wanted = true;
    for (std::size_t i = 0; i < kFeatures.size(); ++i)
      wanted &= set.has(kFeatures[i].feature) ? selection.features[i].on : selection.features[i].off;
    if (wanted) sets.push_back(set);
  }
  return sets;
}

void append_tiles(KernelSpec spec, const ArchLimits& arch, std::vector<KernelSpec>& specs) {
  const KernelFamily& family = family_of(spec.kind);
  const KernelResults& results = family.results;
  if (spec.features.forward_only() && !results.out && !results.cache) return;
  if (spec.has(Feature::kDropout) && family.pack_group == family_of(KernelKind::kDecode).pack_group) return;
  if (results.dbias && !spec.features.read_numbers()) return;
  spec = normalized(spec);
  for (const TileConfig& tile : default_tiles(spec)) {
    spec.tile = tile;
    if (const auto reason = check(spec, arch)) throw UnsupportedError(*reason);
    if (std::find(specs.begin(), specs.end(), spec) == specs.end()) specs.push_back(spec);
  }
}

// Of the kernels of a pass one at least has to have each head dim.
void require_head_dims_of_pack(const KernelSelection& selection) {
  for (const int head_dim : selection.head_dims)
    for (const KernelKind kind : selection.kinds)
      if (const auto reason = check_head_dim(kind, head_dim);
          reason && std::ranges::none_of(selection.kinds, [&](KernelKind other) {
            return family_of(other).pack_group == family_of(kind).pack_group && !check_head_dim(other, head_dim);
          }))
        throw UnsupportedError(*reason);
}

}  // namespace

KernelSelection default_pack() {
  KernelSelection pack;
  pack.kinds.assign(kKernelKinds.begin(), kKernelKinds.end());
  pack.head_dims = {64, 128};
  pack.masks = {Mask::kNone, Mask::kCausal};
  pack.group_sizes = {1, 2, 4, 8};
  return pack;
}

std::vector<KernelSpec> select_kernels(const KernelSelection& selection, const ArchLimits& arch) {
  require_head_dims_of_pack(selection);
  std::vector<KernelSpec> problems{KernelSpec{}};
  cross(problems, selection.kinds, &KernelSpec::kind);
  cross(problems, selection.dtypes, &KernelSpec::dtype);
  cross(problems, selection.head_dims, &KernelSpec::head_dim);
  cross(problems, selection.masks, &KernelSpec::mask);
  cross(problems, feature_sets(selection), &KernelSpec::features);
  cross(problems, selection.group_sizes, &KernelSpec::group_size);
  std::vector<KernelSpec> specs;
  for (KernelSpec spec : problems) {
    spec.set_head_dims(spec.head_dim, selection.head_dim_v.value_or(spec.head_dim));
    for (const GlobalAccess access : accesses_of(spec)) {
      spec.access = access;
      append_tiles(spec, arch, specs);
    }
  }
  return specs;
}

}  // namespace flash_attn_jit
