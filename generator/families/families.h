// The table of families. Their descriptors stand in a file each.
#pragma once

#include <string>

#include "generator/kernel_family.h"

namespace flash_attn_jit {

extern const KernelFamily kForwardFamily;
extern const KernelFamily kForwardWideFamily;
extern const KernelFamily kBackwardPreprocessFamily;
extern const KernelFamily kBackwardDkDvFamily;
extern const KernelFamily kBackwardDqFamily;
extern const KernelFamily kBackwardAllKeysFamily;
extern const KernelFamily kBackwardBiasFamily;
extern const KernelFamily kDecodeFamily;
extern const KernelFamily kDecodeCombineFamily;
extern const KernelFamily kAppendFamily;

const KernelFamily& family_of(KernelKind kind);

std::string kind_words();         // "fwd, bwd_preprocess, ..."
std::string tuned_group_words();  // "fwd, bwd": those that the tuner has problems for
std::string pack_group_words();   // "fwd, bwd, decode"

// The spec with what its family does not read at its plainest value, so that problems which can share a kernel do.
KernelSpec normalized(KernelSpec spec);

}  // namespace flash_attn_jit
