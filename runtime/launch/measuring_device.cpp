#include "runtime/launch/measuring_device.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>

#include "generator/families/families.h"
#include "runtime/system/errors.h"
#include "runtime/tuner/half.h"
#include "templates/tensor_peak_params.cuh"

namespace flash_attn_jit {
namespace {

constexpr std::uint64_t kNumbersSeed = 20240601;
constexpr int kSampledRows = 48;

// Two kernels that are right round in other places: a row differs by some thousandths of its greatest element. One that
// is next to 0 throughout, because its terms cancel, is compared with the whole tensor.
constexpr double kRowTolerance = 0x1p-6;
constexpr double kTensorTolerance = 0x1p-8;
constexpr double kLseTolerance = 2e-3;

constexpr double kDeltaBound = 1e-3;  // a sum of float32, of at most 256 products
constexpr double kLeastBound = 1e-9;

constexpr std::size_t kCopiedBytes = std::size_t{256} << 20;
constexpr int kTimedCopies = 8;

constexpr int kTensorPeakBlocks = 2;  // of a multiprocessor
constexpr int kTensorPeakIterations = 8192;
constexpr int kTimedTensorLaunches = 8;
constexpr double kFlopsOfTensorInstruction = 2.0 * 16 * 8 * 8;  // m16n8k8

std::string text_of(const char* format, double a, double b) {
  char text[96];
  std::snprintf(text, sizeof text, format, a, b);
  return text;
}

// Of every fp16 there is: whole tensors are compared.
const std::vector<float>& half_values() {
  static const std::vector<float> values = [] {
    std::vector<float> table;
    for (int bits = 0; bits < 65536; ++bits)
      table.push_back(static_cast<float>(half_to_double(static_cast<std::uint16_t>(bits))));
    return table;
  }();
  return values;
}

double root_mean_square(const std::vector<std::uint16_t>& halves) {
  double sum = 0;
  for (const std::uint16_t bits : halves) {
    const double value = half_values()[bits];
    sum += value * value;
  }
  return halves.empty() ? 0 : std::sqrt(sum / static_cast<double>(halves.size()));
}

CheckedCandidate refused(const std::string& reason) {
  return {CandidateFault{Outcome::kLaunchFailed, reason}, std::nullopt, std::nullopt, 0};
}

}  // namespace

struct GpuMeasuringDevice::Launch {
  std::int64_t blocks = 0;
  std::vector<char> params;
};

struct GpuMeasuringDevice::Pass {
  Launch own;
  Launch combine = {};  // behind it; without blocks where there are no splits
};

// A candidate's own, which its launches find at the same place each time, as those of a process do.
class GpuMeasuringDevice::SplitMemory final : public Workspace {
 public:
  explicit SplitMemory(Driver& driver) : driver_(driver) {}

  float* allocate(std::int64_t floats) override {
    const std::size_t bytes = sizeof(float) * static_cast<std::size_t>(floats);
    if (!memory_ || memory_->bytes() < bytes) memory_.emplace(driver_, bytes);
    return static_cast<float*>(memory_->data());
  }

 private:
  Driver& driver_;
  std::optional<Driver::Memory> memory_;
};

struct GpuMeasuringDevice::Loaded {
  Driver::Module module;
  CudaFunction function;
  LaunchShape shape;  // but for its blocks
  SplitMemory splits;
  std::vector<Pass> passes;  // one for each copy of the whole problem

