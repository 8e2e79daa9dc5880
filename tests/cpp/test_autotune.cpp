// Tuning of what a process launches, on a libcuda that plays a GPU and a shell script that plays the process that
// measures.
#include <doctest/doctest.h>

#ifdef FLASH_ATTN_JIT_STUB_LIBCUDA

#include <algorithm>
#include <sstream>
#include <thread>

#include "runtime/launch/autotune.h"
#include "runtime/launch/backward_launch.h"
#include "runtime/launch/forward_launch.h"
#include "runtime/launch/process.h"
#include "runtime/system/errors.h"
#include "runtime/system/interrupt.h"
#include "tests/cpp/captured_log.h"
#include "tests/cpp/containing.h"
#include "tests/cpp/stub_libcuda/stub_control.h"
#include "tests/cpp/stub_nvrtc.h"
#include "tests/cpp/temporary_folder.h"

using namespace flash_attn_jit;
using namespace flash_attn_jit::testing;
namespace fs = std::filesystem;

namespace {

constexpr const char* kStub = FLASH_ATTN_JIT_STUB_LIBCUDA;
const StubDevice kT4{"Tesla T4", 75, 40};

StubControl& stub() {
  static const DynamicLibrary library = DynamicLibrary::open(kStub);
  return *library.function<StubControl*()>("stub_control")();
}

// Says that it started; finds every candidate right, and those with blocks of 64 rows twice as fast.
constexpr const char* kWorker = R"(
echo started >> "$0"
while read -r line; do
  case "$line" in
    *'"do":"setup"'*) echo '{"figures":{"power_limit_watts":null,"gigabytes":240.0,"tflops":50.5,"unknown_state":"no NVML"}}' ;;
    *'"do":"check"'*) echo '{"is_broken":false,"checked":{"fault":null,"error":0.001,"error_allowed":0.01,"blocks_per_multiprocessor":2}}' ;;
    *'"tile":"m64n'*) echo '{"is_broken":false,"burst":{"fault":null,"seconds":0.0005,"clock_mhz":null,"power_watts":null,"temperature_celsius":null,"throttled_by":[]}}' ;;
    *) echo '{"is_broken":false,"burst":{"fault":null,"seconds":0.001,"clock_mhz":null,"power_watts":null,"temperature_celsius":null,"throttled_by":[]}}' ;;
  esac
done)";
constexpr const char* kFullCard =
    R"(echo started >> "$0"; read -r line; echo '{"error":"the card is full"}'; read -r line)";

// A process with a T4, its records, and a compiler that takes no time.
struct PlayedProcess {
  TemporaryFolder folder;
  Config config;
  Driver driver;
  KernelLibrary library;
  Tuning tuning;
  DeviceRuntime runtime;
  Autotuner autotuner;

  PlayedProcess()
      : config(configured(folder)),
        driver(started()),
        library({config, cache_settings(config), 12040}),
        tuning({config.cache_dir, std::nullopt, embedded_templates(), default_tile_chooser()}),
        runtime(driver, library, TargetChoice::kNative,
                [this](const TunedDevice& device) -> const TileChooser& { return tuning.tiles_of(device); }),
        autotuner(tuning) {
    stub().make_current(0);
  }

  static Config configured(const TemporaryFolder& folder) {
    Config config;
    config.cache_dir = folder / "cache";
    config.nvrtc = make_stub_nvrtc(folder / "nvrtc", {.major = "12"});
    return config;
  }
  static fs::path started() {
    stub().reset(12040, {kT4});
    return kStub;
  }

  Device& device() { return runtime.device(0); }

  AutotuneSettings settings(const char* worker = kWorker, double seconds = 2) const {
    return {{"/bin/sh", "-c", worker, (folder / "started").string()}, "12.4", 10 * seconds, seconds};
  }
  int workers_started() const {
    std::istringstream text(fs::exists(folder / "started") ? read_all(folder / "started") : "");
    int lines = 0;
    for (std::string line; std::getline(text, line);) ++lines;
    return lines;
  }
  TileConfig chosen(const ForwardRequest& request) { return plan_forward(request, device().plan_target()).spec.tile; }
  std::vector<TuningRecord> records() const { return tuning.store().read_all(); }
};

