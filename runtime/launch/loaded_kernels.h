// Kernels that a device has loaded, and the devices of a process.
#pragma once

#include <array>
#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "generator/legality.h"
#include "runtime/cuda/driver.h"
#include "runtime/library/kernel_library.h"
#include "runtime/request/kernel_launch.h"
#include "runtime/system/config.h"
#include "runtime/tuner/record.h"

namespace flash_attn_jit {

struct LoadedKernel {
  KernelSpec spec;
  CudaFunction function = nullptr;
  unsigned threads = 0;
  unsigned dynamic_smem = 0;
  const LoadedKernel* next = nullptr;  // of the same bucket
};

// Finds without a lock while others insert; nothing is ever removed.
class LoadedKernelTable {
 public:
  const LoadedKernel* find(const KernelSpec& spec) const noexcept;
  // Not by two threads at once.
  const LoadedKernel& insert(const LoadedKernel& kernel);

 private:
  static constexpr std::size_t kBuckets = 256;
  static std::size_t bucket_of(const KernelSpec& spec) noexcept;

  std::array<std::atomic<const LoadedKernel*>, kBuckets> buckets_{};
  std::vector<std::unique_ptr<const LoadedKernel>> owned_;
};

// What tuning records know a GPU by. Where Turing code stands in for what no NVRTC can make, it is still the GPU's own
// code that was asked for.
TunedDevice tuned_device(const DeviceInfo& info, TargetChoice target);

// Who chooses the tiles of a device's launches; lives as long as the process's devices.
using TilesOfDevice = std::function<const TileChooser&(const TunedDevice&)>;

// One GPU: which code it runs, what it has loaded.
class Device {
 public:
  // Throws UnsupportedError, which names the device, below sm_75.
  Device(Driver& driver, KernelLibrary& library, TargetChoice target, const TilesOfDevice& tiles_of, int ordinal);

  const DeviceInfo& info() const { return info_; }
  TunedDevice tuned_as() const { return tuned_device(info_, target_); }

  // What its launches are planned for. The limits are its own, or those of the Turing code that it runs.
  const PlanTarget& plan_target() const { return plan_target_; }

  // Launches those that have blocks, one after the other; loads, and where needed compiles, at the first time: all of
  // them before anything is launched, and side by side.
  template <class Params, std::size_t kCount>
  void launch(const std::array<KernelLaunch<Params>, kCount>& plans, StreamHandle stream) {
    std::array<const LoadedKernel*, kCount> kernels{};
    bool all_loaded = true;
    for (std::size_t i = 0; i < kCount; ++i) {
      if (plans[i].blocks == 0) continue;
      kernels[i] = table_.find(plans[i].spec);
      all_loaded = all_loaded && kernels[i] != nullptr;
    }
    if (!all_loaded) {
      std::vector<KernelSpec> missing;
      for (std::size_t i = 0; i < kCount; ++i)
        if (plans[i].blocks > 0 && kernels[i] == nullptr) missing.push_back(plans[i].spec);
      load(missing);
    }
    for (std::size_t i = 0; i < kCount; ++i) {
      if (plans[i].blocks == 0) continue;
      const LoadedKernel* kernel = kernels[i] != nullptr ? kernels[i] : table_.find(plans[i].spec);
      launch(*kernel, plans[i].blocks, &plans[i].params, stream);
    }
  }

  // The kernel that launch() would load, with its resources.
  FoundKernel find_or_compile(const KernelSpec& spec);

 private:
  void launch(const LoadedKernel& kernel, std::int64_t blocks, const void* params, StreamHandle stream);
  void load(const std::vector<KernelSpec>& specs);
  void load(const KernelSpec& spec, const CompiledKernel& kernel);
  void require_legal(const KernelSpec& spec, const ArchLimits& arch) const;
  void warn_of_turing_code() const;
  FoundKernel link(const LinkRequest& request);
  CompiledKernel machine_code_of(CompiledKernel ptx);

  Driver& driver_;
  KernelLibrary& library_;
  TargetChoice target_;
  DeviceInfo info_;
  PlanTarget plan_target_;
  CudaContext context_;
  LoadedKernelTable table_;
  std::mutex load_mutex_;  // held while a module loads, not while it is compiled
};

// The GPUs of a process, each set up when first used.
class DeviceRuntime {
 public:
  DeviceRuntime(Driver& driver, KernelLibrary& library, TargetChoice target, TilesOfDevice tiles_of);
  // The same chooser for all devices.
  DeviceRuntime(Driver& driver, KernelLibrary& library, TargetChoice target, const TileChooser& tiles);

  // Throws DriverError where there is no such device.
  Device& device(int ordinal);

 private:
  struct Slot {
    std::atomic<Device*> ready = nullptr;
    std::unique_ptr<Device> device;
  };
  Device& set_up(int ordinal);

  Driver& driver_;
  KernelLibrary& library_;
  TargetChoice target_;
  TilesOfDevice tiles_of_;
  std::vector<Slot> slots_;
  std::mutex mutex_;
};

}  // namespace flash_attn_jit
