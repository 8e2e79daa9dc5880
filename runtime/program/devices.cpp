// flash-attn-jit devices: the driver, its GPUs, every NVRTC found, where it was looked for.
#include <iostream>
#include <memory>
#include <optional>
#include <string>

#include <nlohmann/json.hpp>

#include "generator/legality.h"
#include "runtime/config.h"
#include "runtime/driver.h"
#include "runtime/nvrtc.h"
#include "runtime/program/command.h"

namespace flash_attn_jit::program {
namespace {

using Json = nlohmann::ordered_json;

std::string version_text(int driver_version) {
  return std::to_string(driver_version / 1000) + "." + std::to_string(driver_version % 1000 / 10);
}

bool is_supported(int sm) {
  try {
    arch_limits(sm);
    return true;
  } catch (const UnsupportedError&) {
    return false;
  }
}

struct Choice {
  std::string use;
  std::optional<NvrtcCandidate> nvrtc;
};

// Which NVRTC is taken for what; FLASH_ATTN_JIT_NVRTC leaves the search one candidate.
std::vector<Choice> choices(const NvrtcSearch& search, std::optional<int> driver_version) {
  std::vector<Choice> found;
  if (driver_version) {
    found.push_back({"machine code for this driver",
                     choose_nvrtc(search.candidates, {CodeKind::kCubin, driver_version})});
    found.push_back(
        {"PTX for this driver", choose_nvrtc(search.candidates, {CodeKind::kPtx, driver_version})});
  }
  found.push_back({"packs", choose_nvrtc(search.candidates, {CodeKind::kCubin, std::nullopt})});
  return found;
}

Json driver_json(Driver* driver) {
  if (!driver) return {{"found", false}, {"reason", process_driver_absence()}};
  return {
      {"found", true}, {"path", driver->path().string()}, {"cuda_version", version_text(driver->version())}};
}

Json devices_json(Driver* driver) {
  Json devices = Json::array();
  for (int ordinal = 0; driver && ordinal < driver->device_count(); ++ordinal) {
    const DeviceInfo info = driver->device_info(ordinal);
    devices.push_back({{"ordinal", info.ordinal},
                       {"name", info.name},
                       {"arch", "sm_" + std::to_string(info.sm)},
                       {"multiprocessors", info.multiprocessors},
                       {"supported", is_supported(info.sm)}});
  }
  return devices;
}

Json nvrtc_json(const NvrtcSearch& search, std::optional<int> driver_version) {
  Json found = Json::array(), used = Json::object(), places = Json::array();
  for (const NvrtcCandidate& candidate : search.candidates)
    found.push_back({{"path", candidate.library.string()},
                     {"version", candidate.version ? Json(candidate.version->text()) : Json()},
                     {"place", candidate.place}});
  for (const Choice& choice : choices(search, driver_version))
    used[choice.use] = choice.nvrtc ? Json(choice.nvrtc->library.string()) : Json();
  for (const SearchedPlace& place : search.places)
    places.push_back({{"place", place.place}, {"path", place.path.string()}, {"outcome", place.outcome}});
  return {{"found", found}, {"used_for", used}, {"searched", places}};
}

Json report() {
  Driver* const driver = process_driver();
  const NvrtcSearch search = search_nvrtc(config(), python_search_path());
  const auto driver_version = driver ? std::optional(driver->version()) : std::nullopt;
  return {{"version", FLASH_ATTN_JIT_VERSION},
          {"driver", driver_json(driver)},
          {"devices", devices_json(driver)},
          {"nvrtc", nvrtc_json(search, driver_version)},
          {"cache", config().cache_dir.empty() ? Json() : Json(config().cache_dir.string())}};
}

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
    std::cout << "CUDA driver: " << text_of(driver["cuda_version"]) << ", " << text_of(driver["path"])
              << "\n";
  else
    std::cout << "CUDA driver: none (" << text_of(driver["reason"]) << ")\n";
  std::cout << "GPUs:" << (report["devices"].empty() ? " none\n" : "\n");
  for (const Json& device : report["devices"])
    std::cout << "  " << device["ordinal"] << ": " << text_of(device["name"]) << ", "
              << text_of(device["arch"]) << ", " << device["multiprocessors"] << " multiprocessors"
              << (device["supported"].get<bool>() ? "" : " (not supported)") << "\n";
  print_nvrtc(report["nvrtc"]);
  std::cout << "Cache: " << text_of(report["cache"]) << "\n";
}

}  // namespace

void add_devices(CLI::App& app, Action& chosen) {
  CLI::App* const command =
      app.add_subcommand("devices", "Show the driver, its GPUs, and the NVRTCs found and where");
  const auto as_json = std::make_shared<bool>(false);
  command->add_flag("--json", *as_json, "Print JSON");
  command->callback([&chosen, as_json] {
    chosen = [as_json] {
      const Json found = report();
      if (*as_json)
        std::cout << json_text(found) << "\n";
      else
        print(found);
      return kSuccess;
    };
  });
}

}  // namespace flash_attn_jit::program