  Loaded(Driver& driver, const CompiledKernel& kernel)
      : module(driver, kernel.image),
        function(module.find_function(kernel.entry)),
        shape{0, static_cast<unsigned>(kernel.threads), static_cast<unsigned>(kernel.dynamic_smem)},
        splits(driver) {
    if (kernel.dynamic_smem > kSmemWithoutOptIn) driver.allow_dynamic_smem(function, kernel.dynamic_smem);
  }
};

// What the tuned kernel writes: those of its kind that are not empty.
struct GpuMeasuringDevice::Result {
  std::vector<std::uint16_t> out, dq, dk, dv;
  std::vector<float> lse, delta;
};

GpuMeasuringDevice::GpuMeasuringDevice(Driver& driver, const WorkerSetup& setup)
    : driver_(driver),
      figures_(driver.device_figures(setup.device)),
      target_{arch_limits(driver.device_info(setup.device).sm), driver.device_info(setup.device).multiprocessors,
              default_tile_chooser()},
      context_(driver.primary_context(setup.device)),
      current_(driver, context_),
      stream_(driver),
      begin_(driver),
      end_(driver),
      attention_(setup.attention),
      small_(small_case(attention_)),
      numbers_(kNumbersSeed),
      small_reference_(small_, numbers_) {
  try {
    nvml_ = std::make_unique<Nvml>();
  } catch (const Error& error) {
    nvml_absence_ = error.what();
  }
  if (attention_.spec.kind == KernelKind::kDecode) {
    if (!setup.combine) throw Error("the decode_combine kernel that comes behind is missing");
    combine_ = std::make_unique<Loaded>(driver_, setup.combine->kernel.value());
  }
  prepare_small();
  prepare_whole(setup.earlier);
}

GpuMeasuringDevice::~GpuMeasuringDevice() = default;

GpuMeasuringDevice::Loaded& GpuMeasuringDevice::load(const CompiledCandidate& candidate,
                                                     const AttentionCase& attention) {
  std::unique_ptr<Loaded>& loaded = loaded_[{attention.spec.kind, candidate.tile}];
  if (loaded == nullptr) loaded = std::make_unique<Loaded>(driver_, candidate.kernel.value());
  return *loaded;
}

namespace {

template <class Params>
std::vector<char> params_bytes(const Params& params) {
  const auto* const bytes = reinterpret_cast<const char*>(&params);
  return {bytes, bytes + sizeof params};
}

}  // namespace

std::vector<GpuMeasuringDevice::Pass> GpuMeasuringDevice::passes_of(Loaded& kernel, const CaseMemory& memory,
                                                                    const AttentionCase& attention,
                                                                    const TileConfig& tile) const {
  const auto launch_of = [&](const auto& plan) {
    KernelSpec wanted = attention.spec;
    wanted.tile = tile;
    if (plan.spec != normalized(wanted))
      throw Error("a launch of kernel '" + wanted.text() + "' was planned as '" + plan.spec.text() + "'");
    return Launch{plan.blocks, params_bytes(plan.params)};
  };
  std::vector<Pass> passes;
  for (int copy = 0; copy < memory.copies(); ++copy) {
    if (!attention.is_backward()) {
      ForwardRequest request = memory.forward(copy);
      (attention.spec.kind == KernelKind::kDecode ? request.decode_tile : request.tile) = tile;
      request.workspace = &kernel.splits;
      LaunchPlan plan = plan_forward(request, target_);
      give_workspace(plan, &kernel.splits);
      passes.push_back({launch_of(plan), {plan.combine.blocks, params_bytes(plan.combine.params)}});
      continue;
    }
    BackwardRequest request = memory.backward(copy);
    tile_of(request, attention.spec.kind) = tile;
    for (const BackwardLaunch& plan : plan_backward(request, target_))
      if (plan.spec.kind == attention.spec.kind) passes.push_back({launch_of(plan)});
  }
  return passes;
}

// The driver's code, 0 where it took all of the pass.
int GpuMeasuringDevice::launch(const Loaded& kernel, const Pass& pass) {
  const auto launch_one = [this](const Loaded& loaded, const Launch& one) {
    LaunchShape shape = loaded.shape;
    shape.blocks = static_cast<unsigned>(one.blocks);
    return driver_.launch(loaded.function, shape, stream_.get(), one.params.data());
  };
  const int code = launch_one(kernel, pass.own);
  return code != 0 || pass.combine.blocks == 0 ? code : launch_one(*combine_, pass.combine);
}

// On copy 0, waited for. Throws DriverError.
void GpuMeasuringDevice::run_once(Loaded& kernel, const CaseMemory& memory, const AttentionCase& attention,
                                  const TileConfig& tile) {
  const Pass pass = passes_of(kernel, memory, attention, tile).front();
  driver_.require(launch(kernel, pass), "the launch");
  try {
    driver_.synchronize(stream_.get());
  } catch (const DriverError&) {
    broken_ = true;
    throw;
  }
}

GpuMeasuringDevice::Result GpuMeasuringDevice::result_of(const CaseMemory& memory,
                                                         const AttentionCase& attention) const {
  Result result;
  const KernelResults& made = family_of(attention.spec.kind).results;
  if (made.out) result.out = memory.out();
  if (made.out) result.lse = memory.lse();
  if (made.delta) result.delta = memory.delta();
  if (made.dq) result.dq = memory.dq();
  if (made.dkdv) result.dk = memory.dk();
  if (made.dkdv) result.dv = memory.dv();
  return result;
}

// ---- the small problem: every row against float64, and what comes before the kernel is float64's too ----

void GpuMeasuringDevice::prepare_small() {
  small_memory_ = std::make_unique<CaseMemory>(driver_, small_, numbers_, 0);
  small_statistics_.resize(static_cast<std::size_t>(small_.statistics()));
  small_statistic_bounds_.resize(small_statistics_.size(), kDeltaBound);
  if (small_.is_backward()) prepare_small_backward();
  prepare_small_reference();
}

void GpuMeasuringDevice::prepare_small_backward() {
  std::vector<std::uint16_t> out(static_cast<std::size_t>(small_.statistics() * small_.spec.head_dim));
  small_lse_.resize(small_statistics_.size());
  small_delta_.resize(small_statistics_.size());
  for (std::int64_t b = 0; b < small_.batch; ++b)
    for (std::int64_t h = 0; h < small_.num_heads; ++h)
      for (std::int64_t i = 0; i < small_.seqlen_q; ++i) {
        ForwardRow row = small_reference_.forward(b, h, i);
        const auto first =
            static_cast<std::size_t>(((b * small_.seqlen_q + i) * small_.num_heads + h) * small_.spec.head_dim);
        for (std::size_t d = 0; d < row.out.value.size(); ++d) {
          out[first + d] = double_to_half(row.out.value[d]);
          row.out.value[d] = half_to_double(out[first + d]);
        }
        const auto at = static_cast<std::size_t>(small_.statistic_at(b, h, i));
        small_lse_[at] = static_cast<float>(row.lse);
        small_statistics_[at] = small_reference_.delta(b, h, i, row.out.value);
        small_delta_[at] = static_cast<float>(small_statistics_[at]);
      }
  small_memory_->set_out(out);
  small_memory_->set_lse(small_lse_);
  small_memory_->set_delta(small_delta_);
}

void GpuMeasuringDevice::prepare_small_reference() {
  const GivenStatistics given{small_lse_.data(), small_delta_.data()};
  const KernelResults& made = family_of(small_.spec.kind).results;
  for (std::int64_t b = 0; b < small_.batch; ++b) {
    for (std::int64_t i = 0; i < small_.seqlen_q; ++i)
      for (std::int64_t h = 0; h < small_.num_heads; ++h) {
        if (made.out) {
          ForwardRow row = small_reference_.forward(b, h, i);
          const auto at = static_cast<std::size_t>(small_.statistic_at(b, h, i));
          small_statistics_[at] = row.lse;
          small_statistic_bounds_[at] = row.lse_bound;
          small_rows_.out.push_back(std::move(row.out));
        }
        if (made.dq) small_rows_.dq.push_back(small_reference_.dq(b, h, i, given));
      }
    if (!made.dkdv) continue;
    for (std::int64_t i = 0; i < small_.seqlen_k; ++i)
      for (std::int64_t h = 0; h < small_.num_heads_k; ++h) {
        KeyGradientRow row = small_reference_.dkdv(b, h, i, given);
        small_rows_.dk.push_back(std::move(row.dk));
        small_rows_.dv.push_back(std::move(row.dv));
      }
  }
}

WorstError GpuMeasuringDevice::check_small(const Result& result) const {
  WorstError worst{0, kLeastBound};
  const auto take = [&worst](const WorstError& other) {
    if (worst.is_outdone_by(other)) worst = other;
  };
  const auto dims = static_cast<std::size_t>(small_.spec.head_dim);
  const std::vector<float>& statistics = small_.is_backward() ? result.delta : result.lse;
  for (std::size_t at = 0; at < statistics.size(); ++at)
    if (statistics[at] != small_statistics_[at])  // infinities are equal
      take({std::fabs(statistics[at] - small_statistics_[at]), small_statistic_bounds_[at]});
  const auto take_rows = [&](const std::vector<ReferenceRow>& rows, const std::vector<std::uint16_t>& got) {
    for (std::size_t row = 0; row < rows.size(); ++row) take(worst_error(rows[row], &got[row * dims]));
  };
  take_rows(small_rows_.out, result.out);
  take_rows(small_rows_.dq, result.dq);
  take_rows(small_rows_.dk, result.dk);
  take_rows(small_rows_.dv, result.dv);
  return worst;
}

// ---- the whole problem: some rows against float64, then all against a result that was right ----

void GpuMeasuringDevice::prepare_whole(const EarlierKernels& earlier) {
  whole_memory_ = std::make_unique<CaseMemory>(driver_, attention_, numbers_, figures_.l2_bytes);
  if (!attention_.is_backward()) return;
  const auto run = [&](KernelKind kind, const std::optional<CompiledCandidate>& candidate) {
    if (!candidate) throw Error("the " + std::string(to_text(kind)) + " kernel that comes before is missing");
    AttentionCase before = attention_;
    before.spec.kind = kind;
    before.spec = normalized(before.spec);
    run_once(load(*candidate, before), *whole_memory_, before, candidate->tile);
    return before;
  };
  const AttentionCase forward = run(KernelKind::kForward, earlier.forward);
  Result result;
  result.out = whole_memory_->out();
  result.lse = whole_lse_ = whole_memory_->lse();
  if (const auto wrong = check_rows(forward, result))
    throw DriverError("the forward kernel that comes before is wrong: " + *wrong);
  whole_memory_->set_out(result.out);
  whole_memory_->set_lse(whole_lse_);
  if (family_of(attention_.spec.kind).products == 0) return;
  run(KernelKind::kBackwardPreprocess, earlier.preprocess);
  whole_delta_ = whole_memory_->delta();
  whole_memory_->set_delta(whole_delta_);
}

// Nothing, or what is wrong in words.
std::optional<std::string> GpuMeasuringDevice::check_rows(const AttentionCase& attention, const Result& result) const {
  const KernelResults& made = family_of(attention.spec.kind).results;
  if (made.out || made.dq)
    if (auto wrong = check_sampled_rows(attention, result, RowSide::kQueries)) return wrong;
  return made.dkdv ? check_sampled_rows(attention, result, RowSide::kKeys) : std::nullopt;
}

std::optional<std::string> GpuMeasuringDevice::check_sampled_rows(const AttentionCase& attention, const Result& result,
                                                                  RowSide side) const {
  const bool is_keys = side == RowSide::kKeys;
  const std::int64_t heads = is_keys ? attention.num_heads_k : attention.num_heads,
                     rows = is_keys ? attention.seqlen_k : attention.seqlen_q;
  const CaseReference reference(attention, numbers_);
  std::mt19937_64 random(kNumbersSeed);
  const GivenStatistics given{whole_lse_.data(), whole_delta_.data()};
  for (int n = 0; n < kSampledRows; ++n) {
    const auto some = [&random](std::int64_t count) {
      return static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(count));
    };
    const std::int64_t b = some(attention.batch), h = some(heads), i = n == 0 ? 0 : n == 1 ? rows - 1 : some(rows);
    const auto first = static_cast<std::size_t>(((b * rows + i) * heads + h) * attention.spec.head_dim);
    WorstError worst{0, kLeastBound};
    const auto take = [&worst](const WorstError& other) {
      if (worst.is_outdone_by(other)) worst = other;
    };
    if (is_keys) {
      const KeyGradientRow row = reference.dkdv(b, h, i, given);
      take(worst_error(row.dk, &result.dk[first]));
      take(worst_error(row.dv, &result.dv[first]));
    } else if (attention.is_backward()) {
      take(worst_error(reference.dq(b, h, i, given), &result.dq[first]));
    } else {
      const ForwardRow row = reference.forward(b, h, i);
      take(worst_error(row.out, &result.out[first]));
      const float lse = result.lse[static_cast<std::size_t>(attention.statistic_at(b, h, i))];
      if (!(std::isinf(row.lse) && row.lse == lse)) take({std::fabs(lse - row.lse), row.lse_bound});
    }
    if (!worst.is_within())
      return text_of("off by %.3g at full size, where %.3g is allowed", worst.error, worst.allowed) + " (batch " +
             std::to_string(b) + ", head " + std::to_string(h) + ", row " + std::to_string(i) + ")";
  }
  return std::nullopt;
}

