// The device that checks and times candidates, on a libcuda that plays a GPU: kernels are functions of this file.
#include <doctest/doctest.h>

#ifdef FLASH_ATTN_JIT_STUB_LIBCUDA

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <set>

#include "generator/families/families.h"
#include "runtime/launch/forward_launch.h"
#include "runtime/launch/measuring_device.h"
#include "runtime/system/errors.h"
#include "templates/flash_bwd_params.cuh"
#include "templates/flash_decode_params.cuh"
#include "tests/cpp/containing.h"
#include "tests/cpp/fp16.h"
#include "tests/cpp/stub_libcuda/stub_control.h"

using namespace flash_attn_jit;
using namespace flash_attn_jit::testing;

namespace {

constexpr const char* kStub = FLASH_ATTN_JIT_STUB_LIBCUDA;
constexpr int kIllegalAddress = 700;  // cuda.h

StubControl& stub() {
  static const DynamicLibrary library = DynamicLibrary::open(kStub);
  return *library.function<StubControl*()>("stub_control")();
}

// As much of a cubin as the stub reads: that it is for sm_75, by CUDA 12, and the kernel's name.
CompiledCandidate kernel_named(const std::string& name, const std::string& tile = "m128n16w8q16l0b8k8") {
  CompiledKernel kernel;
  kernel.image = std::string(64, '\0') + name + '\0';
  std::memcpy(kernel.image.data(),
              "\x7f"
              "ELF",
              4);
  kernel.image[8] = 7;
  kernel.image[48] = 75;
  kernel.entry = name;
  kernel.threads = 256;
  return {TileConfig::parse(tile), kernel, ""};
}

double half_at(const void* memory, long long index) {
  static const std::vector<double> values = [] {
    std::vector<double> table;
    for (int bits = 0; bits < 65536; ++bits) table.push_back(from_fp16(static_cast<std::uint16_t>(bits)));
    return table;
  }();
  return values[static_cast<const std::uint16_t*>(memory)[index]];
}

// One kernel's work in double, by the definition, from what the launch was told.
template <class Params>
class PlainAttention {
 public:
  PlainAttention(const Params& params, int dims, bool causal) : p_(params), dims_(dims), causal_(causal) {}

  double dot(const void* a, const TensorStrides& sa, long long ra, int ha, const void* b, const TensorStrides& sb,
             long long rb, int hb, int batch) const {
    double sum = 0;
    for (int d = 0; d < dims_; ++d)
      sum += half_at(a, batch * sa.batch + ra * sa.row + ha * sa.head + d) *
             half_at(b, batch * sb.batch + rb * sb.row + hb * sb.head + d);
    return sum;
  }
  double score(int b, int h, int i, int j) const {
    return p_.softmax_scale_log2 / kLog2E * dot(p_.q, p_.q_strides, i, h, p_.k, p_.k_strides, j, h / group(), b);
  }
  bool sees(int i, int j) const { return !causal_ || j <= i + p_.seqlen_k - p_.seqlen_q; }
  int group() const { return p_.num_heads / p_.num_heads_k; }
  int row(int b, int h, int i) const { return (b * p_.num_heads + h) * p_.seqlen_q + i; }

 protected:
  const Params& p_;
  const int dims_;
  const bool causal_;
};

class PlainForward : public PlainAttention<FlashFwdParams> {
 public:
  using PlainAttention::PlainAttention;
  void run(int batches, const std::function<bool(int)>& is_spoilt) const {
    for (int b = 0; b < batches; ++b)
      for (int h = 0; h < p_.num_heads; ++h)
        for (int i = 0; i < p_.seqlen_q; ++i) {
          std::vector<double> out(static_cast<std::size_t>(dims_), is_spoilt(i) ? 0.02 : 0);
          double sum = 0;
          std::vector<double> scores;
          for (int j = 0; j < p_.seqlen_k; ++j) scores.push_back(sees(i, j) ? std::exp(score(b, h, i, j)) : 0);
          for (const double s : scores) sum += s;
          for (int j = 0; j < p_.seqlen_k; ++j)
            for (int d = 0; d < dims_ && scores[static_cast<std::size_t>(j)] > 0; ++d)
              out[static_cast<std::size_t>(d)] +=
                  scores[static_cast<std::size_t>(j)] / sum *
                  half_at(p_.v, b * p_.v_strides.batch + j * p_.v_strides.row + h / group() * p_.v_strides.head + d);
          for (int d = 0; d < dims_; ++d)
            static_cast<std::uint16_t*>(
                p_.out)[b * p_.out_strides.batch + i * p_.out_strides.row + h * p_.out_strides.head + d] =
                to_fp16(sum > 0 ? out[static_cast<std::size_t>(d)] : 0);
          p_.softmax_lse[row(b, h, i)] = static_cast<float>(sum > 0 ? std::log(sum) : INFINITY);
        }
  }
};

class PlainBackward : public PlainAttention<FlashBwdParams> {
 public:
  using PlainAttention::PlainAttention;

