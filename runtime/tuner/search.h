// The search for the fastest tile of one problem class.
//
// The default tile is compiled, checked and measured first; the others come in as the compiler finishes them, those
// that are likely to be fast before the others. Each is checked before it is measured. Then they take turns: a round is
// one burst of each in random order and one more in the reverse order, so that a clock that sinks evenly costs all the
// same. Candidates are compared by their ratios within the rounds that both were in. One that is told apart from the
// leader drops out; the search ends when all are told apart or tied, or with its budget, whose last part is for the
// best so far.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "runtime/tuner/record.h"
#include "runtime/tuner/search_parts.h"
#include "runtime/tuner/statistics.h"

namespace flash_attn_jit {

struct SearchSettings {
  double budget_seconds = 60;
  std::uint64_t seed = 1;
  double burst_seconds = 0.02;   // of one candidate, long beside the clock's steps
  double prune_factor = 1.4;     // beyond this many times the best prediction nothing is measured
  double hopeless_factor = 1.1;  // slower than the leader by this in every one of two rounds or more: out
  double publish_every_seconds = 30;
  TellingRule telling;
};

// What is searched for. All but the candidates, the winner and when: as the record shall have it.
struct SearchTask {
  TuningRecord record;            // key, environment, measured problem, default tile
  std::vector<TileConfig> tiles;  // the default first, then in the order to try without a model: tiles_to_try()
  int multiprocessors = 1;
  std::optional<TuningRecord> known;  // what was found before under the same key: not measured again
};

struct SearchResult {
  std::optional<TuningRecord> record;  // nothing where nothing could be measured before the end; `reason` says why
  std::string reason;
  bool settled = false;  // more time would change nothing
  bool interrupted = false;
  int newly_measured = 0;  // candidates
};

struct SearchParts {
  TuningClock& clock;
  CandidateCompiler& compiler;
  MeasuringDevice& device;
  const CandidateModel* model = nullptr;
  RecordSink* records = nullptr;  // gets the record when it is done, and what there is of it now and then
  SearchWatcher* watcher = nullptr;
};

// Runs until the ranking is settled, the budget ends or the user interrupts, which is no error here: what was measured
// is published and returned.
SearchResult search_tiles(const SearchTask& task, const SearchParts& parts, const SearchSettings& settings);

}  // namespace flash_attn_jit
