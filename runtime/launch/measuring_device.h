// Runs the candidates of one problem on a GPU: checks them and times them. It lives in a process of its own, which a
// candidate may take with it.
#pragma once

#include <map>
#include <memory>
#include <optional>
#include <vector>

#include "generator/kernel_family.h"
#include "runtime/cuda/driver.h"
#include "runtime/cuda/nvml.h"
#include "runtime/launch/case_memory.h"
#include "runtime/request/kernel_launch.h"
#include "runtime/tuner/reference.h"
#include "runtime/tuner/worker_protocol.h"

namespace flash_attn_jit {

class GpuMeasuringDevice final : public WorkerDevice {
 public:
  // Throws DriverError where the device's memory is too full, or what comes before the tuned kernel fails its check.
  GpuMeasuringDevice(Driver& driver, const WorkerSetup& setup);
  ~GpuMeasuringDevice() override;

  // The limits are another process's to watch.
  CheckedCandidate check(const CompiledCandidate& candidate, double limit_seconds) override;
  TimedBurst time(const CompiledCandidate& candidate, int launches, double limit_seconds) override;

  // A kernel ended with an error, after which the process can do nothing more on the device.
  bool is_broken() const override { return broken_; }

  WorkerFigures figures(const WorkerSetup& setup) override;

 private:
  struct Loaded;
  struct Result;
  struct Launch;
  struct Pass;
  class SplitMemory;

  Loaded& load(const CompiledCandidate& candidate, const AttentionCase& attention);
  std::vector<Pass> passes_of(Loaded& kernel, const CaseMemory& memory, const AttentionCase& attention,
                              const TileConfig& tile) const;
  int launch(const Loaded& kernel, const Pass& pass);
  void run_once(Loaded& kernel, const CaseMemory& memory, const AttentionCase& attention, const TileConfig& tile);
  Result result_of(const CaseMemory& memory, const AttentionCase& attention) const;
  void prepare_small();
  void prepare_small_backward();
  void prepare_small_reference();
  void prepare_whole(const EarlierKernels& earlier);
  WorstError check_small(const Result& result) const;
  std::optional<std::string> check_rows(const AttentionCase& attention, const Result& result) const;
  std::optional<std::string> check_sampled_rows(const AttentionCase& attention, const Result& result,
                                                RowSide side) const;
  std::optional<std::string> compare_whole(const Result& result) const;
  GpuState gpu_state() const;
  double copied_gigabytes();
  double tensor_tflops(const CompiledKernel& compiled);

  Driver& driver_;
  DeviceFigures figures_;
  PlanTarget target_;
  CudaContext context_;
  Driver::CurrentContext current_;
  Driver::Stream stream_;
  Driver::Event begin_, end_;
  std::unique_ptr<Nvml> nvml_;
  std::string nvml_absence_;
  AttentionCase attention_, small_;
  CaseNumbers numbers_;
  CaseReference small_reference_;
  std::unique_ptr<CaseMemory> small_memory_, whole_memory_;
  std::vector<float> whole_lse_, whole_delta_, small_lse_, small_delta_;  // what gradients are given
  // What float64 makes of the small problem: the rows of what the kernel writes; lse or delta.
  struct ReferenceRows {
    std::vector<ReferenceRow> out, dq, dk, dv;
  } small_rows_;
  std::vector<double> small_statistics_, small_statistic_bounds_;
  std::map<std::pair<KernelKind, TileConfig>, std::unique_ptr<Loaded>> loaded_;
  std::unique_ptr<Loaded> combine_;       // of the decode kernel's splits
  std::unique_ptr<Result> right_result_;  // of a candidate that was checked
  std::size_t next_launch_ = 0;
  bool broken_ = false;
};

}  // namespace flash_attn_jit
