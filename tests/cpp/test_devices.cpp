// Devices, loaded kernels and launches, on a libcuda that plays drivers and GPUs.
#include <doctest/doctest.h>

#ifdef FLASH_ATTN_JIT_STUB_LIBCUDA

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstring>
#include <set>
#include <thread>

#include "generator/kernel_selection.h"
#include "runtime/cache/cache_folder.h"
#include "runtime/launch/backward_launch.h"
#include "runtime/launch/forward_launch.h"
#include "runtime/launch/loaded_kernels.h"
#include "runtime/library/pack.h"
#include "runtime/system/errors.h"
#include "tests/cpp/captured_log.h"
#include "tests/cpp/containing.h"
#include "tests/cpp/counted_allocations.h"
#include "tests/cpp/stub_libcuda/stub_control.h"
#include "tests/cpp/stub_nvrtc.h"
#include "tests/cpp/tiny_templates.h"

using namespace flash_attn_jit;
using namespace flash_attn_jit::testing;
namespace fs = std::filesystem;

namespace {

constexpr const char* kStub = FLASH_ATTN_JIT_STUB_LIBCUDA;
const StubDevice kT4{"Tesla T4", 75, 40}, kA100{"NVIDIA A100", 80, 108};
constexpr int kInvalidImage = 200;  // cuda.h

StubControl& stub() {
  static const DynamicLibrary library = DynamicLibrary::open(kStub);
  return *library.function<StubControl*()>("stub_control")();
}

// A request whose tensors are never read.
ForwardRequest request(std::int64_t head_dim = 64, std::int64_t seqlen = 300) {
  const auto view = [&](std::uintptr_t at) {
    return TensorView{
        reinterpret_cast<void*>(at), {2, seqlen, 4, head_dim}, {seqlen * 4 * head_dim, 4 * head_dim, head_dim, 1}};
  };
  ForwardRequest r;
  r.q = view(0x1000);
  r.k = view(0x2000);
  r.v = view(0x3000);
  r.out = view(0x4000);
  r.softmax_lse = reinterpret_cast<float*>(0x5000);
  r.options.softmax_scale = 0.125f;
  return r;
}

BackwardRequest backward_request() {
  const ForwardRequest f = request(64, 200);  // more keys than a block has: three kernels
  BackwardRequest r;
  r.q = f.q;
  r.k = f.k;
  r.v = f.v;
  r.out = r.dout = f.out;
  r.dq = f.q;
  r.dkdv = KeyGradients{f.k, f.v};
  r.softmax_lse = f.softmax_lse;
  r.delta = f.softmax_lse;
  r.options = f.options;
  return r;
}

StreamHandle stream(std::uintptr_t number) { return reinterpret_cast<StreamHandle>(number); }

// A process with a driver, its devices and an empty cache.
struct Process {
  TinySetting setting;
  Driver driver;
  KernelLibrary library;
  DeviceRuntime runtime;

  Process(int driver_version, const std::vector<StubDevice>& devices, TargetChoice target = TargetChoice::kNative)
      : driver(started(driver_version, devices)),
        library(setting.settings(driver_version)),
        runtime(driver, library, target, default_tile_chooser()) {}

  static std::filesystem::path started(int driver_version, const std::vector<StubDevice>& devices) {
    stub().reset(driver_version, devices);
    return kStub;
  }
};

template <typename Expected>
std::string refusal(const std::function<void()>& work) {
  try {
    work();
  } catch (const Expected& error) {
    return error.what();
  }
  return "";
}

}  // namespace

TEST_CASE("driver: what it is and what it has") {
  stub().reset(12040, {kT4, kA100});
  Driver driver(kStub);
  CHECK(driver.version() == 12040);
  CHECK(driver.path() == kStub);
  CHECK(stub().calls("cuInit") == 0);
  CHECK(driver.device_count() == 2);
  CHECK(driver.device_info(0).name == "Tesla T4");
  CHECK(driver.device_info(1).sm == 80);
  CHECK(driver.device_info(1).multiprocessors == 108);
  CHECK(refusal<DriverError>([&] { driver.device_info(2); }) == Containing{"no CUDA device 2; the driver sees 2"});
}