namespace {

// Row by row: nothing, or where they differ by more than two right kernels do.
std::optional<std::string> difference(const char* name, const std::vector<std::uint16_t>& got,
                                      const std::vector<std::uint16_t>& right, std::int64_t dims) {
  const double floor = kTensorTolerance * root_mean_square(right);
  const auto count = static_cast<std::size_t>(dims);
  const std::vector<float>& values = half_values();
  for (std::size_t row = 0; row + count <= right.size(); row += count) {
    if (std::memcmp(&got[row], &right[row], 2 * count) == 0) continue;
    double greatest = 0, apart = 0;
    for (std::size_t d = row; d < row + count; ++d) {
      const double here = values[got[d]], there = values[right[d]];
      greatest = std::max(greatest, std::fabs(there));
      apart = std::isnan(here) ? INFINITY : std::max(apart, std::fabs(here - there));
    }
    if (apart > kRowTolerance * greatest + floor)
      return std::string(name) + text_of(" differs by %.3g from a right result, where %.3g is allowed", apart,
                                         kRowTolerance * greatest + floor);
  }
  return std::nullopt;
}

std::optional<std::string> difference(const char* name, const std::vector<float>& got,
                                      const std::vector<float>& right) {
  for (std::size_t i = 0; i < right.size(); ++i)
    if (got[i] != right[i] && !(std::fabs(got[i] - right[i]) <= kLseTolerance))
      return std::string(name) + text_of(" is %.5g, where a right result has %.5g", got[i], right[i]);
  return std::nullopt;
}

}  // namespace

