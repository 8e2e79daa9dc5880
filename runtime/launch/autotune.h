// Tunes the problems of this process's launches as they come, before the first launch of each, while it is asked to.
#pragma once

#include <atomic>
#include <functional>
#include <mutex>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "runtime/launch/tune_session.h"
#include "runtime/request/backward.h"
#include "runtime/request/forward.h"

namespace flash_attn_jit {

struct AutotuneSettings {
  std::vector<std::string> worker_command;  // as of TuneSettings
  std::string driver;
  double budget_seconds = 600;  // for all that is met
  double seconds_each = 60;     // for a problem at the most
};

// Thread-safe. One problem is tuned at a time: two would disturb each other, and a second thread waits.
class Autotuner {
 public:
  explicit Autotuner(Tuning& tuning) : tuning_(tuning) {}

  // Throws ArgumentError where it has begun already.
  void begin(AutotuneSettings settings);
  // Returns what found() does.
  std::vector<TunedProblem> end();
  bool is_on() const { return is_on_.load(std::memory_order_relaxed); }

  // Tunes the classes of the request's kernels that no record decides yet. What cannot be tuned is warned of, once, and
  // left as it is: in stream capture, without budget, on a full card. Throws Interrupted, and what planning throws.
  void meet(Device& device, const ForwardRequest& request, StreamHandle stream);
  void meet(Device& device, const BackwardRequest& request, StreamHandle stream);

  // A call that the interpreter runs.
  void meet_interpreted();

  // What was met since begin() and had no record, in order: with what tuning found, or the reason why it was left.
  std::vector<TunedProblem> found() const;

 private:
  using Key = std::pair<TunedDevice, ProblemClass>;
  template <class Params>
  void meet(Device& device, const KernelLaunch<Params>& launch, const AttentionCase& sizes, StreamHandle stream);
  void tune_in_turn(Device& device, const Key& key, const AttentionCase& attention, StreamHandle stream);
  SearchResult tune_one(Device& device, const AttentionCase& attention, StreamHandle stream);
  void leave(const Key& key, const AttentionCase& attention, const std::string& reason);
  void keep(const Key& key, TunedProblem tuned);
  bool is_done(const Key& key) const;

  Tuning& tuning_;
  std::atomic<bool> is_on_ = false;
  std::mutex turn_;           // held while a problem is tuned
  mutable std::mutex mutex_;  // guards what is below
  AutotuneSettings settings_;
  double spent_seconds_ = 0;
  std::set<Key> done_;  // tuned, or given up for good
  std::vector<std::pair<Key, TunedProblem>> found_;
};

}  // namespace flash_attn_jit
