// The process's own objects, each made of the others at the first call and never destroyed: threads may still use them
// while the process ends. Nothing below this folder knows of them.
#pragma once

#include <optional>
#include <string>

#include "runtime/cache/pack_files.h"
#include "runtime/compile/host_compiler.h"
#include "runtime/cuda/driver.h"
#include "runtime/launch/loaded_kernels.h"
#include "runtime/library/host_kernels.h"
#include "runtime/library/kernel_library.h"
#include "runtime/system/config.h"
#include "runtime/tuner/tuning.h"

namespace flash_attn_jit {

class Autotuner;

// Read from the environment at the first call and kept. Throws ConfigError.
const Config& config();

// Null where the machine has none; then `process_driver_absence()` says why.
Driver* process_driver();
const std::string& process_driver_absence();

// The C++ compiler, looked for once. Throws ConfigError.
const HostCompiler& host_compiler();

// The pack that was installed with this library, beside the Python module; nothing where there is none.
const std::optional<BundledPack>& process_bundled_pack();

// For GPUs and for the interpreter, in one cache, as config() and the driver at hand say.
KernelLibrary& process_library();
HostKernels& process_host_kernels();

// Chooses tiles where there is no tuning record. In the interpreter always: it plays a T4, but what it runs is to be
// the same on every machine, whatever was tuned there.
const TileChooser& process_tile_chooser();

// Chooses the tiles of launches on GPUs, and keeps what tuning finds.
Tuning& process_tuning();

// Throws DriverError where there is no driver.
DeviceRuntime& process_devices();

Autotuner& process_autotuner();

// The same while it is on, else null: asked at every launch.
Autotuner* process_autotuner_if_on();

}  // namespace flash_attn_jit