  void delta(int batches) const {
    for (int b = 0; b < batches; ++b)
      for (int h = 0; h < p_.num_heads; ++h)
        for (int i = 0; i < p_.seqlen_q; ++i)
          p_.delta[row(b, h, i)] =
              static_cast<float>(dot(p_.dout, p_.dout_strides, i, h, p_.out, p_.out_strides, i, h, b));
  }

  void gradients(int batches, bool of_queries) const {
    const int heads = of_queries ? p_.num_heads : p_.num_heads_k, rows = of_queries ? p_.seqlen_q : p_.seqlen_k;
    for (int b = 0; b < batches; ++b)
      for (int h = 0; h < heads; ++h)
        for (int r = 0; r < rows; ++r)
          if (of_queries)
            query_row(b, h, r);
          else
            key_row(b, h, r);
  }

 private:
  double probability(int b, int h, int i, int j) const {
    return std::exp(score(b, h, i, j) - p_.softmax_lse[row(b, h, i)]);
  }
  double score_gradient(int b, int h, int i, int j) const {
    return probability(b, h, i, j) * p_.softmax_scale *
           (dot(p_.dout, p_.dout_strides, i, h, p_.v, p_.v_strides, j, h / group(), b) - p_.delta[row(b, h, i)]);
  }
  void query_row(int b, int h, int i) const {
    std::vector<double> dq(static_cast<std::size_t>(dims_), 0);
    for (int j = 0; j < p_.seqlen_k; ++j) {
      if (!sees(i, j)) continue;
      const double gradient = score_gradient(b, h, i, j);
      for (int d = 0; d < dims_; ++d)
        dq[static_cast<std::size_t>(d)] += gradient * half_at(p_.k, b * p_.k_strides.batch + j * p_.k_strides.row +
                                                                        h / group() * p_.k_strides.head + d);
    }
    store(p_.dq, p_.dq_strides, b, h, i, dq);
  }
  void key_row(int b, int head_k, int j) const {
    std::vector<double> dk(static_cast<std::size_t>(dims_), 0), dv = dk;
    for (int h = head_k * group(); h < (head_k + 1) * group(); ++h)
      for (int i = 0; i < p_.seqlen_q; ++i) {
        if (!sees(i, j)) continue;
        const double gradient = score_gradient(b, h, i, j), p = probability(b, h, i, j);
        for (int d = 0; d < dims_; ++d) {
          dk[static_cast<std::size_t>(d)] +=
              gradient * half_at(p_.q, b * p_.q_strides.batch + i * p_.q_strides.row + h * p_.q_strides.head + d);
          dv[static_cast<std::size_t>(d)] +=
              p * half_at(p_.dout, b * p_.dout_strides.batch + i * p_.dout_strides.row + h * p_.dout_strides.head + d);
        }
      }
    store(p_.dk, p_.dk_strides, b, head_k, j, dk);
    store(p_.dv, p_.dv_strides, b, head_k, j, dv);
  }
  void store(void* to, const TensorStrides& s, int b, int h, int r, const std::vector<double>& values) const {
    for (int d = 0; d < dims_; ++d)
      static_cast<std::uint16_t*>(to)[b * s.batch + r * s.row + h * s.head + d] =
          to_fp16(values[static_cast<std::size_t>(d)]);
  }
};

AttentionCase problem(const std::string& kernel, std::int64_t seqlen = 96) {
  AttentionCase attention;
  attention.spec = parse_kernel_without_tile(kernel);
  attention.batch = 2;
  attention.num_heads = 4;
  attention.num_heads_k = family_of(attention.spec.kind).reads_mask ? 4 / attention.spec.group_size : 4;
  attention.seqlen_q = attention.seqlen_k = seqlen;
  return attention;
}

struct LaunchSeen {
  std::string name;
  const void* q;
};

// A device whose kernels, of 16 dims, take a millisecond and do what their names say.
class PlayedDevice {
 public:
  explicit PlayedDevice(bool causal = true, std::size_t memory = std::size_t{1} << 30) {
    stub().reset(12040, {StubDevice{"Tesla T4", 75, 40, memory}});
    driver = std::make_unique<Driver>(kStub);
    stub().run_kernels_with([this, causal](const std::string& name, const void* params) {
      if (name == "tensor_peak") return 1e-3;
      if (name.starts_with("fwd")) {
        const auto& p = *static_cast<const FlashFwdParams*>(params);
        seen.push_back({name, p.q});
        const bool is_whole = p.seqlen_q == 96;
        PlainForward(p, 16, causal).run(2, [&](int row) {
          if (name == "fwd_wrong") return row == 50;
          if (name == "fwd_wrong_when_whole") return is_whole && row == 50;
          return name == "fwd_wrong_everywhere_when_whole" && is_whole;
        });
      } else if (name.starts_with("decode") || name == "combine") {
        run_decode(name, *static_cast<const FlashDecodeParams*>(params));
      } else {
        const auto& p = *static_cast<const FlashBwdParams*>(params);
        const PlainBackward plain(p, 16, causal);
        if (name == "preprocess" || name == "all") plain.delta(2);
        if (name.starts_with("dq") || name == "all") plain.gradients(2, true);
        if (name == "dkdv" || name == "all") plain.gradients(2, false);
        if (name == "dq_wrong") static_cast<std::uint16_t*>(p.dq)[5] = to_fp16(3.0);
      }
      return 1e-3;
    });
  }

