// KernelSpec -> source. Pure: the template texts come in as an argument.
#pragma once

#include <map>
#include <set>
#include <string>
#include <string_view>

#include "generator/kernel_spec.h"

namespace flash_attn_jit {

// File name -> text of every template.
using TemplateSet = std::map<std::string, std::string, std::less<>>;

struct RenderedKernel {
  std::string source;    // one self-contained translation unit, with #line directives to the template files
  std::string entry;     // the kernel's extern "C" name
  int threads = 0;       // per block
  int dynamic_smem = 0;  // bytes per block
  int useful_mma = 0;  // tensor instructions one warp's iteration of the unmasked main loop needs for the true head dim
};

// The templates embedded at build time.
const TemplateSet& embedded_templates();

// The files that a kernel of this kind is made of. Throws Error where a template includes one that is not in the set.
std::set<std::string, std::less<>> templates_of(KernelKind kind, const TemplateSet& templates);

// The template whose place a user's code takes: see templates/user_functions.cuh.
inline constexpr std::string_view kUserFunctionsFile = "user_functions.cuh";

// Renders a spec. `functions` is the code that spec.functions is the number of, where it is not 0. Does not check
// legality. Throws Error where a template includes one that is not in the set.
RenderedKernel render(const KernelSpec& spec, const TemplateSet& templates, std::string_view functions = {});

// The kernel of templates/tensor_peak.cuh, which says how fast a GPU's tensor instructions are. Throws as render().
RenderedKernel render_tensor_peak(const TemplateSet& templates);

}  // namespace flash_attn_jit
