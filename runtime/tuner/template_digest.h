// What a record knows its kernels' source by.
#pragma once

#include <string>

#include "generator/render.h"

namespace flash_attn_jit {

// SHA-256, in hex, of the templates that the family's kernels are made of, and of no others. Empty where one of them is
// not in the set: there are no kernels of this kind then, nor records.
std::string template_digest(KernelKind kind, const TemplateSet& templates);

}  // namespace flash_attn_jit
