#include "runtime/kernel_selection.h"

#include <algorithm>

#include "generator/errors.h"
#include "generator/legality.h"

namespace flash_attn_jit {
namespace {

std::vector<GlobalAccess> accesses_of(int head_dim) {
  if (head_dim % 8 == 0) return {GlobalAccess::kVector16B, GlobalAccess::kElement2B};
  return {GlobalAccess::kElement2B};
}

void append_tiles(KernelSpec spec, const ArchLimits& arch, std::vector<KernelSpec>& specs) {
  require_head_dim(spec.head_dim);
  for (const TileConfig& tile : default_tiles(spec, arch)) {
    spec.tile = tile;
    if (const auto reason = check(spec, arch)) throw UnsupportedError(*reason);
    if (const KernelSpec plain = normalized(spec); std::find(specs.begin(), specs.end(), plain) == specs.end())
      specs.push_back(plain);
  }
}

}  // namespace

std::vector<KernelSpec> select_kernels(const KernelSelection& selection, const ArchLimits& arch) {
  std::vector<KernelSpec> specs;
  for (const KernelKind kind : selection.kinds)
    for (const int head_dim : selection.head_dims)
      for (const Mask mask : selection.masks)
        for (const int group_size : selection.group_sizes)
          for (const GlobalAccess access : accesses_of(head_dim)) {
            KernelSpec spec;
            spec.kind = kind;
            spec.head_dim = head_dim;
            spec.mask = mask;
            spec.group_size = group_size;
            spec.access = access;
            append_tiles(spec, arch, specs);
          }
  return specs;
}

}  // namespace flash_attn_jit
