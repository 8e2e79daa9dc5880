// Which kernels the runtime may choose for given problems: what a pack must hold.
#pragma once

#include <vector>

#include "generator/default_tiles.h"
#include "generator/kernel_spec.h"

namespace flash_attn_jit {

struct KernelSelection {
  std::vector<KernelKind> kinds{KernelKind::kForward};
  std::vector<int> head_dims;
  std::vector<Mask> masks;
  std::vector<int> group_sizes;
  std::vector<Softcap> softcaps{Softcap::kOff};
  std::vector<Alibi> alibis{Alibi::kOff};
  std::vector<Lengths> lengths{Lengths::kFixed};
};

// Every default tile, with 16-byte accesses (where the head dim is a multiple of 8) and with element-wise
// ones. Throws UnsupportedError where one of them is not legal on `arch`.
std::vector<KernelSpec> select_kernels(const KernelSelection& selection, const ArchLimits& arch);

}  // namespace flash_attn_jit
