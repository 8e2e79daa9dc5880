// Which kernels the runtime may choose for given problems: what a pack must hold.
#pragma once

#include <array>
#include <optional>
#include <vector>

#include "generator/kernel_spec.h"
#include "generator/tile_chooser.h"

namespace flash_attn_jit {

// Kernels without something, with it, or both.
struct Switch {
  bool off = true, on = false;
};

struct KernelSelection {
  std::vector<KernelKind> kinds{KernelKind::kForward};
  std::vector<DType> dtypes{DType::kFloat16};
  std::vector<int> head_dims;
  std::optional<int> head_dim_v;  // of v; none: as many as q has
  std::vector<Mask> masks;
  std::vector<int> group_sizes;
  std::array<Switch, kFeatures.size()> features;  // as in kFeatures
};

// The pack named "default", which a wheel may bring: forward, backward and decode, head dims 64 and 128, full and
// causal masks, groups of 1, 2, 4 and 8 heads. Most models that fit a T4 ask for some of these; in a wheel they take
// 6.1 MB.
KernelSelection default_pack();

// Every default tile, with 16-byte accesses (where head dims are multiples of 8) and with element-wise
// ones. Throws UnsupportedError where one of them is not legal on `arch`.
std::vector<KernelSpec> select_kernels(const KernelSelection& selection, const ArchLimits& arch);

}  // namespace flash_attn_jit