  std::unique_ptr<Driver> driver;
  std::vector<LaunchSeen> seen;

 private:
  // Splits leave a mark in the memory of each, which what puts them together looks for.
  void run_decode(const std::string& name, const FlashDecodeParams& p) {
    seen.push_back({name, p.q});
    const bool combines = name == "combine";
    bool is_whole = combines || p.num_splits == 1;
    for (int split = 0; split < p.num_splits && p.num_splits > 1; ++split) {
      float& mark = p.partial_rows[2 * (std::int64_t{p.num_splits} * p.total_rows - split) - 1];
      if (combines) is_whole = is_whole && mark == static_cast<float>(split + 1);
      mark = combines ? 0 : static_cast<float>(split + (name == "decode" ? 1 : 2));
    }
    if (is_whole) PlainForward(p, 16, true).run(2, [](int) { return false; });
  }
};

}  // namespace

TEST_CASE("measuring: a right kernel passes, and its bursts take what the device took") {
  PlayedDevice played;
  GpuMeasuringDevice device(*played.driver, {problem("fwd hdim16 fp16 causal gqa2 vec16"), 0, {}, true, {}});
  const CompiledCandidate right = kernel_named("fwd");
  const CheckedCandidate checked = device.check(right, 1);
  CHECK_FALSE(checked.fault);
  CHECK(checked.error.value() <= checked.error_allowed.value());
  CHECK(checked.error.value() > 0);
  CHECK(checked.error_allowed.value() < 0.01);
  CHECK(checked.blocks_per_multiprocessor == 2);
  const TimedBurst burst = device.time(right, 5, 1);
  CHECK_FALSE(burst.fault);
  CHECK(burst.sample.seconds == doctest::Approx(1e-3));
  CHECK_FALSE(device.is_broken());
  WorkerSetup asked;
  CHECK_FALSE(device.figures(asked).gigabytes);
  CHECK_FALSE(device.figures(asked).tflops);
  asked.measures_memory = true;
  asked.tensor_kernel = kernel_named("tensor_peak").kernel;
  const WorkerFigures figures = device.figures(asked);
  CHECK(figures.gigabytes.value() == doctest::Approx(200).epsilon(0.01));  // read and written
  // 40 multiprocessors x 2 blocks of 8 warps, 8192 x 8 products of 2048 operations each, in a millisecond.
  CHECK(figures.tflops.value() == doctest::Approx(40 * 2 * 8 * 8192.0 * 8 * 2048 / 1e-3 / 1e12).epsilon(0.01));
  CHECK((figures.unknown_state.empty() || figures.unknown_state == Containing{"libnvidia-ml"}));
}