TEST_CASE("driver: none, and one without devices") {
  CHECK(refusal<DriverError>([] { Driver("libthere_is_none.so.1"); }) == Containing{"libthere_is_none.so.1"});
  stub().reset(13000, {});
  Driver driver(kStub);
  CHECK(driver.device_count() == 0);
  CHECK(driver.version() == 13000);
}

TEST_CASE("driver: an error has the call, the driver's name for it, its number and its words") {
  stub().reset(12040, {kT4});
  Driver driver(kStub);
  stub().fail("cuInit", kInvalidImage);
  CHECK(refusal<DriverError>([&] { driver.device_count(); }) ==
        Containing{"cuInit: CUDA_ERROR_INVALID_IMAGE (200): the stub's own words"});
}

TEST_CASE("a launch: arguments as planned, on the caller's stream" * doctest::skip(!have_nvrtc())) {
  Process process(12040, {kT4});
  stub().make_current(0);
  const ForwardRequest r = request();
  launch_forward(process.runtime.device(0), r, stream(77));
  const auto launches = stub().launches();
  REQUIRE(launches.size() == 1);
  const LaunchPlan plan = plan_forward(r, {arch_limits(75), kT4.multiprocessors, default_tile_chooser()});
  CHECK(launches[0].device == 0);
  CHECK(launches[0].function == plan.spec.name());
  CHECK(launches[0].blocks == plan.blocks);
  CHECK(launches[0].threads == static_cast<unsigned>(plan.spec.tile.threads()));
  CHECK(launches[0].stream == stream(77));
  // Up to the last member: there may be padding behind it.
  const auto bytes =
      reinterpret_cast<const char*>(&plan.params.num_m_blocks + 1) - reinterpret_cast<const char*>(&plan.params);
  CHECK(std::memcmp(&launches[0].params, &plan.params, static_cast<std::size_t>(bytes)) == 0);
  const int smem = render(plan.spec, embedded_templates()).dynamic_smem;
  CHECK(launches[0].dynamic_smem == static_cast<unsigned>(smem));
  CHECK(stub().allowed_smem(0, plan.spec.name()) == (smem > 48 * 1024 ? smem : 0));
}

TEST_CASE("a kernel beyond 48 KiB of shared memory is allowed it" * doctest::skip(!have_nvrtc())) {
  Process process(12040, {kT4});
  KernelSpec spec;
  spec.head_dim = 128;
  ForwardRequest r = request(128);
  for (const TileConfig& tile : tile_space(spec, arch_limits(75))) {
    spec.tile = tile;
    if (render(spec, embedded_templates()).dynamic_smem > 48 * 1024) r.tile = tile;
  }
  REQUIRE(r.tile);
  launch_forward(process.runtime.device(0), r, nullptr);
  REQUIRE(stub().launches().size() == 1);
  const StubLaunch launch = stub().launches()[0];
  REQUIRE(launch.dynamic_smem > 48 * 1024);
  CHECK(stub().allowed_smem(0, launch.function) == static_cast<int>(launch.dynamic_smem));
}

TEST_CASE("nothing to do launches nothing and compiles nothing") {
  Process process(12040, {kT4});
  ForwardRequest r = request(64, 0);
  launch_forward(process.runtime.device(0), r, nullptr);
  CHECK(stub().launches().empty());
  CHECK(process.library.nvrtc_opened() == 0);
}

TEST_CASE("the hot path calls the driver once" * doctest::skip(!have_nvrtc())) {
  Process process(12040, {kT4});
  stub().make_current(0);
  launch_forward(process.runtime.device(0), request(), nullptr);
  const int before = stub().calls("");
  for (int i = 0; i < 10; ++i) launch_forward(process.runtime.device(0), request(), nullptr);
  CHECK(stub().calls("") - before == 10);
  CHECK(stub().calls("cuModuleLoadData") == 1);
  CHECK(stub().launches().size() == 11);
}

