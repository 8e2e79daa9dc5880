#include "runtime/launch/machine_report.h"

#include <optional>
#include <vector>

#include "generator/legality.h"
#include "runtime/cuda/driver.h"
#include "runtime/cuda/nvrtc_choice.h"
#include "runtime/cuda/nvrtc_search.h"
#include "runtime/launch/machine_report_data.h"
#include "runtime/launch/process.h"

namespace flash_attn_jit {
namespace {

using Json = nlohmann::ordered_json;

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
    found.push_back(
        {"machine code for this driver", choose_nvrtc(search.candidates, {CodeKind::kCubin, driver_version})});
    found.push_back({"PTX for this driver", choose_nvrtc(search.candidates, {CodeKind::kPtx, driver_version})});
  }
  found.push_back({"packs", choose_nvrtc(search.candidates, {CodeKind::kCubin, std::nullopt})});
  return found;
}

Json driver_json(Driver* driver) {
  if (!driver) return {{"found", false}, {"reason", process_driver_absence()}};
  return {{"found", true}, {"path", driver->path().string()}, {"cuda_version", driver_version_text(driver->version())}};
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

}  // namespace

nlohmann::ordered_json machine_report() {
  Driver* const driver = process_driver();
  Json report = {
      {"version", FLASH_ATTN_JIT_VERSION}, {"driver", driver_json(driver)}, {"devices", devices_json(driver)}};
  try {
    const NvrtcSearch search = search_nvrtc(config(), python_search_path());
    report["nvrtc"] = nvrtc_json(search, driver ? std::optional(driver->version()) : std::nullopt);
    report["cache"] = config().cache_dir.empty() ? Json() : Json(config().cache_dir.string());
    report["offline"] = config().offline;
  } catch (const ConfigError& error) {
    report["configuration_error"] = error.what();
  }
  const auto& bundled = process_bundled_pack();
  report["bundled_pack"] = bundled ? Json(bundled->pack.string()) : Json();
  return report;
}

std::string machine_report_json() { return machine_report().dump(2, ' ', false, Json::error_handler_t::replace); }

}  // namespace flash_attn_jit
