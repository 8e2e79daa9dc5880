#include "generator/families/families.h"

namespace flash_attn_jit {
namespace {

// Each word once; those of a group stand together.
template <class WordOf>
std::string words(WordOf word_of) {
  std::string text;
  std::string_view last;
  for (const KernelKind kind : kKernelKinds) {
    const std::string_view next = word_of(kind);
    if (!next.empty() && next != last) text += (text.empty() ? "" : ", ") + std::string(next);
    last = next;
  }
  return text;
}

}  // namespace

// A kind without a family does not compile.
#pragma GCC diagnostic push
#pragma GCC diagnostic error "-Wswitch"
const KernelFamily& family_of(KernelKind kind) {
  switch (kind) {
    case KernelKind::kForward:
      return kForwardFamily;
    case KernelKind::kForwardWide:
      return kForwardWideFamily;
    case KernelKind::kBackwardPreprocess:
      return kBackwardPreprocessFamily;
    case KernelKind::kBackwardDkDv:
      return kBackwardDkDvFamily;
    case KernelKind::kBackwardDq:
      return kBackwardDqFamily;
    case KernelKind::kBackwardAllKeys:
      return kBackwardAllKeysFamily;
    case KernelKind::kBackwardBias:
      return kBackwardBiasFamily;
    case KernelKind::kDecode:
      return kDecodeFamily;
    case KernelKind::kDecodeCombine:
      return kDecodeCombineFamily;
    case KernelKind::kAppend:
      return kAppendFamily;
  }
  return kForwardFamily;
}
#pragma GCC diagnostic pop

std::string_view to_text(KernelKind kind) { return family_of(kind).word; }

std::string kind_words() {
  return words([](KernelKind kind) { return to_text(kind); });
}

std::string tuned_group_words() {
  return words([](KernelKind kind) {
    const KernelFamily& family = family_of(kind);
    return family.is_tuned ? family.pack_group : std::string_view();
  });
}

std::string pack_group_words() {
  return words([](KernelKind kind) { return family_of(kind).pack_group; });
}

KernelSpec normalized(KernelSpec spec) {
  const KernelFamily& family = family_of(spec.kind);
  const FeatureSet none, given = spec.features;
  spec.features =
      (family.reads_mask ? given.of_main_loop() : none) | (family.results.out ? given.finishing_rows() : none);
  if (!spec.features.are_users()) spec.functions = 0;
  if (family.reads_values_alone) spec.set_head_dims(spec.value_head_dim(), spec.value_head_dim());
  if (family.reads_mask) return spec;
  spec.mask = Mask::kNone;
  spec.group_size = 1;
  return spec;
}

}  // namespace flash_attn_jit