TEST_CASE("the hot path takes less than 3 microseconds" * doctest::skip(!have_nvrtc())) {
  Process process(12040, {kT4});
  stub().make_current(0);
  const ForwardRequest r = request(128, 4096);
  launch_forward(process.runtime.device(0), r, nullptr);
  stub().record_launches(false);
  using Clock = std::chrono::steady_clock;
  double best = 1e9;  // of several rounds: this machine may have other work
  for (int round = 0; round < 20; ++round) {
    constexpr int kCalls = 2000;
    const auto start = Clock::now();
    for (int i = 0; i < kCalls; ++i) launch_forward(process.runtime.device(0), r, nullptr);
    best = std::min(best, std::chrono::duration<double, std::micro>(Clock::now() - start).count() / kCalls);
  }
  MESSAGE("hot path: " << best << " us");
  // Sanitizers and debug builds are several times slower.
#if defined(NDEBUG) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
  CHECK(best < 3.0);
#endif
}

TEST_CASE("the machine code suits the driver: NVRTC 12 below CUDA 13" * doctest::skip(!have_nvrtc())) {
  for (const auto& [driver_version, compiler] : {std::pair{12040, "nvrtc 12."}, {13000, "nvrtc 13."}}) {
    Process process(driver_version, {kT4});
    launch_forward(process.runtime.device(0), request(), nullptr);
    CHECK(stub().launches().size() == 1);
    const LaunchPlan plan = plan_forward(request(), {arch_limits(75), kT4.multiprocessors, default_tile_chooser()});
    const FoundKernel found = process.runtime.device(0).find_or_compile(plan.spec);
    CHECK(found.kernel.built_by == Containing{compiler});
    CHECK(found.origin == KernelOrigin::kDiskCache);
  }
}

TEST_CASE("two devices: each loads its own" * doctest::skip(!have_nvrtc())) {
  Process process(13000, {kT4, kA100});
  for (int round = 0; round < 2; ++round)
    for (const int device : {0, 1}) {
      stub().make_current(device);
      launch_forward(process.runtime.device(device), request(), nullptr);
    }
  const auto launches = stub().launches();
  REQUIRE(launches.size() == 4);
  for (int i = 0; i < 4; ++i) CHECK(launches[static_cast<std::size_t>(i)].device == i % 2);
  CHECK(stub().calls("cuModuleLoadData") == 2);
  CHECK(list_cache(process.setting.config.cache_dir).size() == 2);
}

TEST_CASE("two devices of one kind: one compile, two loads" * doctest::skip(!have_nvrtc())) {
  Process process(12040, {kT4, kT4});
  for (const int device : {0, 1}) launch_forward(process.runtime.device(device), request(), nullptr);
  CHECK(stub().calls("cuModuleLoadData") == 2);
  CHECK(list_cache(process.setting.config.cache_dir).size() == 1);
  CHECK(stub().launches()[1].device == 1);
}

TEST_CASE("another device is current, or none, and stays so" * doctest::skip(!have_nvrtc())) {
  Process process(13000, {kT4, kA100});
  stub().make_current(1);
  for (int i = 0; i < 2; ++i) launch_forward(process.runtime.device(0), request(), nullptr);
  CHECK(stub().current() == 1);
  std::thread([&] {
    launch_forward(process.runtime.device(0), request(), nullptr);
    CHECK(stub().current() == -1);
  }).join();
  const auto launches = stub().launches();
  REQUIRE(launches.size() == 3);
  for (const StubLaunch& launch : launches) CHECK(launch.device == 0);
}

TEST_CASE("threads that make the same first call compile and load once" * doctest::skip(!have_nvrtc())) {
  Process process(12040, {kT4});
  std::vector<std::thread> threads;
  for (int i = 0; i < 8; ++i)
    threads.emplace_back([&] { launch_forward(process.runtime.device(0), request(), nullptr); });
  for (std::thread& thread : threads) thread.join();
  CHECK(stub().launches().size() == 8);
  CHECK(stub().calls("cuModuleLoadData") == 1);
  CHECK(list_cache(process.setting.config.cache_dir).size() == 1);
}