TEST_CASE("measuring: a wrong kernel is found on the small problem, or at full size") {
  PlayedDevice played;
  GpuMeasuringDevice device(*played.driver, {problem("fwd hdim16 fp16 causal gqa2 vec16"), 0, {}, false, {}});
  CHECK_FALSE(device.check(kernel_named("fwd"), 1).fault);
  CheckedCandidate checked = device.check(kernel_named("fwd_wrong", "m128n24w8q16l0b8k8"), 1);
  REQUIRE(checked.fault);
  CHECK(checked.fault->outcome == Outcome::kWrongResult);
  CHECK(checked.error.value() > checked.error_allowed.value());
  checked = device.check(kernel_named("fwd_wrong_when_whole", "m128n32w8q16l0b8k8"), 1);
  REQUIRE(checked.fault);
  CHECK(checked.fault->outcome == Outcome::kWrongResult);
  CHECK(checked.fault->reason == Containing{"differs by"});
  CHECK(checked.error.value() <= checked.error_allowed.value());
}

TEST_CASE("measuring: the first result at full size is itself checked against float64") {
  PlayedDevice played;
  GpuMeasuringDevice device(*played.driver, {problem("fwd hdim16 fp16 causal gqa2 vec16"), 0, {}, false, {}});
  const CheckedCandidate checked = device.check(kernel_named("fwd_wrong_everywhere_when_whole"), 1);
  REQUIRE(checked.fault);
  CHECK(checked.fault->reason == Containing{"at full size"});
  CHECK_FALSE(device.check(kernel_named("fwd", "m128n24w8q16l0b8k8"), 1).fault);
}

TEST_CASE("measuring: every gradient kernel, after the kernels that come before it") {
  for (const KernelKind kind : kKernelKinds) {
    const KernelResults& made = family_of(kind).results;
    if (!made.dq && !made.dkdv) continue;
    const std::string kernel(to_text(kind));
    CAPTURE(kernel);
    PlayedDevice played;
    const AttentionCase attention = problem(kernel + " hdim16 fp16 causal gqa2 vec16");
    const EarlierKernels earlier{kernel_named("fwd"), kernel_named("preprocess", "m64n0w4q0l0b0k0")};
    GpuMeasuringDevice device(*played.driver, {attention, 0, earlier, false, {}});
    const std::string name = made.delta ? "all" : made.dq ? "dq" : "dkdv";
    const CheckedCandidate checked = device.check(kernel_named(name), 1);
    CHECK_MESSAGE(!checked.fault, checked.fault->reason);
    CHECK(checked.error.value() > 0);
    CHECK_FALSE(device.time(kernel_named(name), 2, 1).fault);
    const std::string wrong = made.dq ? "dq_wrong" : "nothing";  // which leaves what was there
    CHECK(device.check(kernel_named(wrong, "m128n24w8q16l0b8k8"), 1).fault);
  }
  PlayedDevice played(false);
  const AttentionCase attention = problem("bwd_preprocess hdim16 fp16 full gqa1 vec16");
  GpuMeasuringDevice device(*played.driver, {attention, 0, {kernel_named("fwd"), std::nullopt}, false, {}});
  const CheckedCandidate checked = device.check(kernel_named("preprocess", "m64n0w4q0l0b0k0"), 1);
  CHECK_MESSAGE(!checked.fault, checked.fault->reason);
}

