#include "generator/kernel_family.h"

#include "generator/families/families.h"

namespace flash_attn_jit {

const KernelFamily& family_of(KernelKind kind) {
  switch (kind) {
    case KernelKind::kForward:
      return kForwardFamily;
    case KernelKind::kBackwardPreprocess:
      return kBackwardPreprocessFamily;
    case KernelKind::kBackwardDkDv:
      return kBackwardDkDvFamily;
    case KernelKind::kBackwardDq:
      return kBackwardDqFamily;
  }
  return kForwardFamily;
}

namespace {

// The words of all families, each once.
std::string words(std::string_view KernelFamily::*word) {
  std::string text;
  std::string_view last;
  for (const KernelKind kind : kKernelKinds) {
    const std::string_view next = family_of(kind).*word;
    if (next != last) text += (text.empty() ? "" : ", ") + std::string(next);
    last = next;
  }
  return text;
}

}  // namespace

std::string kind_words() { return words(&KernelFamily::word); }
std::string pack_group_words() { return words(&KernelFamily::pack_group); }

}  // namespace flash_attn_jit
