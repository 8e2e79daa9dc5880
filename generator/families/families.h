// The descriptors, one a file.
#pragma once

#include "generator/kernel_family.h"

namespace flash_attn_jit {

extern const KernelFamily kForwardFamily;
extern const KernelFamily kBackwardPreprocessFamily;
extern const KernelFamily kBackwardDkDvFamily;
extern const KernelFamily kBackwardDqFamily;

}  // namespace flash_attn_jit