std::optional<std::string> GpuMeasuringDevice::compare_whole(const Result& result) const {
  const Result& right = *right_result_;
  const std::int64_t dims = attention_.spec.head_dim;
  if (auto wrong = difference("out", result.out, right.out, dims)) return wrong;
  if (auto wrong = difference("dq", result.dq, right.dq, dims)) return wrong;
  if (auto wrong = difference("dk", result.dk, right.dk, dims)) return wrong;
  if (auto wrong = difference("dv", result.dv, right.dv, dims)) return wrong;
  if (auto wrong = difference("softmax_lse", result.lse, right.lse)) return wrong;
  return difference("delta", result.delta, right.delta);
}

CheckedCandidate GpuMeasuringDevice::check(const CompiledCandidate& candidate, double) {
  try {
    Loaded& kernel = load(candidate, attention_);
    small_memory_->spoil_outputs();
    run_once(kernel, *small_memory_, small_, candidate.tile);
    const WorstError small = check_small(result_of(*small_memory_, small_));
    CheckedCandidate checked{std::nullopt, small.error, small.allowed,
                             driver_.blocks_per_multiprocessor(kernel.function, static_cast<int>(kernel.shape.threads),
                                                               static_cast<int>(kernel.shape.dynamic_smem))};
    if (!small.is_within()) {
      checked.fault = {Outcome::kWrongResult,
                       text_of("off by %.3g, where %.3g is allowed", small.error, small.allowed)};
      return checked;
    }
    whole_memory_->spoil_outputs();
    run_once(kernel, *whole_memory_, attention_, candidate.tile);
    Result whole = result_of(*whole_memory_, attention_);
    const auto wrong = right_result_ == nullptr ? check_rows(attention_, whole) : compare_whole(whole);
    if (wrong)
      checked.fault = {Outcome::kWrongResult, *wrong};
    else if (right_result_ == nullptr)
      right_result_ = std::make_unique<Result>(std::move(whole));
    return checked;
  } catch (const DriverError& error) {
    return refused(error.what());
  }
}

