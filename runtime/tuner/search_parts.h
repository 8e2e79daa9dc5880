// What a search works with: a clock, a compiler, a device, a model, somewhere to put records. On a GPU and in tests
// they are different ones behind the same search.
#pragma once

#include <optional>
#include <string>

#include "runtime/compile/compiled_kernel.h"
#include "runtime/tuner/record.h"

namespace flash_attn_jit {

class TuningClock {
 public:
  virtual ~TuningClock() = default;
  virtual double now() = 0;            // seconds since some time
  virtual std::string utc_time() = 0;  // "2026-11-27T08:00:00Z"
};

struct CompiledCandidate {
  TileConfig tile;
  std::optional<CompiledKernel> kernel;  // nothing: `failure` says why
  std::string failure;
};

// Compiles on threads of its own.
class CandidateCompiler {
 public:
  virtual ~CandidateCompiler() = default;
  virtual int most_at_once() const = 0;
  virtual void start(const KernelSpec& spec) = 0;
  // One that is done, in any order; where none is, waits so long for one. Throws Interrupted.
  virtual std::optional<CompiledCandidate> next(double wait_seconds) = 0;
};

struct Prediction {
  double seconds = 0;      // of a launch
  std::string limited_by;  // "tensor", "lsu", "xu", "issue", ...
};

// Knows of kernels that nobody has run how long they take.
class CandidateModel {
 public:
  virtual ~CandidateModel() = default;
  // `kernel` is null where it is not compiled yet. Nothing where the model cannot tell.
  virtual std::optional<Prediction> predict(const KernelSpec& spec, const Problem& problem,
                                            const CompiledKernel* kernel) const = 0;
};

// Why a candidate is out: kLaunchFailed, kWrongResult, kTimedOut or kCrashed, and in words.
struct CandidateFault {
  Outcome outcome = Outcome::kLaunchFailed;
  std::string reason;
};

struct CheckedCandidate {
  std::optional<CandidateFault> fault;
  std::optional<double> error, error_allowed;  // on the small problem
  int blocks_per_multiprocessor = 0;
};

struct TimedBurst {
  std::optional<CandidateFault> fault;
  Sample sample;  // its round is the search's to say
};

// Runs candidates of one problem, and outlives those that hang or crash. What ends the search, such as a card without
// memory, is thrown as Error; Interrupted where the user asks to stop.
class MeasuringDevice {
 public:
  virtual ~MeasuringDevice() = default;

  // Against float64 on a small problem, and by tolerance at full size. The first one that is right is what others are
  // compared with at full size.
  virtual CheckedCandidate check(const CompiledCandidate& candidate, double limit_seconds) = 0;

  // One burst of launches of a candidate that was checked.
  virtual TimedBurst time(const CompiledCandidate& candidate, int launches, double limit_seconds) = 0;
};

class RecordSink {
 public:
  virtual ~RecordSink() = default;
  virtual void publish(const TuningRecord& record) = 0;
};

// What a search is doing, for a progress bar.
struct SearchProgress {
  const char* doing = "";  // "compiling", "checking", "warming up", "measuring"
  TileConfig tile;
  std::optional<TileConfig> leader;
  double leader_seconds = 0, default_seconds = 0;  // 0: not known yet
  int decided = 0, candidates = 0;                 // those that are out or told apart, of all
  int round = 0;
  double seconds = 0, budget_seconds = 0;
};

class SearchWatcher {
 public:
  virtual ~SearchWatcher() = default;
  virtual void show(const SearchProgress& progress) = 0;
};

}  // namespace flash_attn_jit
