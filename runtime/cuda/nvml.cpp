#include "runtime/cuda/nvml.h"

#include <array>
#include <cstdio>

#include "runtime/system/dynamic_library.h"

namespace flash_attn_jit {
namespace {

// nvml.h, from NVIDIA's NVML API reference.
constexpr int kNvmlSuccess = 0;
constexpr unsigned kSmClock = 1;          // NVML_CLOCK_SM
constexpr unsigned kGpuTemperature = 0;   // NVML_TEMPERATURE_GPU
constexpr std::uint64_t kReasonIdle = 1;  // nvmlClocksEventReasonGpuIdle

struct ReasonWord {
  std::uint64_t bit;
  const char* word;
};
constexpr std::array kReasonWords = {ReasonWord{0x2, "applications_clocks"},
                                     ReasonWord{0x4, "sw_power_cap"},
                                     ReasonWord{0x8, "hw_slowdown"},
                                     ReasonWord{0x10, "sync_boost"},
                                     ReasonWord{0x20, "sw_thermal_slowdown"},
                                     ReasonWord{0x40, "hw_thermal_slowdown"},
                                     ReasonWord{0x80, "hw_power_brake_slowdown"},
                                     ReasonWord{0x100, "display_clock"}};

}  // namespace

using NvmlDevice = struct NvmlDeviceTag*;

struct Nvml::Api {
  DynamicLibrary library;

  int (*init)();
  int (*shutdown)();
  const char* (*error_string)(int);
  int (*device_by_bus_id)(const char* id, NvmlDevice*);
  // Those that a library may lack are null.
  int (*clock)(NvmlDevice, unsigned kind, unsigned* mhz) = nullptr;
  int (*power)(NvmlDevice, unsigned* milliwatts) = nullptr;
  int (*power_limit)(NvmlDevice, unsigned* milliwatts) = nullptr;
  int (*temperature)(NvmlDevice, unsigned sensor, unsigned* celsius) = nullptr;
  int (*throttled)(NvmlDevice, unsigned long long* bits) = nullptr;

  explicit Api(const std::filesystem::path& path) : library(DynamicLibrary::open(path)) {
    init = library.function<int()>("nvmlInit_v2");
    shutdown = library.function<int()>("nvmlShutdown");
    error_string = library.function<const char*(int)>("nvmlErrorString");
    device_by_bus_id = library.function<int(const char*, NvmlDevice*)>("nvmlDeviceGetHandleByPciBusId_v2");
    find("nvmlDeviceGetClockInfo", clock);
    find("nvmlDeviceGetPowerUsage", power);
    find("nvmlDeviceGetEnforcedPowerLimit", power_limit);
    find("nvmlDeviceGetTemperature", temperature);
    find("nvmlDeviceGetCurrentClocksThrottleReasons", throttled);
  }

 private:
  template <typename Function>
  void find(const char* symbol, Function*& pointer) {
    pointer = reinterpret_cast<Function*>(library.find(symbol));
  }
};

std::vector<std::string> throttle_reasons(std::uint64_t bits) {
  std::vector<std::string> words;
  bits &= ~kReasonIdle;
  for (int i = 0; i < 64; ++i) {
    const std::uint64_t bit = std::uint64_t{1} << i;
    if ((bits & bit) == 0) continue;
    char text[32];
    std::snprintf(text, sizeof text, "reason_0x%llx", static_cast<unsigned long long>(bit));
    std::string word = text;
    for (const ReasonWord& known : kReasonWords)
      if (known.bit == bit) word = known.word;
    words.push_back(word);
  }
  return words;
}

Nvml::Nvml(const std::filesystem::path& library) : api_(std::make_unique<Api>(library)) {
  if (const int code = api_->init(); code != kNvmlSuccess)
    throw Error("NVML does not start: " + std::string(api_->error_string(code)) + " (" + std::to_string(code) + ")");
}

Nvml::~Nvml() { api_->shutdown(); }

GpuState Nvml::state(const std::string& pci_bus_id) const {
  NvmlDevice device = nullptr;
  GpuState state;
  if (api_->device_by_bus_id(pci_bus_id.c_str(), &device) != kNvmlSuccess) return state;
  const auto value = [device](auto* function, double unit, auto... which) -> std::optional<double> {
    unsigned number = 0;
    if (function == nullptr || function(device, which..., &number) != kNvmlSuccess) return std::nullopt;
    return number * unit;
  };
  state.clock_mhz = value(api_->clock, 1, kSmClock);
  state.power_watts = value(api_->power, 1e-3);
  state.power_limit_watts = value(api_->power_limit, 1e-3);
  state.temperature_celsius = value(api_->temperature, 1, kGpuTemperature);
  unsigned long long bits = 0;
  if (api_->throttled != nullptr && api_->throttled(device, &bits) == kNvmlSuccess)
    state.throttled_by = throttle_reasons(bits);
  return state;
}

}  // namespace flash_attn_jit
