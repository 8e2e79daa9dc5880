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

#include "generator/render.h"
#include "generator/tile_chooser.h"
#include "runtime/library/templates_folder.h"
#include "runtime/program/command.h"
#include "runtime/program/flag_values.h"
#include "runtime/program/fresh_kernel.h"
#include "runtime/system/config.h"

namespace flash_attn_jit::program {
namespace {

using Json = nlohmann::ordered_json;

enum class Emit { kTiles, kSpec, kSource, kPtx, kCubin, kResources };

constexpr std::pair<std::string_view, Emit> kEmitNames[] = {{"tiles", Emit::kTiles},   {"spec", Emit::kSpec},
                                                            {"source", Emit::kSource}, {"ptx", Emit::kPtx},
                                                            {"cubin", Emit::kCubin},   {"resources", Emit::kResources}};

struct InspectFlags {
  KernelFlags kernel;
  std::string arch = "sm_75";
  std::string emit;
  std::string output;
  std::string resources_output;
  std::string nvrtc;
};

Emit parse_emit(const std::string& text) {
  std::string accepted;
  for (const auto& [name, emit] : kEmitNames) {
    if (text == name) return emit;
    accepted += (accepted.empty() ? "" : ", ") + std::string(name);
  }
  throw UsageError("--emit is '" + text + "'; accepted: " + accepted);
}

Json number_json(const std::optional<int>& number) { return number ? Json(*number) : Json("unknown"); }

Json resources_json(const KernelSpec& spec, const FreshKernel& fresh) {
  const auto& [rendered, kernel] = fresh;
  return {{"threads", kernel.threads},
          {"registers", number_json(kernel.resources.registers)},
          {"static_smem", kernel.resources.static_smem},
          {"dynamic_smem", kernel.dynamic_smem},
          {"spill_stores", number_json(kernel.resources.spill_stores)},
          {"spill_loads", number_json(kernel.resources.spill_loads)},
          {"tile", spec.tile.text()},
          {"useful_mma", rendered.useful_mma},
          {"seconds", kernel.seconds},
          {"spec", spec.text()},
          {"built_by", kernel.built_by}};
}

void write_file(const std::string& flag, const std::string& path, const std::string& bytes) {
  std::ofstream file(path, std::ios::binary | std::ios::trunc);
  file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  file.close();
  if (!file)
    throw Error(flag + " " + path + " could not be written; name a file in a folder that is there and can be written");
}

std::string tiles_text(const InspectFlags& flags, const KernelSpec& spec) {
  if (flags.kernel.tile != KernelFlags().tile)
    throw UsageError("--tile is given with --emit tiles, which names the default ones; leave it out");
  std::string text;
  for (const TileConfig& tile : default_tiles(spec)) text += tile.text() + "\n";
  return text;
}

std::string content(const InspectFlags& flags) {
  const ArchLimits arch = parse_arch_flag("--arch", flags.arch);
  const Emit emit = parse_emit(flags.emit);
  const KernelSpec spec = parse_kernel(flags.kernel, arch);
  const Config settings = config_with_nvrtc("--nvrtc", flags.nvrtc);
  if (!flags.resources_output.empty() && emit != Emit::kPtx && emit != Emit::kCubin)
    throw UsageError("--resources is given with --emit " + flags.emit + "; accepted with it: --emit ptx or cubin");
  if (emit == Emit::kTiles) return tiles_text(flags, spec);
  if (emit == Emit::kSpec) return spec.text() + "\n";
  if (emit == Emit::kSource) return render(spec, load_templates(settings)).source;
  const CodeKind code = emit == Emit::kPtx ? CodeKind::kPtx : CodeKind::kCubin;
  const FreshKernel compiled = compile_afresh(spec, {.sm = arch.sm, .code = code}, settings);
  if (emit != Emit::kResources && flags.resources_output.empty()) return compiled.kernel.image;
  const std::string resources = json_text(resources_json(spec, compiled)) + "\n";
  if (emit == Emit::kResources) return resources;
  write_file("--resources", flags.resources_output, resources);
  return compiled.kernel.image;
}

int run_inspect(const InspectFlags& flags) {
  const bool to_file = !flags.output.empty();
  if (!to_file && flags.emit == "cubin" && isatty(STDOUT_FILENO) == 1)
    throw UsageError(
        "--emit is 'cubin', which is binary, and standard output is a terminal; accepted: -o FILE, or a "
        "pipe");
  const std::string bytes = content(flags);
  if (to_file)
    write_file("-o", flags.output, bytes);
  else
    std::cout << bytes;
  return kSuccess;
}

}  // namespace

void add_inspect(CLI::App& app, Action& chosen) {
  CLI::App* const command = app.add_subcommand("inspect", "Show one kernel: its spec, source, code or resources");
  const auto flags = std::make_shared<InspectFlags>();
  add_kernel_flags(*command, flags->kernel, "the one for large problems");
  command->add_option("--arch", flags->arch, "Architecture to compile for")->capture_default_str();
  command
      ->add_option("--emit", flags->emit,
                   "tiles (the default ones, that for large problems first), spec, source, ptx, cubin "
                   "(raw ELF) or resources (JSON)")
      ->required();
  command->add_option("-o", flags->output, "Write to this file instead of standard output");
  command->add_option("--resources", flags->resources_output,
                      "Beside ptx or cubin: write the resources (JSON) to this file");
  command->add_option("--nvrtc", flags->nvrtc, "The libnvrtc to compile with, or the folder that has it");
  command->callback([&chosen, flags] { chosen = [flags] { return run_inspect(*flags); }; });
}

}  // namespace flash_attn_jit::program
