// What the process that searches and the one that measures say to each other: a line of JSON each, asked and answered.
#pragma once

#include <functional>
#include <iosfwd>
#include <memory>
#include <optional>
#include <string>

#include "runtime/tuner/attention_case.h"
#include "runtime/tuner/search_parts.h"

namespace flash_attn_jit {

// The default kernels of what comes before the one that is tuned: a gradient's needs both, the preprocess kernel the
// first.
struct EarlierKernels {
  std::optional<CompiledCandidate> forward, preprocess;
};

// The first thing that is said.
struct WorkerSetup {
  AttentionCase attention;
  int device = 0;
  EarlierKernels earlier;
  bool measures_memory = false;                   // its bandwidth
  std::optional<CompiledKernel> tensor_kernel;    // render_tensor_peak()'s; it is timed where it is given
  std::optional<CompiledCandidate> combine = {};  // behind the decode kernel: what puts its splits together
};

struct WorkerFigures {
  std::optional<double> power_limit_watts, gigabytes, tflops;
  std::string unknown_state;  // not empty: why clock, power and temperature are not known
};

struct WorkerReply {
  std::string error;         // not empty: nothing can be measured, and why
  bool is_broken = false;    // the process is no longer of use
  WorkerFigures figures;     // of a setup
  CheckedCandidate checked;  // of a check
  TimedBurst burst;          // of a time
};

std::string setup_line(const WorkerSetup& setup);
// A kernel goes along once: the other side keeps it.
std::string check_line(const CompiledCandidate& candidate, bool with_kernel);
std::string time_line(const CompiledCandidate& candidate, bool with_kernel, int launches);
// Throws Error for what is no reply.
WorkerReply parse_reply(const std::string& line);

// The other side. It is one device's for one problem.
class WorkerDevice : public MeasuringDevice {
 public:
  virtual bool is_broken() const = 0;
  virtual WorkerFigures figures(const WorkerSetup& setup) = 0;
};
using MakeWorkerDevice = std::function<std::unique_ptr<WorkerDevice>(const WorkerSetup&)>;

// Answers until `in` ends or the device is broken.
void serve_tuning(std::istream& in, std::ostream& out, const MakeWorkerDevice& make_device);

}  // namespace flash_attn_jit