TEST_CASE("a load that fails is an error that names the kernel and the device, and the next may succeed" *
          doctest::skip(!have_nvrtc())) {
  Process process(12040, {kT4});
  stub().fail("cuModuleLoadData", kInvalidImage);
  const std::string message =
      refusal<DriverError>([&] { launch_forward(process.runtime.device(0), request(), nullptr); });
  for (const char* part :
       {"fwd hdim64", "nvrtc 12.", "Tesla T4", "CUDA 12.4", "cuModuleLoadData", "CUDA_ERROR_INVALID_IMAGE"})
    CHECK(message == Containing{part});
  CHECK(stub().launches().empty());
  CHECK(stub().current() == -1);
  launch_forward(process.runtime.device(0), request(), nullptr);
  CHECK(stub().launches().size() == 1);
}

TEST_CASE("a launch that fails is an error that names the kernel and the device" * doctest::skip(!have_nvrtc())) {
  Process process(12040, {kT4});
  stub().make_current(0);
  launch_forward(process.runtime.device(0), request(), nullptr);
  stub().fail("cuLaunchKernel", 719);
  const std::string message =
      refusal<DriverError>([&] { launch_forward(process.runtime.device(0), request(), nullptr); });
  for (const char* part : {"launch", "fwd hdim64", "Tesla T4", "719"}) CHECK(message == Containing{part});
}

TEST_CASE("compute_75: PTX that the driver links, and the linked code is what is cached" *
          doctest::skip(!have_nvrtc())) {
  for (const int driver_version : {12090, 99000}) {
    Process process(driver_version, {kA100}, TargetChoice::kCompute75);
    launch_forward(process.runtime.device(0), request(), nullptr);
    CHECK(stub().launches().size() == 1);
    CHECK(stub().calls("cuLinkComplete") == 1);
    const auto entries = list_cache(process.setting.config.cache_dir);
    REQUIRE(entries.size() == 1);
    REQUIRE(entries[0].file);
    CHECK(entries[0].file->id.target == "compute_75 linked for sm_80");
    CHECK(entries[0].file->kernel.resources.registers == 42);
    CHECK_FALSE(entries[0].file->kernel.resources.spill_stores.has_value());

    KernelLibrary next(process.setting.settings(driver_version));
    DeviceRuntime next_process(process.driver, next, TargetChoice::kCompute75, default_tile_chooser());
    launch_forward(next_process.device(0), request(), nullptr);
    CHECK(stub().calls("cuLinkComplete") == 1);
    CHECK(next.nvrtc_opened() == 0);

    KernelLibrary newer(process.setting.settings(driver_version + 10));
    DeviceRuntime newer_driver(process.driver, newer, TargetChoice::kCompute75, default_tile_chooser());
    launch_forward(newer_driver.device(0), request(), nullptr);
    CHECK(stub().calls("cuLinkComplete") == 2);
  }
}

TEST_CASE("compute_75: the specs are those of a T4" * doctest::skip(!have_nvrtc())) {
  Process process(12090, {kA100}, TargetChoice::kCompute75);
  CHECK(process.runtime.device(0).plan_target().arch.sm == 75);
  CHECK(process.runtime.device(0).plan_target().arch.max_shared_bytes_per_block == 65536);
}

TEST_CASE("a device newer than the NVRTC runs the Turing code, said once; a hit opens no NVRTC" *
          doctest::skip(!have_nvrtc())) {
  const StubDevice future{"A GPU of the future", 199, 200};
  Process process(99000, {future});
  const CapturedLog log;
  launch_forward(process.runtime.device(0), request(), nullptr);
  launch_forward(process.runtime.device(0), request(128), nullptr);
  CHECK(stub().launches().size() == 2);
  REQUIRE(log.warnings().size() == 1);
  CHECK(log.warnings()[0] == Containing{"A GPU of the future"});
  CHECK(log.warnings()[0] == Containing{"compute_75"});

  KernelLibrary next(process.setting.settings(99000));
  DeviceRuntime next_process(process.driver, next, TargetChoice::kNative, default_tile_chooser());
  launch_forward(next_process.device(0), request(), nullptr);
  CHECK(stub().calls("cuLinkComplete") == 2);
  CHECK(next.nvrtc_opened() == 0);
}