TEST_CASE("measuring: a decode kernel's pass has its splits, and what puts them together behind it") {
  PlayedDevice played;
  AttentionCase attention = problem("decode hdim16 fp16 causal gqa2 vec16", 2048);
  attention.seqlen_q = 1;
  CHECK_THROWS_WITH_AS(GpuMeasuringDevice(*played.driver, {attention, 0, {}, false, {}}),
                       doctest::Contains("decode_combine kernel"), Error);
  GpuMeasuringDevice device(*played.driver, {attention, 0, {}, false, {}, kernel_named("combine", "m4n0w4q0l0b0k0")});
  const CompiledCandidate right = kernel_named("decode", "m16n16w4q16l0b0k0");
  const CheckedCandidate checked = device.check(right, 1);
  CHECK_MESSAGE(!checked.fault, checked.fault->reason);
  CHECK(checked.error.value() > 0);
  played.seen.clear();
  const TimedBurst burst = device.time(right, 5, 1);
  CHECK_FALSE(burst.fault);
  CHECK(burst.sample.seconds == doctest::Approx(2e-3));  // a millisecond each
  REQUIRE(played.seen.size() == 10);
  for (std::size_t i = 0; i < 10; ++i) {
    CHECK(played.seen[i].name == (i % 2 == 0 ? "decode" : "combine"));
    CHECK(played.seen[i].q == played.seen[i / 2 * 2].q);
  }
  CHECK(played.seen[2].q != played.seen[0].q);
  const CheckedCandidate wrong = device.check(kernel_named("decode_wrong", "m32n16w4q16l0b0k0"), 1);
  REQUIRE(wrong.fault);
  CHECK(wrong.fault->outcome == Outcome::kWrongResult);

  // Keys of which one split has all are one launch.
  attention.seqlen_k = 100;
  GpuMeasuringDevice alone(*played.driver, {attention, 0, {}, false, {}, kernel_named("combine", "m4n0w4q0l0b0k0")});
  CHECK_FALSE(alone.check(right, 1).fault);
  played.seen.clear();
  CHECK(alone.time(right, 3, 1).sample.seconds == doctest::Approx(1e-3));
  CHECK(played.seen.size() == 3);
}

TEST_CASE("measuring: a case asks for its own kernel, and its reference has every feature that changes scores") {
  PlayedDevice played;
  Driver& driver = *played.driver;
  const CudaContext context = driver.primary_context(0);
  const Driver::CurrentContext current(driver, context);
  const CaseNumbers numbers(1);
  const PlanTarget target{arch_limits(75), 40, default_tile_chooser()};
  for (const FeatureSet& features : all_feature_sets()) {
    for (const Mask mask : kAllMasks)
      for (const GlobalAccess access : {GlobalAccess::kVector16B, GlobalAccess::kElement2B}) {
        AttentionCase attention = problem("fwd hdim16 fp16 full gqa2 vec16");
        attention.spec.mask = mask;
        attention.spec.features = features;
        attention.spec.access = access;
        CAPTURE(attention.spec.text());
        const CaseMemory memory(driver, attention, numbers, 0);
        ForwardRequest request = memory.forward(0);
        request.tile = default_tiles(attention.spec).front();
        KernelSpec planned = plan_forward(request, target).spec;
        planned.tile = {};
        CHECK(planned == attention.spec);
        AttentionCase plain = attention;
        plain.spec.features = {};
        const AttentionCase::Score with = attention.score(3, 1, 50, 20), without = plain.score(3, 1, 50, 20);
        CHECK((with.value != without.value) == features.change_scores());
      }
  }
}

TEST_CASE("measuring: the tensors of a decode case hold what its reference computes, lengths and pages among them") {
  PlayedDevice played;
  Driver& driver = *played.driver;
  const Driver::CurrentContext current(driver, driver.primary_context(0));
  const CaseNumbers numbers(1);
  for (const char* kernel :
       {"decode hdim16 fp16 causal gqa2 vec16", "decode hdim16 fp16 full keylens gqa2 elem2",
        "decode hdim16 fp16 causal softcap paged gqa2 vec16", "decode hdim16 fp16 window alibi varlen gqa2 vec16",
        "decode hdim16 fp16 causal sink gqa2 vec16", "decode hdim16 fp16 causal varlen keylens paged gqa2 vec16",
        "decode hdim16 fp16 full bias16 gqa2 vec16", "decode hdim16 fp16 causal alibi bias32 unpaired gqa2 vec16",
        "decode hdim16 fp16 full softcap boolmask onerow varlen gqa2 vec16",
        "decode hdim16 fp16 causal boolmask unpaired keylens paged gqa2 vec16"}) {
    CAPTURE(kernel);
    AttentionCase attention = problem(kernel, 336);
    attention.seqlen_q = 3;
    CaseMemory memory(driver, attention, numbers, 0);
    memory.spoil_outputs();
    ForwardRequest request = memory.forward(0);
    request.decode_tile = default_tiles(attention.spec).front();
    forward_in_interpreter(request);
    const std::vector<std::uint16_t> out = memory.out();
    const std::vector<float> lse = memory.lse();
    const CaseReference reference(attention, numbers);
    for (std::int64_t b = 0; b < attention.batch; ++b)
      for (std::int64_t h = 0; h < attention.num_heads; ++h)
        for (std::int64_t i = 0; i < attention.seqlen_q; ++i) {
          const ForwardRow row = reference.forward(b, h, i);
          const auto at = static_cast<std::size_t>(((b * attention.seqlen_q + i) * attention.num_heads + h) * 16);
          CHECK(worst_error(row.out, &out[at]).is_within());
          CHECK(std::fabs(lse[static_cast<std::size_t>(attention.statistic_at(b, h, i))] - row.lse) <= row.lse_bound);
        }
  }
}