TimedBurst GpuMeasuringDevice::time(const CompiledCandidate& candidate, int launches, double) {
  TimedBurst burst;
  try {
    Loaded& kernel = load(candidate, attention_);
    if (kernel.passes.empty()) kernel.passes = passes_of(kernel, *whole_memory_, attention_, candidate.tile);
    int code = 0;
    begin_.record(stream_.get());
    for (int i = 0; i < launches && code == 0; ++i)
      code = launch(kernel, kernel.passes[next_launch_++ % kernel.passes.size()]);
    end_.record(stream_.get());
    const GpuState state = gpu_state();  // while the burst runs
    end_.synchronize();
    driver_.require(code, "the launch");
    burst.sample.seconds = end_.seconds_since(begin_) / launches;
    burst.sample.clock_mhz = state.clock_mhz;
    burst.sample.power_watts = state.power_watts;
    burst.sample.temperature_celsius = state.temperature_celsius;
    burst.sample.throttled_by = state.throttled_by;
  } catch (const DriverError& error) {
    broken_ = true;
    burst.fault = CandidateFault{Outcome::kLaunchFailed, error.what()};
  }
  return burst;
}

GpuState GpuMeasuringDevice::gpu_state() const {
  return nvml_ == nullptr ? GpuState{} : nvml_->state(figures_.pci_bus_id);
}