// A request whose tensors are never read.
ForwardRequest request(std::int64_t seqlen = 1024) {
  const auto view = [&](std::uintptr_t at) {
    return TensorView{reinterpret_cast<void*>(at), {2, seqlen, 8, 64}, {seqlen * 8 * 64, 8 * 64, 64, 1}};
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

// Of few queries, two heads of which share their keys.
ForwardRequest decode_request(std::int64_t seqlen_q = 1, std::int64_t seqlen_k = 2048) {
  ForwardRequest r = request(seqlen_k);
  r.q.shape[kSeqlen] = r.out.shape[kSeqlen] = seqlen_q;
  r.k.shape[kHeads] = r.v.shape[kHeads] = 4;
  return r;
}

BackwardRequest backward_request(std::int64_t seqlen = 1024) {
  const ForwardRequest f = request(seqlen);
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

int count_containing(const std::vector<std::string>& lines, const std::string& part) {
  return static_cast<int>(
      std::count_if(lines.begin(), lines.end(), [&](const auto& line) { return line == Containing{part}; }));
}

}  // namespace

TEST_CASE("autotune: the first call is tuned, and it and every later one use the winner") {
  PlayedProcess process;
  const CapturedLog log;
  const TileConfig before = process.chosen(request());
  REQUIRE(before.block_m != 64);
  process.autotuner.begin(process.settings());
  process.autotuner.meet(process.device(), request(), stream(7));
  CHECK(process.chosen(request()).block_m == 64);
  CHECK(process.workers_started() == 1);
  process.autotuner.meet(process.device(), request(), stream(7));
  process.autotuner.meet(process.device(), request(1000), stream(7));  // of the same class
  CHECK(process.workers_started() == 1);
  process.autotuner.meet(process.device(), request(300), stream(7));
  CHECK(process.workers_started() == 2);

  const std::vector<TunedProblem> found = process.autotuner.end();
  REQUIRE(found.size() == 2);
  REQUIRE(found[0].result.record);
  CHECK(found[0].result.record->winner.block_m == 64);
  CHECK(found[0].result.record->default_tile == before);
  CHECK(found[0].attention.seqlen_q == 1024);
  CHECK(found[1].attention.seqlen_q == 300);
  CHECK(process.records().size() == 2);
  CHECK(process.records()[0].environment.peak_tflops == 50.5);
  CHECK(process.records()[0].environment.peak_gigabytes == 240);
  CHECK(count_containing(log.warnings(), "are not recorded: no NVML") <= 1);  // once a process, so here or before

  // A later process finds them, and has nothing left to tune.
  Tuning later({process.config.cache_dir, std::nullopt, embedded_templates(), default_tile_chooser()});
  const LaunchPlan plan = plan_forward(request(), {arch_limits(75), 40, later.tiles_of(process.device().tuned_as())});
  CHECK(plan.spec.tile.block_m == 64);
  Autotuner again(later);
  again.begin(process.settings());
  again.meet(process.device(), request(), stream(7));
  CHECK(process.workers_started() == 2);
  CHECK(again.end().empty());
}

TEST_CASE("autotune: a call of few queries is tuned as a decode problem, by the rows that its queries make") {
  PlayedProcess process;
  const CapturedLog log;
  const KernelKind kDecode = KernelKind::kDecode;
  REQUIRE(plan_forward(decode_request(), process.device().plan_target()).spec.kind == kDecode);
  const TileConfig before = process.chosen(decode_request());
  REQUIRE(before.block_m != 64);
  process.autotuner.begin(process.settings());
  process.autotuner.meet(process.device(), decode_request(), nullptr);
  CHECK(process.chosen(decode_request()).block_m == 64);
  process.autotuner.meet(process.device(), decode_request(8), nullptr);  // 16 rows as well
  CHECK(process.workers_started() == 1);
  process.autotuner.meet(process.device(), decode_request(9), nullptr);
  CHECK(process.workers_started() == 2);
  ForwardRequest window = decode_request();
  set_mask(window.options, true, {300, -1});
  window.options.softcap = 30;
  process.autotuner.meet(process.device(), window, nullptr);
  const std::vector<TunedProblem> found = process.autotuner.found();
  REQUIRE(found.size() == 3);
  for (const TunedProblem& one : found) {
    CHECK(one.attention.spec.kind == kDecode);
    CHECK_MESSAGE(one.result.record, one.result.reason);
  }
  CHECK(found[0].attention.num_heads_k == 4);
  CHECK(found[0].attention.seqlen_q == 1);
  CHECK(found[2].attention.spec.mask == Mask::kWindow);

  ForwardRequest with_tile = decode_request(1, 4096);
  with_tile.decode_tile = before;
  process.autotuner.meet(process.device(), with_tile, nullptr);
  CHECK(process.autotuner.end().size() == 3);
}

TEST_CASE("autotune: calls of few queries over a cache are tuned, and those of many are left, which is said once") {
  PlayedProcess process;
  const CapturedLog log;
  process.autotuner.begin(process.settings());
  const auto over_cache = [](std::int64_t seqlen_q) {
    ForwardRequest r = decode_request(seqlen_q);
    r.options.key_lengths = KeyLengths{reinterpret_cast<const int*>(0x6000), nullptr, 0};
    return r;
  };
  ForwardRequest paged = over_cache(1);
  paged.k.shape = paged.v.shape = {200, 20, 4, 64};
  paged.k.strides = paged.v.strides = {20 * 4 * 64, 4 * 64, 64, 1};
  paged.options.pages = PageTable{reinterpret_cast<const int*>(0x7000), 77, 77};
  process.autotuner.meet(process.device(), over_cache(1), nullptr);
  process.autotuner.meet(process.device(), paged, nullptr);
  CHECK(process.chosen(over_cache(1)).block_m == 64);
  CHECK(process.chosen(paged).block_m == 64);
  for (int i = 0; i < 2; ++i) process.autotuner.meet(process.device(), over_cache(2048), nullptr);
  const std::vector<TunedProblem> found = process.autotuner.end();
  REQUIRE(found.size() == 2);
  CHECK(found[0].attention.spec.features == FeatureSet{Feature::kKeyLengths});
  CHECK(found[1].attention.spec.features == FeatureSet{Feature::kKeyLengths, Feature::kPaged});
  CHECK(found[1].attention.batch == 2);
  CHECK(found[1].attention.seqlen_k == 1552);  // 77 pages of 20, in pages of 16
  CHECK(count_containing(log.warnings(), "leaves calls of many queries over a cache") == 1);
}

TEST_CASE("autotune: every kernel of a backward pass, and none whose tile is given") {
  PlayedProcess process;
  process.autotuner.begin(process.settings());
  BackwardRequest backward = backward_request();
  backward.dq_tile = default_tiles([] {
                       KernelSpec spec;
                       spec.kind = KernelKind::kBackwardDq;
                       spec.head_dim = 64;
                       return spec;
                     }())
                         .front();
  process.autotuner.meet(process.device(), backward, nullptr);
  std::vector<TunedProblem> found = process.autotuner.found();
  REQUIRE(found.size() == 2);
  CHECK(found[0].attention.spec.kind == KernelKind::kBackwardPreprocess);
  CHECK(found[1].attention.spec.kind == KernelKind::kBackwardDkDv);
  process.autotuner.meet(process.device(), backward_request(), nullptr);
  found = process.autotuner.end();
  REQUIRE(found.size() == 3);
  CHECK(found[2].attention.spec.kind == KernelKind::kBackwardDq);
  for (const TunedProblem& one : found) CHECK_MESSAGE(one.result.record, one.result.reason);
}

TEST_CASE("autotune: both ways of a short backward pass") {
  PlayedProcess process;
  process.autotuner.begin(process.settings());
  process.autotuner.meet(process.device(), backward_request(100), nullptr);
  std::vector<KernelKind> kinds;
  for (const TunedProblem& one : process.autotuner.end()) kinds.push_back(one.attention.spec.kind);
  CHECK(kinds == std::vector{KernelKind::kBackwardPreprocess, KernelKind::kBackwardDkDv, KernelKind::kBackwardDq,
                             KernelKind::kBackwardAllKeys});
}

TEST_CASE("autotune: inside stream capture nothing is tuned, and once behind it") {
  PlayedProcess process;
  const CapturedLog log;
  process.autotuner.begin(process.settings());
  stub().capture(stream(7));
  for (int i = 0; i < 3; ++i) process.autotuner.meet(process.device(), request(2048), stream(7));
  CHECK(process.workers_started() == 0);
  CHECK(stub().calls("cuStreamSynchronize") == 0);
  CHECK(count_containing(log.warnings(), "is being captured") == 1);
  REQUIRE(process.autotuner.found().size() == 1);
  CHECK(process.autotuner.found()[0].result.reason == Containing{"call it once before the capture"});
  stub().capture(nullptr);
  process.autotuner.meet(process.device(), request(2048), stream(7));
  const std::vector<TunedProblem> found = process.autotuner.end();
  REQUIRE(found.size() == 1);
  CHECK(found[0].result.record);
}

TEST_CASE("autotune: what the card or the budget has no room for is left, said once and not tried again") {
  PlayedProcess process;
  const CapturedLog log;
  process.autotuner.begin(process.settings(kFullCard));
  for (int i = 0; i < 3; ++i) process.autotuner.meet(process.device(), request(4096), nullptr);
  CHECK(process.workers_started() == 1);
  CHECK(count_containing(log.warnings(), "the card is full") == 1);
  CHECK(process.autotuner.end()[0].result.reason == "the card is full");

  process.autotuner.begin(process.settings(kWorker, 0.04));
  process.autotuner.meet(process.device(), request(8192), nullptr);
  CHECK(process.workers_started() == 1);
  CHECK(process.autotuner.end().at(0).result.reason == "budget_seconds is spent");
  CHECK(process.records().empty());
}

TEST_CASE("autotune: without it nothing is timed, and no process is started") {
  PlayedProcess process;
  for (int i = 0; i < 3; ++i) launch_forward(process.device(), request(), nullptr);
  launch_backward(process.device(), backward_request(), nullptr);
  for (const char* call : {"cuEventRecord", "cuEventElapsedTime", "cuStreamSynchronize", "cuMemAlloc_v2"})
    CHECK(stub().calls(call) == 0);
  CHECK(stub().calls("cuLaunchKernel") == 6);
  CHECK_FALSE(fs::exists(process.tuning.store().folder()));
  CHECK(process_autotuner_if_on() == nullptr);
}

TEST_CASE("autotune: it does not nest; Ctrl-C ends it and keeps what was found") {
  PlayedProcess process;
  process.autotuner.begin(process.settings());
  CHECK_THROWS_AS(process.autotuner.begin(process.settings()), ArgumentError);
  set_interrupt_check([] { return true; });  // a played search is too short to be sure of a later time
  CHECK_THROWS_AS(process.autotuner.meet(process.device(), request(), nullptr), Interrupted);
  set_interrupt_check({});
  process.autotuner.meet(process.device(), request(8192), nullptr);  // of another class, of which nothing was found yet
  CHECK(process.chosen(request(8192)).block_m == 64);
  process.autotuner.end();
}

TEST_CASE("a device tells which kernels it has loaded") {
  PlayedProcess process;
  CHECK(process.device().loaded().empty());
  launch_forward(process.device(), request(), nullptr);
  const std::string spec = plan_forward(request(), process.device().plan_target()).spec.text();
  CHECK(process.device().loaded() == std::vector<std::string>{spec});
}

#endif
