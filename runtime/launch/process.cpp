#include "runtime/launch/process.h"

#include <filesystem>
#include <memory>
#include <optional>
#include <system_error>
#include <utility>

#include "runtime/cache/kernel_cache.h"
#include "runtime/launch/autotune.h"
#include "runtime/library/templates_folder.h"
#include "runtime/system/dynamic_library.h"
#include "runtime/system/errors.h"
#include "runtime/system/fork.h"

namespace flash_attn_jit {
namespace {

struct ProcessDriver {
  std::unique_ptr<Driver> driver;
  std::string absence;

  ProcessDriver() {
    try {
      driver = std::make_unique<Driver>();
    } catch (const DriverError& error) {
      absence = error.what();
    }
  }
};

const ProcessDriver& the_driver() {
  static const ProcessDriver& driver = *new ProcessDriver;
  return driver;
}

// A program that was called by a bare name has no path to look beside.
std::optional<BundledPack> find_bundled_pack() {
  const std::filesystem::path module = file_of_this_code();
  if (!module.is_absolute()) return std::nullopt;
  const std::filesystem::path pack = module.parent_path() / "bundled_pack.zip";
  std::error_code ignored;
  return std::filesystem::exists(pack, ignored) ? std::optional(BundledPack{pack, module}) : std::nullopt;
}

const std::shared_ptr<KernelCache>& shared_cache() {
  static constinit ProcessOwn<const std::shared_ptr<KernelCache>> cache;
  return cache.get([] {
    KernelCacheSettings settings = cache_settings(config());
    settings.bundled = process_bundled_pack();
    return std::make_shared<KernelCache>(std::move(settings));
  });
}

constinit ProcessOwn<Autotuner> the_autotuner;

}  // namespace

const Config& config() {
  static constinit ProcessOwn<const Config> process_config;
  return process_config.get([] { return read_config(); });
}

Driver* process_driver() { return the_driver().driver.get(); }

const std::string& process_driver_absence() { return the_driver().absence; }

const HostCompiler& host_compiler() {
  static constinit ProcessOwn<const HostCompiler> compiler;
  return compiler.get([] { return find_host_compiler(config().cxx); });
}

const std::optional<BundledPack>& process_bundled_pack() {
  static constinit ProcessOwn<const std::optional<BundledPack>> bundled;
  return bundled.get(find_bundled_pack);
}

KernelLibrary& process_library() {
  static constinit ProcessOwn<KernelLibrary> library;
  return library.get([] {
    const Driver* driver = process_driver();
    return KernelLibrary(config(), shared_cache(), driver ? std::optional(driver->version()) : std::nullopt);
  });
}

HostKernels& process_host_kernels() {
  static constinit ProcessOwn<HostKernels> kernels;
  return kernels.get([] { return HostKernels(shared_cache(), load_templates(config()), host_compiler()); });
}

const TileChooser& process_tile_chooser() { return default_tile_chooser(); }

Tuning& process_tuning() {
  static constinit ProcessOwn<Tuning> tuning;
  return tuning.get([] {
    const TemplateSet templates = load_templates(config());
    return Tuning({config().cache_dir, config().prebuilt, templates, process_tile_chooser()});
  });
}

Autotuner& process_autotuner() {
  return the_autotuner.get([] { return Autotuner(process_tuning()); });
}

Autotuner* process_autotuner_if_on() {
  Autotuner* const autotuner = the_autotuner.get_if_made();
  return autotuner != nullptr && autotuner->is_on() ? autotuner : nullptr;
}

DeviceRuntime& process_devices() {
  static DeviceRuntime& devices = *[] {
    if (process_driver() == nullptr) throw DriverError(process_driver_absence());
    return new DeviceRuntime(
        *process_driver(), process_library(), config().target,
        [](const TunedDevice& device) -> const TileChooser& { return process_tuning().tiles_of(device); });
  }();
  return devices;
}

}  // namespace flash_attn_jit