WorkerFigures GpuMeasuringDevice::figures(const WorkerSetup& setup) {
  WorkerFigures figures;
  figures.power_limit_watts = gpu_state().power_limit_watts;
  figures.unknown_state = nvml_absence_;
  if (setup.measures_memory) figures.gigabytes = copied_gigabytes();
  if (setup.tensor_kernel) figures.tflops = tensor_tflops(*setup.tensor_kernel);
  return figures;
}

double GpuMeasuringDevice::copied_gigabytes() {
  const std::size_t bytes = std::min(kCopiedBytes, driver_.memory_info().free / 4);
  const Driver::Memory from(driver_, bytes), to(driver_, bytes);
  driver_.fill(from.data(), 1, bytes);
  double best = 0;
  for (int i = 0; i < kTimedCopies; ++i) {
    begin_.record(stream_.get());
    driver_.copy_on_device(to.data(), from.data(), bytes, stream_.get());
    end_.record(stream_.get());
    end_.synchronize();
    best = std::max(best, 2.0 * static_cast<double>(bytes) / end_.seconds_since(begin_) / 1e9);
  }
  return best;
}

// Of the fastest of some launches, each of which fills the device.
double GpuMeasuringDevice::tensor_tflops(const CompiledKernel& compiled) {
  const Loaded kernel(driver_, compiled);
  LaunchShape shape = kernel.shape;
  shape.blocks = static_cast<unsigned>(kTensorPeakBlocks * target_.multiprocessors);
  const Driver::Memory sums(driver_, sizeof(float) * shape.blocks * shape.threads);
  const TensorPeakParams params{static_cast<float*>(sums.data()), kTensorPeakIterations};
  const double flops = static_cast<double>(shape.blocks) * (shape.threads / 32) * kTensorPeakIterations *
                       kTensorPeakChains * kFlopsOfTensorInstruction;
  double best = 0;
  for (int i = 0; i < kTimedTensorLaunches; ++i) {
    begin_.record(stream_.get());
    driver_.require(driver_.launch(kernel.function, shape, stream_.get(), &params), "the launch");
    end_.record(stream_.get());
    end_.synchronize();
    best = std::max(best, flops / end_.seconds_since(begin_) / 1e12);
  }
  return best;
}

}  // namespace flash_attn_jit
