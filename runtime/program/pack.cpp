// flash-attn-jit pack: what a pack holds, and whether it is as it should be, whoever made it.
#include <algorithm>
#include <filesystem>
#include <iostream>
#include <memory>
#include <optional>
#include <string>
#include <system_error>

#include <nlohmann/json.hpp>

#include "runtime/cache/pack_files.h"
#include "runtime/library/kernel_library.h"
#include "runtime/library/pack_check.h"
#include "runtime/program/command.h"
#include "runtime/program/flag_values.h"

namespace flash_attn_jit::program {
namespace {

using Json = nlohmann::ordered_json;

constexpr std::size_t kMostFaultsPrinted = 20;

struct PackFlags {
  std::string path;
  bool json = false;
  bool rebuild = false;  // of verify
  std::string nvrtc;     // of verify
};

std::unique_ptr<PackFiles> open_pack(const std::string& path) {
  std::unique_ptr<PackFiles> pack = PackFiles::open(path, Links::kRefused);
  if (pack == nullptr)
    throw UsageError("PACK is '" + path + "'; accepted: a pack's folder or zip file; there is none at that path");
  return pack;
}

// A pack's own words may hold what a terminal obeys.
std::string printable(std::string text) {
  for (char& letter : text)
    if (letter < ' ' || letter > '~') letter = '?';
  return text;
}

std::string optional_text(const std::optional<int>& number) { return number ? std::to_string(*number) : "?"; }

Json optional_json(const std::optional<int>& number) { return number ? Json(*number) : Json(); }

Json faults_json(const PackListing& listing) {
  Json faults = Json::array();
  for (const PackFault& fault : listing.faults)
    faults.push_back({{"file", fault.name.empty() ? Json() : Json(fault.name)}, {"fault", fault.fault}});
  return faults;
}

void print_faults(const PackListing& listing) {
  const std::size_t printed = std::min(listing.faults.size(), kMostFaultsPrinted);
  for (std::size_t i = 0; i < printed; ++i) {
    const PackFault& fault = listing.faults[i];
    std::cout << "FAULT: " << (fault.name.empty() ? "" : printable(fault.name) + ": ") << printable(fault.fault)
              << "\n";
  }
  if (listing.faults.size() > printed)
    std::cout << "FAULT: and " << listing.faults.size() - printed << " more; --json names all\n";
}

Json kernel_json(const PackedKernel& packed) {
  const CompiledKernel& kernel = packed.file.kernel;
  return {{"file", packed.name},
          {"bytes", packed.bytes},
          {"spec", packed.file.id.spec},
          {"target", packed.file.id.target},
          {"built_by", kernel.built_by},
          {"min_driver", kernel.min_driver},
          {"registers", optional_json(kernel.resources.registers)},
          {"spill_stores", optional_json(kernel.resources.spill_stores)},
          {"spill_loads", optional_json(kernel.resources.spill_loads)}};
}

void print_kernel(const PackedKernel& packed) {
  const CompiledKernel& kernel = packed.file.kernel;
  std::cout << printable(packed.file.id.spec) << "  " << printable(packed.file.id.target) << "  "
            << printable(kernel.built_by) << "  driver " << kernel.min_driver / 1000 << "."
            << kernel.min_driver % 1000 / 10 << "  " << optional_text(kernel.resources.registers)
            << " registers  spills " << optional_text(kernel.resources.spill_stores) << "/"
            << optional_text(kernel.resources.spill_loads) << " bytes  " << packed.bytes << " bytes\n";
}

std::string summary(const PackListing& listing) {
  return std::to_string(listing.kernels.size()) + " kernels, " + std::to_string(listing.records) + " tuning records, " +
         std::to_string(listing.bytes) + " bytes, made by flash-attn-jit " +
         (listing.library.empty() ? "of unknown version" : printable(listing.library));
}

int show(const PackFlags& flags) {
  const std::unique_ptr<PackFiles> pack = open_pack(flags.path);
  const PackListing listing = list_pack(*pack);
  if (flags.json) {
    Json kernels = Json::array();
    for (const PackedKernel& kernel : listing.kernels) kernels.push_back(kernel_json(kernel));
    std::cout << json_text({{"pack", flags.path},
                            {"zip", pack->is_zip()},
                            {"library", listing.library.empty() ? Json() : Json(listing.library)},
                            {"bytes", listing.bytes},
                            {"records", listing.records},
                            {"kernels", kernels},
                            {"faults", faults_json(listing)}})
              << "\n";
    return kSuccess;
  }
  for (const PackedKernel& kernel : listing.kernels) print_kernel(kernel);
  print_faults(listing);
  std::cout << flags.path << ": " << summary(listing) << "\n";
  return kSuccess;
}

// The configuration to rebuild with, where that is asked for.
std::optional<Config> rebuild_settings(const PackFlags& flags) {
  if (!flags.rebuild && !flags.nvrtc.empty())
    throw UsageError("--nvrtc is given without --rebuild, which compiles; accepted: both, or neither");
  if (!flags.rebuild) return std::nullopt;
  Config settings = config_with_nvrtc("--nvrtc", flags.nvrtc);
  if (settings.offline)
    throw UsageError("--rebuild compiles, which FLASH_ATTN_JIT_OFFLINE=1 forbids; accepted: one of them");
  return settings;
}

int verify(const PackFlags& flags) {
  const std::optional<Config> rebuild = rebuild_settings(flags);
  const Config settings = config_with_nvrtc("--nvrtc", "");
  const std::unique_ptr<PackFiles> pack = open_pack(flags.path);
  KernelLibrary library({.config = settings, .cache = cache_settings(settings), .driver_version = {}});
  const PackVerdict verdict = verify_pack(*pack, library, rebuild);
  const PackListing& listing = verdict.listing;
  if (flags.json) {
    std::cout << json_text({{"pack", flags.path},
                            {"kernels", listing.kernels.size()},
                            {"records", listing.records},
                            {"bytes", listing.bytes},
                            {"rebuilt", rebuild ? Json(verdict.rebuilt) : Json()},
                            {"faults", faults_json(listing)}})
              << "\n";
  } else {
    print_faults(listing);
    std::cout << flags.path << ": " << summary(listing) << "; "
              << (rebuild ? std::to_string(verdict.rebuilt) + " rebuilt to the same bytes, " : "")
              << listing.faults.size() << (listing.faults.size() == 1 ? " fault\n" : " faults\n");
  }
  return listing.faults.empty() ? kSuccess : kFailure;
}

}  // namespace

void add_pack(CLI::App& app, Action& chosen) {
  CLI::App* const pack = app.add_subcommand("pack", "Show and check a pack of kernels, whoever made it; runs none");
  pack->require_subcommand(1);
  const auto flags = std::make_shared<PackFlags>();
  const auto add = [&](const char* name, const char* what, int (*work)(const PackFlags&)) {
    CLI::App* const command = pack->add_subcommand(name, what);
    command->add_option("PACK", flags->path, "The pack's folder or zip file")->required();
    command->add_flag("--json", flags->json, "Print JSON");
    command->callback([&chosen, flags, work] { chosen = [flags, work] { return work(*flags); }; });
    return command;
  };
  add("show", "List its kernels", show);
  CLI::App* const command = add("verify", "Check every file and every key; fails where one is not right", verify);
  command->add_flag("--rebuild", flags->rebuild,
                    "Compile each kernel with the NVRTC that it names, and compare the bytes");
  command->add_option("--nvrtc", flags->nvrtc, "With --rebuild: the libnvrtc, or the folder that has it");
}

}  // namespace flash_attn_jit::program