TEST_CASE("measuring: a kernel that the device refuses is out; one that ends with an error takes the process along") {
  PlayedDevice played;
  GpuMeasuringDevice device(*played.driver, {problem("fwd hdim16 fp16 causal gqa2 vec16"), 0, {}, false, {}});
  stub().fail("cuLaunchKernel", 1);
  CheckedCandidate checked = device.check(kernel_named("fwd"), 1);
  REQUIRE(checked.fault);
  CHECK(checked.fault->outcome == Outcome::kLaunchFailed);
  CHECK_FALSE(device.is_broken());
  CHECK_FALSE(device.check(kernel_named("fwd"), 1).fault);
  stub().fail("cuStreamSynchronize", kIllegalAddress);
  checked = device.check(kernel_named("fwd", "m128n24w8q16l0b8k8"), 1);
  REQUIRE(checked.fault);
  CHECK(checked.fault->reason == Containing{"700"});
  CHECK(device.is_broken());
}

TEST_CASE("measuring: inputs rotate past twice the L2, and everything is given back") {
  PlayedDevice played;
  {
    const AttentionCase attention = problem("fwd hdim16 fp16 causal gqa2 vec16");
    GpuMeasuringDevice device(*played.driver, {attention, 0, {}, false, {}});
    const CompiledCandidate right = kernel_named("fwd");
    CHECK_FALSE(device.check(right, 1).fault);
    played.seen.clear();
    constexpr std::int64_t kL2 = 1 << 22;  // the stub's
    const int copies = static_cast<int>(2 * kL2 / CaseMemory::bytes_of(attention) + 1);
    REQUIRE(copies > 20);
    device.time(right, 30, 1);
    std::set<const void*> inputs;
    for (const LaunchSeen& launch : played.seen) inputs.insert(launch.q);
    CHECK(inputs.size() == static_cast<std::size_t>(std::min(copies, 30)));
    CHECK(stub().allocated() > 2 * kL2);
  }
  CHECK(stub().allocated() == 0);
}

TEST_CASE("measuring: a device whose memory is full says so") {
  PlayedDevice played(true, std::size_t{3} << 20);
  AttentionCase attention = problem("fwd hdim16 fp16 causal gqa2 vec16");
  attention.batch = 128;
  std::string words;
  try {
    GpuMeasuringDevice device(*played.driver, {attention, 0, {}, false, {}});
  } catch (const DriverError& error) {
    words = error.what();
  }
  CHECK(words == Containing{"MiB free of 3"});
  CHECK(words == Containing{"tune with a smaller batch"});
}

TEST_CASE("measuring: memory, events, figures and failures of the driver") {
  stub().reset(12040, {StubDevice{"Tesla T4", 75, 40, std::size_t{1} << 20}});
  Driver driver(kStub);
  const DeviceFigures figures = driver.device_figures(0);
  CHECK(figures.l2_bytes == 1 << 22);
  CHECK(figures.clock_khz == 1590000);
  CHECK(figures.memory_clock_khz == 5001000);
  CHECK(figures.memory_bus_bits == 256);
  CHECK(figures.pci_bus_id == "0000:01:00.0");
  const Driver::CurrentContext current(driver, driver.primary_context(0));
  {
    Driver::Memory memory(driver, 1000);
    CHECK(driver.memory_info().free == (1 << 20) - 1000);
    driver.fill(memory.data(), 7, 1000);
    std::vector<char> back(1000);
    driver.copy_to_host(back.data(), memory.data(), 1000);
    CHECK(std::count(back.begin(), back.end(), 7) == 1000);
    const Driver::Memory moved = std::move(memory);
    CHECK(memory.data() == nullptr);
    CHECK(moved.bytes() == 1000);
  }
  CHECK(stub().allocated() == 0);
  std::string words;
  try {
    Driver::Memory(driver, 2 << 20);
  } catch (const DriverError& error) {
    words = error.what();
  }
  CHECK(words == Containing{"refused 2097152 bytes of the device's memory"});
}

#endif
