// A measuring device in a process of its own, which candidates may take with them: it is started again then.
#pragma once

#include <memory>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "runtime/system/subprocess.h"
#include "runtime/tuner/worker_protocol.h"

namespace flash_attn_jit {

class IsolatedDevice final : public MeasuringDevice {
 public:
  // `command` starts the process that serves tuning; it is started when first needed.
  IsolatedDevice(std::vector<std::string> command, WorkerSetup setup)
      : command_(std::move(command)), setup_(std::move(setup)) {}

  // Throw Error where the process cannot measure at all, and says why.
  CheckedCandidate check(const CompiledCandidate& candidate, double limit_seconds) override;
  TimedBurst time(const CompiledCandidate& candidate, int launches, double limit_seconds) override;

  // As the process told when it was started.
  const WorkerFigures& figures() const { return figures_; }
  int times_started() const { return times_started_; }

 private:
  struct Told {
    std::optional<CandidateFault> fault;
    WorkerReply reply;
  };
  template <class MakeLine>
  Told ask(const CompiledCandidate& candidate, double limit_seconds, const MakeLine& make_line);
  std::optional<CandidateFault> start(double limit_seconds);
  CandidateFault fault_of(const Conversation::Answer& answer);

  std::vector<std::string> command_;
  WorkerSetup setup_;
  std::unique_ptr<Conversation> process_;
  std::set<TileConfig> sent_;  // to this process
  WorkerFigures figures_;
  int times_started_ = 0;
};

}  // namespace flash_attn_jit
