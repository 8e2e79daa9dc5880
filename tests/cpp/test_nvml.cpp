// NVML, played by a library that is made here.
#include <doctest/doctest.h>

#include "runtime/cuda/nvml.h"
#include "runtime/launch/process.h"
#include "runtime/system/subprocess.h"
#include "tests/cpp/containing.h"
#include "tests/cpp/temporary_folder.h"

using namespace flash_attn_jit;
using namespace flash_attn_jit::testing;

namespace {

constexpr const char* kStubNvml = R"(
#include <cstring>
extern "C" {
int nvmlInit_v2() { return INIT; }
int nvmlShutdown() { return 0; }
const char* nvmlErrorString(int) { return "the stub's words"; }
int nvmlDeviceGetHandleByPciBusId_v2(const char* id, void** device) {
  *device = const_cast<char*>(id);
  return std::strcmp(id, "0000:01:00.0") == 0 ? 0 : 6;
}
int nvmlDeviceGetClockInfo(void*, unsigned kind, unsigned* mhz) { *mhz = kind == 1 ? 1350 : 1; return 0; }
int nvmlDeviceGetPowerUsage(void*, unsigned* milliwatts) { *milliwatts = 69500; return 0; }
#ifndef OLD
int nvmlDeviceGetEnforcedPowerLimit(void*, unsigned* milliwatts) { *milliwatts = 70000; return 0; }
int nvmlDeviceGetTemperature(void*, unsigned, unsigned*) { return 3; }
int nvmlDeviceGetCurrentClocksThrottleReasons(void*, unsigned long long* bits) { *bits = 0x25; return 0; }
#endif
}
)";

std::filesystem::path make_stub(const TemporaryFolder& folder, const std::string& name, const std::string& defines) {
  write_all(folder.path() / "nvml.cpp", kStubNvml);
  const std::filesystem::path library = folder.path() / name;
  std::vector<std::string> command = {host_compiler().path.string(),         "-shared", "-fPIC", "-o", library.string(),
                                      (folder.path() / "nvml.cpp").string(), defines};
  if (name.find("old") != std::string::npos) command.push_back("-DOLD");
  const ProgramResult made = run_program(command);
  REQUIRE_MESSAGE(made.succeeded(), made.output);
  return library;
}

}  // namespace

TEST_CASE("nvml: clock, power, limit and reasons, and nothing where a GPU does not tell") {
  const TemporaryFolder folder;
  const Nvml nvml(make_stub(folder, "nvml.so", "-DINIT=0"));
  const GpuState state = nvml.state("0000:01:00.0");
  CHECK(state.clock_mhz == 1350);
  CHECK(state.power_watts == 69.5);
  CHECK(state.power_limit_watts == 70);
  CHECK_FALSE(state.temperature_celsius);
  CHECK(state.throttled_by == std::vector<std::string>{"sw_power_cap", "sw_thermal_slowdown"});
  const GpuState unknown = nvml.state("0000:02:00.0");
  CHECK_FALSE(unknown.clock_mhz);
  CHECK(unknown.throttled_by.empty());
}

TEST_CASE("nvml: an old library tells what it can, a missing or broken one says why") {
  const TemporaryFolder folder;
  const Nvml old(make_stub(folder, "nvml_old.so", "-DINIT=0"));
  CHECK(old.state("0000:01:00.0").clock_mhz == 1350);
  CHECK_FALSE(old.state("0000:01:00.0").power_limit_watts);
  CHECK_THROWS_AS(Nvml("/no/such/libnvidia-ml.so.1"), Error);
  std::string words;
  try {
    const Nvml broken(make_stub(folder, "nvml_broken.so", "-DINIT=9"));
  } catch (const Error& error) {
    words = error.what();
  }
  CHECK(words == Containing{"the stub's words (9)"});
}

TEST_CASE("nvml: reasons in words, idle left out") {
  CHECK(throttle_reasons(0).empty());
  CHECK(throttle_reasons(1).empty());
  CHECK(throttle_reasons(0x8 | 0x40 | 0x80) ==
        std::vector<std::string>{"hw_slowdown", "hw_thermal_slowdown", "hw_power_brake_slowdown"});
  CHECK(throttle_reasons(0x1000) == std::vector<std::string>{"reason_0x1000"});
}
