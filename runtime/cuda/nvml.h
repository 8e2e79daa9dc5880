// NVML, the library that knows a GPU's clock, power and temperature, opened at run time where it is there.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace flash_attn_jit {

// Each is nothing where the GPU does not tell.
struct GpuState {
  std::optional<double> clock_mhz, power_watts, power_limit_watts, temperature_celsius;
  std::vector<std::string> throttled_by;  // "sw_power_cap", "hw_slowdown", ...; not "gpu_idle"
};

// NVML's bits in words, in the order of the bits; one that is not known is "reason_0x200".
std::vector<std::string> throttle_reasons(std::uint64_t bits);

class Nvml {
 public:
  // Throws Error, which says why, where NVML is not there or does not work.
  explicit Nvml(const std::filesystem::path& library = "libnvidia-ml.so.1");
  ~Nvml();
  Nvml(const Nvml&) = delete;
  Nvml& operator=(const Nvml&) = delete;

  // The GPU that CUDA knows by this PCI bus id. Nothing is known of one that NVML does not have.
  GpuState state(const std::string& pci_bus_id) const;

 private:
  struct Api;
  std::unique_ptr<Api> api_;
};

}  // namespace flash_attn_jit
