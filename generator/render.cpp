#include "generator/render.h"

#include "generator/errors.h"
#include "generator/families/families.h"
#include "generator/tile_layout.h"

namespace flash_attn_jit {
namespace {

// Writes `file` into `out`, every `#include "x"` of another template replaced by its text, each file once. `asked_by`
// says who includes it.
void inline_template(std::string_view file, const std::string& asked_by, const TemplateSet& templates,
                     std::set<std::string, std::less<>>& seen, std::string& out) {
  if (!seen.emplace(file).second) return;
  const auto found = templates.find(file);
  if (found == templates.end())
    throw Error("there is no template '" + std::string(file) + "', which " + asked_by +
                " includes; a folder in FLASH_ATTN_JIT_TEMPLATES has to hold all of them");
  const auto line_directive = [&](int line) {
    out += "#line " + std::to_string(line) + " \"" + std::string(file) + "\"\n";
  };
  line_directive(1);
  const std::string& text = found->second;
  int line_number = 0;
  for (std::size_t at = 0; at < text.size();) {
    const std::size_t end = std::min(text.find('\n', at), text.size());
    const std::string_view line = std::string_view(text).substr(at, end - at);
    at = end + 1;
    ++line_number;
    constexpr std::string_view kInclude = "#include \"";
    if (line.starts_with(kInclude)) {
      const std::string_view name = line.substr(kInclude.size());
      inline_template(name.substr(0, name.find('"')), std::string(file) + ":" + std::to_string(line_number), templates,
                      seen, out);
      line_directive(line_number + 1);
    } else {
      out += line == "#pragma once" ? "" : line;
      out += '\n';
    }
  }
}

// The templates' class of what tensors are made of: stored.cuh.
const char* stored_class(DType dtype) { return dtype == DType::kFloat16 ? "Fp16" : "Bf16"; }

// The traits struct that specialises the kernel template: every number that the generator decided.
std::string traits(const KernelSpec& spec) {
  const TileConfig& tile = spec.tile;
  const auto constant = [](const char* type, std::string_view name, const std::string& value) {
    return std::string("  static constexpr ") + type + " " + std::string(name) + " = " + value + ";\n";
  };
  const auto type = [](const std::string& name, const std::string& value) {
    return "  using " + name + " = " + value + ";\n";
  };
  const auto number = [&](const char* name, int value) { return constant("int", name, std::to_string(value)); };
  const auto flag = [&](std::string_view name, bool value) { return constant("bool", name, value ? "true" : "false"); };
  std::string features;
  for (const FeatureInfo& info : kFeatures) features += flag(info.trait, spec.has(info.feature));
  return "// " + spec.text() + "\nstruct Traits {\n" + type("Element", "Fp16") +
         type("Stored", stored_class(spec.dtype)) +
         type("Copy", spec.has(Feature::kPaged) ? "PagedCopy" : "RegisterStagedCopy") +
         number("kHeadDim", spec.head_dim) + number("kTileDims", kernel_dims(spec)) +
         number("kHeadDimV", spec.value_head_dim()) + number("kTileDimsV", kernel_value_dims(spec)) +
         number("kGroupSize", spec.group_size) + flag("kIsCausal", spec.mask == Mask::kCausal) +
         flag("kIsLocal", spec.mask == Mask::kWindow) + features +
         flag("kVectorAccess", spec.access == GlobalAccess::kVector16B) + number("kBlockM", tile.block_m) +
         number("kBlockN", tile.block_n) + number("kNWarps", tile.warps) + number("kRegisterDims", tile.register_dims) +
         number("kLoadEighth", tile.schedule.load) + number("kBarrierEighth", tile.schedule.barrier) +
         number("kFirstKeysEighth", tile.schedule.first_keys) + std::string(family_of(spec.kind).trait) + "};\n";
}

RenderedKernel render_kernel(const KernelSpec& spec, const TemplateSet& templates) {
  const KernelFamily& family = family_of(spec.kind);
  RenderedKernel kernel;
  kernel.entry = spec.name();
  kernel.threads = spec.tile.threads();
  kernel.dynamic_smem = family.shared_bytes(spec);
  kernel.useful_mma = useful_mma_per_iteration(spec);
  std::set<std::string, std::less<>> seen;
  const std::string params(family.params);
  inline_template(family.template_file, "the kernel", templates, seen, kernel.source);
  kernel.source += "#line 1 \"" + kernel.entry + ".cu\"\n" + traits(spec) +
                   "extern \"C\" __global__ void __launch_bounds__(" + std::to_string(kernel.threads) + ", " +
                   std::to_string(blocks_per_multiprocessor(spec.tile)) + ") " + kernel.entry + "(const " + params +
                   " params) {\n  " + std::string(family.function) + "<Traits>(params);\n}\n";
  if (!family.tile.empty())
    kernel.source += "static_assert(" + std::string(family.tile) +
                     "<Traits>::kSharedBytes == " + std::to_string(kernel.dynamic_smem) +
                     ", \"generator/families and " + std::string(family.template_file) + " disagree\");\n";
  kernel.source += "#ifdef FLASH_ATTN_JIT_HOST\nextern \"C\" void flash_attn_jit_thread(const void* params) {\n  " +
                   kernel.entry + "(*static_cast<const " + params + "*>(params));\n}\n#endif\n";
  return kernel;
}

}  // namespace

std::set<std::string, std::less<>> templates_of(KernelKind kind, const TemplateSet& templates) {
  std::set<std::string, std::less<>> files;
  std::string source;
  inline_template(family_of(kind).template_file, "the kernel", templates, files, source);
  return files;
}

RenderedKernel render(const KernelSpec& spec, const TemplateSet& templates, std::string_view functions) {
  if (spec.functions != 0) {
    TemplateSet with_functions = templates;
    with_functions.insert_or_assign(std::string(kUserFunctionsFile), std::string(functions));
    return render_kernel(spec, with_functions);
  }
  return render_kernel(spec, templates);
}

RenderedKernel render_tensor_peak(const TemplateSet& templates) {
  RenderedKernel kernel;
  kernel.entry = "flash_tensor_peak";
  kernel.threads = 256;
  std::set<std::string, std::less<>> seen;
  inline_template("tensor_peak.cuh", "the kernel", templates, seen, kernel.source);
  const std::string threads = std::to_string(kernel.threads);
  kernel.source += "#line 1 \"" + kernel.entry + ".cu\"\nextern \"C\" __global__ void __launch_bounds__(" + threads +
                   ") " + kernel.entry + "(const TensorPeakParams params) {\n  tensor_peak<Fp16, " + threads +
                   ">(params);\n}\n";
  return kernel;
}

}  // namespace flash_attn_jit
