// flash-attn-jit devices: the driver, its GPUs, every NVRTC found, where it was looked for.
#include <iostream>
#include <memory>
#include <string>

#include <nlohmann/json.hpp>

#include "runtime/launch/machine_report_data.h"
#include "runtime/launch/process.h"
#include "runtime/program/command.h"

namespace flash_attn_jit::program {
namespace {

using Json = nlohmann::ordered_json;

std::string text_of(const Json& value) { return value.is_null() ? "none" : value.get<std::string>(); }

void print_nvrtc(const Json& nvrtc) {
  std::cout << "NVRTC:\n";
  if (nvrtc["found"].empty())
    std::cout << "  none found. 'pip install flash-attn-jit[cu12]' or 'pip install flash-attn-jit[cu13]' "
                 "brings one.\n";
  for (const Json& found : nvrtc["found"])
    std::cout << "  " << (found["version"].is_null() ? "unknown version" : text_of(found["version"])) << "  "
              << text_of(found["path"]) << "  (" << text_of(found["place"]) << ")\n";
  for (const auto& [use, path] : nvrtc["used_for"].items())
    std::cout << "  for " << use << ": " << text_of(path) << "\n";
  std::cout << "  looked in:\n";
  for (const Json& place : nvrtc["searched"])
    std::cout << "    " << text_of(place["place"]) << ": " << text_of(place["path"]) << ": "
              << text_of(place["outcome"]) << "\n";
}

void print(const Json& report) {
  std::cout << "flash-attn-jit " << text_of(report["version"]) << "\n";
  const Json& driver = report["driver"];
  if (driver["found"].get<bool>())
    std::cout << "CUDA driver: " << text_of(driver["cuda_version"]) << ", " << text_of(driver["path"]) << "\n";
  else
    std::cout << "CUDA driver: none (" << text_of(driver["reason"]) << ")\n";
  std::cout << "GPUs:" << (report["devices"].empty() ? " none\n" : "\n");
  for (const Json& device : report["devices"])
    std::cout << "  " << device["ordinal"] << ": " << text_of(device["name"]) << ", " << text_of(device["arch"]) << ", "
              << device["multiprocessors"] << " multiprocessors"
              << (device["supported"].get<bool>() ? "" : " (not supported)") << "\n";
  print_nvrtc(report["nvrtc"]);
  std::cout << "Cache: " << text_of(report["cache"]) << "\n";
  if (report["offline"].get<bool>())
    std::cout << "Offline: FLASH_ATTN_JIT_OFFLINE is 1, so that no kernel is compiled for a GPU\n";
}

}  // namespace

void add_devices(CLI::App& app, Action& chosen) {
  CLI::App* const command = app.add_subcommand("devices", "Show the driver, its GPUs, and the NVRTCs found and where");
  const auto as_json = std::make_shared<bool>(false);
  command->add_flag("--json", *as_json, "Print JSON");
  command->callback([&chosen, as_json] {
    chosen = [as_json] {
      config();  // a bad variable is this command's error, not a line of its report
      const Json found = machine_report();
      if (*as_json)
        std::cout << json_text(found) << "\n";
      else
        print(found);
      return kSuccess;
    };
  });
}

}  // namespace flash_attn_jit::program
