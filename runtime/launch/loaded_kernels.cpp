#include "runtime/launch/loaded_kernels.h"

#include <algorithm>
#include <chrono>

#include "runtime/cuda/nvrtc_choice.h"
#include "runtime/system/errors.h"
#include "runtime/system/log.h"
#include "runtime/system/side_by_side.h"

namespace flash_attn_jit {
namespace {

// cuda.h: the function belongs to another context than the current one, or there is none.
constexpr int kErrorInvalidContext = 201;
constexpr int kErrorInvalidHandle = 400;

std::string device_text(const DeviceInfo& info) {
  return "CUDA device " + std::to_string(info.ordinal) + " (" + info.name + ", sm_" + std::to_string(info.sm) + ")";
}

ArchLimits limits_of(const DeviceInfo& info, TargetChoice target) {
  if (info.sm < kOldestSm) throw UnsupportedError({device_text(info), "is not supported", kAcceptedGpu});
  return arch_limits(target == TargetChoice::kCompute75 ? kOldestSm : info.sm);
}

}  // namespace

std::size_t LoadedKernelTable::bucket_of(const KernelSpec& spec) noexcept {
  std::size_t hash = 0;
  // What differs between the kernels of one process; tiles that share these numbers share a bucket.
  for (const int field :
       {spec.head_dim, spec.head_dim_v, spec.group_size, spec.tile.block_m, spec.tile.block_n, spec.tile.warps,
        static_cast<int>(spec.kind), static_cast<int>(spec.dtype), static_cast<int>(spec.mask),
        static_cast<int>(spec.features.bits()), static_cast<int>(spec.access)})
    hash = hash * 31 + static_cast<std::size_t>(field);
  hash = hash * 31 + static_cast<std::size_t>(spec.functions);
  return hash % kBuckets;
}

const LoadedKernel* LoadedKernelTable::find(const KernelSpec& spec) const noexcept {
  const LoadedKernel* kernel = buckets_[bucket_of(spec)].load(std::memory_order_acquire);
  while (kernel != nullptr && kernel->spec != spec) kernel = kernel->next;
  return kernel;
}

const LoadedKernel& LoadedKernelTable::insert(const LoadedKernel& kernel) {
  auto owned = std::make_unique<LoadedKernel>(kernel);
  std::atomic<const LoadedKernel*>& bucket = buckets_[bucket_of(kernel.spec)];
  owned->next = bucket.load(std::memory_order_relaxed);
  bucket.store(owned.get(), std::memory_order_release);
  return *owned_.emplace_back(std::move(owned));
}

std::vector<std::string> LoadedKernelTable::texts() const {
  std::vector<std::string> texts;
  for (const std::atomic<const LoadedKernel*>& bucket : buckets_)
    for (const LoadedKernel* kernel = bucket.load(std::memory_order_acquire); kernel != nullptr; kernel = kernel->next)
      texts.push_back(kernel->spec.text());
  std::sort(texts.begin(), texts.end());
  return texts;
}

TunedDevice tuned_device(const DeviceInfo& info, TargetChoice target) {
  return {info.name, info.sm, info.multiprocessors,
          std::string(target == TargetChoice::kCompute75 ? kTuringCode : kNativeCode)};
}

Device::Device(Driver& driver, KernelLibrary& library, TargetChoice target, const TilesOfDevice& tiles_of, int ordinal)
    : driver_(driver),
      library_(library),
      target_(target),
      info_(driver.device_info(ordinal)),
      plan_target_{limits_of(info_, target), info_.multiprocessors, tiles_of(tuned_device(info_, target))},
      context_(driver.primary_context(ordinal)) {}

void Device::launch(const LoadedKernel& kernel, std::int64_t blocks, const void* params, StreamHandle stream) {
  const LaunchShape shape{static_cast<unsigned>(blocks), kernel.threads, kernel.dynamic_smem};
  int code = driver_.launch(kernel.function, shape, stream, params);
  // Asked for only where it is needed: the caller's framework has made the device current nearly always.
  if (code == kErrorInvalidContext || code == kErrorInvalidHandle) {
    const Driver::CurrentContext current(driver_, context_);
    code = driver_.launch(kernel.function, shape, stream, params);
  }
  if (code != 0) driver_.require(code, "the launch of kernel '" + kernel.spec.text() + "' on " + device_text(info_));
}

void Device::load(const std::vector<KernelSpec>& specs) {
  std::vector<std::optional<FoundKernel>> found(specs.size());
  run_side_by_side(specs.size(), [&](std::size_t i) { found[i] = find_or_compile(specs[i]); });
  for (std::size_t i = 0; i < specs.size(); ++i) load(specs[i], found[i]->kernel);
}

void Device::load(const KernelSpec& spec, const CompiledKernel& kernel) {
  const std::lock_guard lock(load_mutex_);
  if (table_.find(spec) != nullptr) return;
  const Driver::CurrentContext current(driver_, context_);
  const Driver::CaptureTolerance tolerance(driver_);
  try {
    Driver::Module module(driver_, kernel.image);
    const CudaFunction function = module.find_function(kernel.entry);
    if (kernel.dynamic_smem > kSmemWithoutOptIn) driver_.allow_dynamic_smem(function, kernel.dynamic_smem);
    // Modules load lazily; asking for attributes makes the driver load the function now, and not in a
    // capture.
    driver_.attributes(function);
    table_.insert({.spec = spec,
                   .function = function,
                   .threads = static_cast<unsigned>(kernel.threads),
                   .dynamic_smem = static_cast<unsigned>(kernel.dynamic_smem)});
    module.keep();
  } catch (const DriverError& error) {
    throw DriverError("kernel '" + spec.text() + "' (" + kernel.built_by + ") could not be loaded on " +
                      device_text(info_) + ", CUDA " + driver_version_text(driver_.version()) + ": " + error.what());
  }
}

FoundKernel Device::find_or_compile(const KernelSpec& spec) {
  require_legal(spec, plan_target_.arch);
  return find_or_compile(library_.request(spec));
}

FoundKernel Device::find_or_compile_tensor_peak() { return find_or_compile(library_.tensor_peak_request()); }

FoundKernel Device::find_or_compile(const KernelRequest& kernel) {
  if (target_ == TargetChoice::kCompute75) {
    const LinkRequest linked = library_.request(kernel, LinkTarget{kOldestSm, info_.sm, "asked for"});
    if (auto found = library_.find(linked)) return *std::move(found);
    return link(linked);
  }
  const CompileRequest native = library_.request(kernel, CompileTarget{info_.sm, CodeKind::kCubin});
  if (auto found = library_.find(native)) return *std::move(found);
  // Looked for before the compiler is asked what it knows, so that a hit opens none.
  const LinkRequest fallback = library_.request(kernel, LinkTarget{kOldestSm, info_.sm, "compiler too old", true});
  if (auto found = library_.find(fallback)) {
    warn_of_turing_code();
    return *std::move(found);
  }
  if (!library_.compiler_lacks(info_.sm)) return library_.make(native);
  if (kernel.label.empty()) require_legal(kernel.spec, arch_limits(kOldestSm));
  warn_of_turing_code();
  return link(fallback);
}

std::vector<std::string> Device::loaded() const { return table_.texts(); }

bool Device::is_capturing(StreamHandle stream) const {
  const Driver::CurrentContext current(driver_, context_);
  return driver_.is_capturing(stream);
}

void Device::wait_for(StreamHandle stream) {
  const Driver::CurrentContext current(driver_, context_);
  const Driver::CaptureTolerance tolerance(driver_);
  driver_.synchronize(stream);
}

void Device::require_legal(const KernelSpec& spec, const ArchLimits& arch) const {
  if (const auto reason = check(spec, arch)) throw UnsupportedError(device_text(info_) + ": " + *reason);
}

void Device::warn_of_turing_code() const {
  warn_once(device_text(info_) +
            " is newer than the NVRTC that was found: it runs the Turing code (compute_75), translated by the driver. "
            "An NVRTC that knows the device is taken as soon as it is installed");
}

FoundKernel Device::link(const LinkRequest& request) {
  return library_.make(request, [this](CompiledKernel ptx) { return machine_code_of(std::move(ptx)); });
}

CompiledKernel Device::machine_code_of(CompiledKernel ptx) {
  const Driver::CurrentContext current(driver_, context_);
  const Driver::CaptureTolerance tolerance(driver_);
  const auto start = std::chrono::steady_clock::now();
  CompiledKernel kernel = std::move(ptx);
  kernel.image = driver_.link_ptx(kernel.image, kernel.entry);
  kernel.built_by += ", linked by driver " + driver_version_text(driver_.version());
  kernel.min_driver = driver_.version();
  const Driver::Module module(driver_, kernel.image);
  const FunctionAttributes attributes = driver_.attributes(module.find_function(kernel.entry));
  kernel.resources = {attributes.registers, attributes.static_smem, std::nullopt, std::nullopt};
  kernel.seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return kernel;
}

DeviceRuntime::DeviceRuntime(Driver& driver, KernelLibrary& library, TargetChoice target, TilesOfDevice tiles_of)
    : driver_(driver),
      library_(library),
      target_(target),
      tiles_of_(std::move(tiles_of)),
      slots_(static_cast<std::size_t>(driver.device_count())) {}

DeviceRuntime::DeviceRuntime(Driver& driver, KernelLibrary& library, TargetChoice target, const TileChooser& tiles)
    : DeviceRuntime(driver, library, target, [&tiles](const TunedDevice&) -> const TileChooser& { return tiles; }) {}

Device& DeviceRuntime::device(int ordinal) {
  if (ordinal >= 0 && static_cast<std::size_t>(ordinal) < slots_.size())
    if (Device* ready = slots_[static_cast<std::size_t>(ordinal)].ready.load(std::memory_order_acquire)) return *ready;
  return set_up(ordinal);
}

Device& DeviceRuntime::set_up(int ordinal) {
  const std::lock_guard lock(mutex_);
  auto device = std::make_unique<Device>(driver_, library_, target_, tiles_of_, ordinal);
  Slot& slot = slots_.at(static_cast<std::size_t>(ordinal));
  if (slot.device == nullptr) slot.device = std::move(device);
  slot.ready.store(slot.device.get(), std::memory_order_release);
  return *slot.device;
}

}  // namespace flash_attn_jit
