// flash-attn-jit inspect: one kernel, as its spec, its source, its code or what it needs of the machine.
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <iterator>
#include <map>
#include <string>
#include <string_view>

#include <unistd.h>
#include <nlohmann/json.hpp>

#include "generator/families/families.h"
#include "generator/render.h"
#include "runtime/library/kernel_library.h"
#include "runtime/library/templates_folder.h"
#include "runtime/program/command.h"
#include "runtime/program/flag_values.h"
#include "runtime/system/config.h"
#include "runtime/system/errors.h"
#include "runtime/system/files.h"

namespace flash_attn_jit::program {
namespace {

using Json = nlohmann::ordered_json;

enum class Emit { kSpec, kSource, kPtx, kCubin, kResources };

constexpr std::pair<std::string_view, Emit> kEmitNames[] = {{"spec", Emit::kSpec},
                                                            {"source", Emit::kSource},
                                                            {"ptx", Emit::kPtx},
                                                            {"cubin", Emit::kCubin},
                                                            {"resources", Emit::kResources}};

struct InspectFlags {
  KernelFlags kernel;
  std::string arch = "sm_75";
  std::string emit;
  std::string output;
  std::string nvrtc;
};

Emit parse_emit(const std::string& text) {
  for (const auto& [name, emit] : kEmitNames)
    if (text == name) return emit;
  throw UsageError("--emit is '" + text + "'; accepted: spec, source, ptx, cubin, resources");
}

// A folder for the compiler's output, removed with its content unless a source was kept in it.
class ScratchFolder {
 public:
  ScratchFolder() {
    path_ = make_temporary_folder("flash-attn-jit-inspect");
  }
  ~ScratchFolder() {
    std::error_code ignored;
    if (!kept_) std::filesystem::remove_all(path_, ignored);
  }
  ScratchFolder(const ScratchFolder&) = delete;
  ScratchFolder& operator=(const ScratchFolder&) = delete;
  const std::filesystem::path& path() const { return path_; }
  void keep() { kept_ = true; }

 private:
  std::filesystem::path path_;
  bool kept_ = false;
};

// Compiles afresh: what a cache holds may come from another NVRTC than the one that the flags or variables
// name.
CompiledKernel compile(const KernelSpec& spec, const CompileTarget& target, const Config& settings) {
  ScratchFolder scratch;
  KernelLibrary library(
      {.config = settings, .cache = {.dir = scratch.path(), .prebuilt = {}}, .driver_version = {}});
  try {
    return library.find_or_compile(spec, target).kernel;
  } catch (const CompileError&) {
    scratch.keep();  // it holds the source that the error names
    throw;
  }
}

Json number_json(const std::optional<int>& number) { return number ? Json(*number) : Json("unknown"); }

Json resources_json(const KernelSpec& spec, const RenderedKernel& rendered, const CompiledKernel& kernel) {
  return {{"threads", kernel.threads},
          {"registers", number_json(kernel.resources.registers)},
          {"static_smem", kernel.resources.static_smem},
          {"dynamic_smem", kernel.dynamic_smem},
          {"spill_stores", number_json(kernel.resources.spill_stores)},
          {"spill_loads", number_json(kernel.resources.spill_loads)},
          {"tile", spec.tile.text()},
          {"useful_mma", rendered.useful_mma},
          {"warp_roles", rendered.warp_roles},
          {"seconds", kernel.seconds},
          {"spec", spec.text()},
          {"built_by", kernel.built_by}};
}

std::string content(const InspectFlags& flags) {
  const ArchLimits arch = parse_arch_flag("--arch", flags.arch);
  const Emit emit = parse_emit(flags.emit);
  const KernelSpec spec = parse_kernel(flags.kernel, arch);
  const Config settings = config_with_nvrtc("--nvrtc", flags.nvrtc);
  if (emit == Emit::kSpec) return spec.text() + "\n";

  const RenderedKernel rendered = render(spec, load_templates(settings));
  if (emit == Emit::kSource) return rendered.source;
  if (emit == Emit::kPtx) return compile(spec, {.sm = arch.sm, .code = CodeKind::kPtx}, settings).image;

  const CompiledKernel kernel = compile(spec, {.sm = arch.sm, .code = CodeKind::kCubin}, settings);
  if (emit == Emit::kCubin) return kernel.image;
  return json_text(resources_json(spec, rendered, kernel)) + "\n";
}

void write_file(const std::string& path, const std::string& bytes) {
  std::ofstream file(path, std::ios::binary | std::ios::trunc);
  file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  file.close();
  if (!file)
    throw Error("-o " + path +
                " could not be written; name a file in a folder that is there and can be written");
}

int run_inspect(const InspectFlags& flags) {
  const bool to_file = !flags.output.empty();
  if (!to_file && flags.emit == "cubin" && isatty(STDOUT_FILENO) == 1)
    throw UsageError(
        "--emit is 'cubin', which is binary, and standard output is a terminal; accepted: -o FILE, or a "
        "pipe");
  const std::string bytes = content(flags);
  if (to_file)
    write_file(flags.output, bytes);
  else
    std::cout << bytes;
  return kSuccess;
}

}  // namespace

void add_inspect(CLI::App& app, Action& chosen) {
  CLI::App* const command =
      app.add_subcommand("inspect", "Show one kernel: its spec, source, code or resources");
  const auto flags = std::make_shared<InspectFlags>();
  command->add_option("--kind", flags->kernel.kind, "Kind of kernel: " + kind_words())->capture_default_str();
  command->add_option("--head-dim", flags->kernel.head_dim, "Head dim, 1 to 256")->required();
  command->add_flag("--causal", flags->kernel.causal, "With the causal mask");
  command->add_flag("--window", flags->kernel.window, "With a sliding window instead");
  for (std::size_t i = 0; i < kFeatures.size(); ++i)
    command->add_flag("--" + std::string(kFeatures[i].word), flags->kernel.features[i],
                      "The kernel " + std::string(kFeatures[i].phrase));
  command->add_option("--gqa", flags->kernel.gqa, "Group size: num_heads / num_heads_k")
      ->capture_default_str();
  command->add_option("--arch", flags->arch, "Architecture to compile for")->capture_default_str();
  command
      ->add_option("--tile", flags->kernel.tile,
                   "auto (the default for large problems) or a tile like m256n16w8q80l2b4k7")
      ->capture_default_str();
  command->add_option("--emit", flags->emit, "spec, source, ptx, cubin (raw ELF) or resources (JSON)")
      ->required();
  command->add_option("-o", flags->output, "Write to this file instead of standard output");
  command->add_option("--nvrtc", flags->nvrtc, "The libnvrtc to compile with, or the folder that has it");
  command->callback([&chosen, flags] { chosen = [flags] { return run_inspect(*flags); }; });
}

}  // namespace flash_attn_jit::program