TEST_CASE("Turing code stands in for what no NVRTC can make until a newer one is there; said in every process") {
  const StubDevice future{"A stand-in's GPU", 199, 200}, same{"The same GPU in the next process", 199, 200};
  Process process(99000, {future});
  Config& config = process.setting.config;
  set_python_search_path({});
  const TemporaryFolder folder;
  make_stub_nvrtc(folder / "98.0", {.minor = "0"});
  config.library_path = {folder / "98.0"};
  // A process of its own with the cache as it is: how many NVRTCs it opened.
  const auto run = [&](const StubDevice& device) {
    KernelLibrary library(process.setting.settings(99000));
    stub().reset(99000, {device});
    Driver driver(kStub);
    DeviceRuntime devices(driver, library, TargetChoice::kNative, default_tile_chooser());
    launch_forward(devices.device(0), request(), nullptr);
    CHECK(stub().launches().size() == 1);
    return library.nvrtc_opened();
  };
  const auto linked = [&] { return stub().calls("cuLinkComplete") == 1; };
  const auto targets = [&] {
    std::set<std::string> found;
    for (const CacheEntry& entry : list_cache(config.cache_dir)) found.insert(entry.file->id.target);
    return found;
  };

  CHECK(run(future) == 1);
  CHECK(linked());
  {
    const CapturedLog log;
    CHECK(run(same) == 0);
    CHECK_FALSE(linked());
    REQUIRE(log.warnings().size() == 1);
    CHECK(log.warnings()[0] == Containing{same.name});
    CHECK(log.warnings()[0] == Containing{"compute_75"});
  }
  make_stub_nvrtc(folder / "98.1", {.minor = "1"});  // newer, and does not know the GPU either
  config.library_path = {folder / "98.0", folder / "98.1"};
  CHECK(run(future) == 1);
  CHECK(linked());
  CHECK(run(future) == 0);
  CHECK_FALSE(linked());
  config.library_path = {};  // no NVRTC, or only an older one: what is there serves
  CHECK(run(future) == 0);
  CHECK_FALSE(linked());
  CHECK(targets() == std::set<std::string>{"compute_75 linked for sm_199"});

  make_stub_nvrtc(folder / "98.2", {.minor = "2", .architectures = "75,199"});
  config.library_path = {folder / "98.0", folder / "98.1", folder / "98.2"};
  CHECK(run(future) == 1);
  CHECK_FALSE(linked());
  CHECK(targets() == std::set<std::string>{"compute_75 linked for sm_199", "sm_199"});
  const CapturedLog log;
  CHECK(run({"The same GPU, with its own code", 199, 200}) == 0);
  CHECK(log.warnings().empty());
}

TEST_CASE("a cold kernel is rendered once, and hashed and looked for once by each key") {
  struct Case {
    std::string what;
    StubDevice device;
    TargetChoice target;
    int keys;      // of a cold launch
    int hit_keys;  // of the next process's
    const char* stored_for;
  };
  for (const Case& c :
       {Case{"its own code, once there is no Turing code either", kT4, TargetChoice::kNative, 2, 1, "sm_75"},
        Case{"the Turing code in its place, of PTX",
             {"A GPU to come", 199, 200},
             TargetChoice::kNative,
             3,
             2,
             "compute_75 linked for sm_199"},
        Case{"the Turing code as asked for, of PTX", kA100, TargetChoice::kCompute75, 2, 1,
             "compute_75 linked for sm_80"}}) {
    CAPTURE(c.what);
    TinySetting setting;
    setting.config.nvrtc = make_stub_nvrtc(setting.folder / "nvrtc", {.major = "12"});
    setting.config.prebuilt = setting.folder / "pack";
    fs::create_directories(*setting.config.prebuilt);
    for (const bool is_cold : {true, false}) {
      CAPTURE(is_cold);
      const CapturedLog log;
      stub().reset(12090, {c.device});
      Driver driver(kStub);
      KernelLibrary library(setting.settings(12090));
      DeviceRuntime devices(driver, library, c.target, default_tile_chooser());
      for (int i = 0; i < 2; ++i) launch_forward(devices.device(0), request(), nullptr);
      CHECK(stub().launches().size() == 2);
      CHECK(library.nvrtc_opened() == (is_cold ? 1 : 0));
      CHECK(library.rendered() == 1);
      CHECK(library.hashed() == (is_cold ? c.keys : c.hit_keys));
      CHECK(library.cache().lookups() == library.hashed());
    }
    const auto entries = list_cache(setting.config.cache_dir);
    REQUIRE(entries.size() == 1);
    CHECK(entries[0].file->id.target == c.stored_for);
  }
}

