// Tunes problems on a device of this machine, one after the other, and keeps what it finds.
#pragma once

#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "generator/kernel_spec.h"
#include "runtime/launch/loaded_kernels.h"
#include "runtime/launch/tuned_problem.h"
#include "runtime/system/config.h"
#include "runtime/tuner/attention_case.h"
#include "runtime/tuner/search.h"
#include "runtime/tuner/tuning.h"

namespace flash_attn_jit {

// One problem in each class that `cases` fall into, the first that does, of those that a tile is for.
std::vector<AttentionCase> one_of_each_class(const std::vector<AttentionCase>& cases, int multiprocessors);

struct TuneSettings {
  std::vector<std::string> worker_command;  // starts the process that measures
  std::string driver;                       // its version, as records have it: "12.4"
  double budget_seconds = 600;              // for all problems together
  bool afresh = false;                      // what is known is measured again
  // Each may be empty. What `begin` returns watches the search; it may be null.
  std::function<SearchWatcher*(const AttentionCase&)> begin;
  std::function<void(const TunedProblem&)> tuned;
};

// Throws ConfigError where compiling is forbidden: every candidate that is not in the cache would be recorded as one
// that does not compile.
void refuse_offline(const Config& settings);

// Stops early, with what it has, where the budget ends or the user interrupts. Throws Error where nothing can be
// measured at all: no process, a full card.
std::vector<TunedProblem> tune(Device& device, Tuning& tuning, const std::vector<AttentionCase>& cases,
                               const TuneSettings& settings);

}  // namespace flash_attn_jit
