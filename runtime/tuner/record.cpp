#include "runtime/tuner/record.h"

#include <algorithm>

namespace flash_attn_jit {

std::string TunedDevice::text() const {
  return name + " (sm_" + std::to_string(sm) + ", " + std::to_string(multiprocessors) + " multiprocessors" +
         (code == kNativeCode ? "" : ", " + code) + ")";
}

std::string_view to_text(Outcome outcome) {
  switch (outcome) {
    case Outcome::kMeasured:
      return "measured";
    case Outcome::kPruned:
      return "pruned";
    case Outcome::kCompileFailed:
      return "compile failed";
    case Outcome::kLaunchFailed:
      return "launch failed";
    case Outcome::kWrongResult:
      return "wrong result";
    case Outcome::kTimedOut:
      return "timed out";
    case Outcome::kCrashed:
      return "crashed";
    case Outcome::kNotReached:
      return "not reached";
  }
  return {};
}

const Candidate* TuningRecord::candidate(const TileConfig& tile) const {
  const auto found = std::find_if(candidates.begin(), candidates.end(),
                                  [&](const Candidate& candidate) { return candidate.tile == tile; });
  return found == candidates.end() ? nullptr : &*found;
}

}  // namespace flash_attn_jit