TEST_CASE("a hot launch allocates nothing, forward and backward" *
          doctest::skip(!have_nvrtc() || !testing::kCountsAllocations)) {
  TinySetting setting;
  setting.config.templates.reset();
  stub().reset(12040, {kT4});
  Driver driver(kStub);
  KernelLibrary library(setting.settings(12040));
  DeviceRuntime devices(driver, library, TargetChoice::kNative, default_tile_chooser());
  stub().make_current(0);
  stub().record_launches(false);
  const ForwardRequest forward = request();
  const BackwardRequest backward = backward_request();
  const auto launch_both = [&] {
    launch_forward(devices.device(0), forward, nullptr);
    launch_backward(devices.device(0), backward, nullptr);
  };
  const std::size_t at_first = testing::allocations_of_this_thread();
  launch_both();
  const std::size_t when_loaded = testing::allocations_of_this_thread();
  CHECK(when_loaded > at_first);
  for (int i = 0; i < 10; ++i) launch_both();
  CHECK(testing::allocations_of_this_thread() == when_loaded);
}

TEST_CASE("backward's kernels are compiled side by side, and none is launched where one cannot be") {
  TinySetting setting;
  setting.config.templates.reset();
  KernelLibrary::Settings settings = setting.settings(12040);
  const auto backward = [&](const fs::path& nvrtc) {
    stub().reset(12040, {kT4});
    settings.config.nvrtc = nvrtc;
    Driver driver(kStub);
    KernelLibrary library(settings);
    DeviceRuntime devices(driver, library, TargetChoice::kNative, default_tile_chooser());
    launch_backward(devices.device(0), backward_request(), nullptr);
  };
  const TemporaryFolder folder;
  const StubNvrtc stub_nvrtc{.major = "12", .meet = 3};
  const fs::path refuses = make_stub_nvrtc(folder / "a", stub_nvrtc, "bwd_dq");
  CHECK(refusal<CompileError>([&] { backward(refuses); }) == Containing{"bwd_dq hdim64"});
  CHECK(most_at_once(refuses) == 3);
  CHECK(stub().launches().empty());
  CHECK(stub().calls("cuModuleLoadData") == 0);

  settings.cache.dir = setting.folder / "another cache";
  const fs::path accepts = make_stub_nvrtc(folder / "b", stub_nvrtc);
  backward(accepts);
  CHECK(most_at_once(accepts) == 3);
  const auto launches = stub().launches();
  REQUIRE(launches.size() == 3);
  for (const auto& [i, kind] : {std::pair{0, "bwd_preprocess"}, {1, "bwd_dkdv"}, {2, "bwd_dq"}})
    CHECK(launches[static_cast<std::size_t>(i)].function == Containing{kind});
}

TEST_CASE("a module whose kernel cannot be had is unloaded") {
  TinySetting setting;
  setting.config.nvrtc = make_stub_nvrtc(setting.folder / "nvrtc", {.major = "12"});
  KernelSpec large = tiny_spec(128);
  for (const TileConfig& tile : tile_space(large, arch_limits(75))) {
    large.tile = tile;
    if (render(large, embedded_templates()).dynamic_smem > 48 * 1024) break;
  }
  ForwardRequest r = request(128);
  r.tile = large.tile;
  for (const TargetChoice target : {TargetChoice::kNative, TargetChoice::kCompute75})
    for (const std::string call : {"cuModuleGetFunction", "cuFuncGetAttribute", "cuFuncSetAttribute"}) {
      CAPTURE(call);
      stub().reset(12040, {kT4});
      Driver driver(kStub);
      KernelLibrary library(setting.settings(12040));
      DeviceRuntime runtime(driver, library, target, default_tile_chooser());
      stub().fail(call, kInvalidImage);
      CHECK(refusal<DriverError>([&] { launch_forward(runtime.device(0), r, nullptr); }) ==
            Containing{"CUDA_ERROR_INVALID_IMAGE"});
      CHECK(stub().calls("cuModuleLoadData") == stub().calls("cuModuleUnload"));
      launch_forward(runtime.device(0), r, nullptr);
      CHECK(stub().launches().size() == 1);
      CHECK(stub().calls("cuModuleLoadData") == stub().calls("cuModuleUnload") + 1);
    }
}

TEST_CASE("a device below sm_75 is refused by name") {
  Process process(12040, {{"Tesla V100", 70, 80}});
  const std::string message =
      refusal<UnsupportedError>([&] { launch_forward(process.runtime.device(0), request(), nullptr); });
  CHECK(message == Containing{"Tesla V100"});
  CHECK(message == Containing{"sm_70"});
  CHECK(message == Containing{"accepted: sm_75"});
}

TEST_CASE("a device that is not there") {
  Process process(12040, {kT4});
  for (const int ordinal : {-1, 1})
    CHECK(refusal<DriverError>([&] { launch_forward(process.runtime.device(ordinal), request(), nullptr); }) ==
          Containing{"no CUDA device " + std::to_string(ordinal)});
}

TEST_CASE("the table of loaded kernels finds what was inserted, every field told apart") {
  LoadedKernelTable table;
  std::vector<KernelSpec> specs;
  for (int head_dim = 1; head_dim <= 256; ++head_dim)
    for (const Mask mask : {Mask::kNone, Mask::kCausal})
      for (const GlobalAccess access : {GlobalAccess::kVector16B, GlobalAccess::kElement2B}) {
        KernelSpec spec;
        spec.head_dim = head_dim;
        spec.mask = mask;
        spec.access = access;
        specs.push_back(spec);
      }
  for (std::size_t i = 0; i < specs.size(); ++i) {
    CHECK(table.find(specs[i]) == nullptr);
    table.insert({.spec = specs[i], .function = nullptr, .threads = static_cast<unsigned>(i), .dynamic_smem = 0});
  }
  for (std::size_t i = 0; i < specs.size(); ++i) CHECK(table.find(specs[i])->threads == i);
}

TEST_CASE("offline: the first call of a kernel that was bundled compiles nothing, another kernel's is refused") {
  TinySetting setting;
  setting.config.nvrtc = make_stub_nvrtc(setting.folder / "nvrtc", {.major = "12"});
  const BundledPack bundle{setting.folder / "bundled_pack.zip", setting.folder / "module.so"};
  write_all(bundle.module, "code");
  KernelSelection selection;
  selection.head_dims = {64};
  selection.masks = {Mask::kNone};
  selection.group_sizes = {1};
  {
    PackWriter pack(setting.config, bundle.pack, 12000);
    for (const KernelSpec& spec : select_kernels(selection, arch_limits(75)))
      pack.library().find_or_compile(spec, {75, CodeKind::kCubin});
    pack.finish();
  }
  setting.config.offline = true;
  KernelCacheSettings cache = cache_settings(setting.config);
  cache.bundled = bundle;
  KernelLibrary library(setting.config, std::make_shared<KernelCache>(cache), 12040);
  Driver driver(Process::started(12040, {kT4, kA100}));
  DeviceRuntime runtime(driver, library, TargetChoice::kNative, default_tile_chooser());
  stub().make_current(0);
  launch_forward(runtime.device(0), request(), stream(7));
  CHECK(stub().launches().size() == 1);
  CHECK_FALSE(fs::exists(setting.config.cache_dir));
  CHECK(refusal<MissingKernelError>([&] { launch_forward(runtime.device(0), request(128), stream(7)); }) ==
        Containing{"--arch sm_75 --kinds fwd --head-dims 128"});
  // A GPU that the pack has nothing for: the compiler is not asked what it knows, either.
  CHECK(refusal<MissingKernelError>([&] { launch_forward(runtime.device(1), request(), stream(7)); }) ==
        Containing{"--arch sm_80"});
  CHECK(library.nvrtc_opened() == 0);
}

#endif
