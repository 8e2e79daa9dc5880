#include "runtime/tuner/tuning.h"

#include <mutex>

#include "generator/legality.h"
#include "runtime/system/log.h"
#include "runtime/tuner/template_digest.h"

namespace flash_attn_jit {

Tuning::Tuning(const Settings& settings)
    : own_(settings.home, FolderUse::kCache),
      pack_(settings.pack ? std::make_unique<RecordStore>(*settings.pack, FolderUse::kPack) : nullptr),
      otherwise_(settings.otherwise) {
  for (const KernelKind kind : kKernelKinds)
    digests_[static_cast<std::size_t>(kind)] = template_digest(kind, settings.templates);
}

const TileChooser& Tuning::tiles_of(const TunedDevice& device) { return recorded_tiles(device); }

bool Tuning::has_measured(const TunedDevice& device, const ProblemClass& problem) {
  return recorded_tiles(device).has_measured(problem);
}

RecordedTiles& Tuning::recorded_tiles(const TunedDevice& device) {
  {
    const std::lock_guard guard(mutex_);
    if (const auto known = devices_.find(device); known != devices_.end()) return *known->second;
  }
  auto made = std::make_unique<RecordedTiles>(otherwise_);
  if (pack_)
    for (const TuningRecord& record : pack_->read(device)) use(*made, record, false);
  for (const TuningRecord& record : own_.read(device)) use(*made, record, true);
  const std::lock_guard guard(mutex_);
  return *devices_.try_emplace(device, std::move(made)).first->second;
}

void Tuning::publish(const TuningRecord& record) {
  // The device's chooser before the file: one that is made meanwhile may have read the folder too early.
  RecordedTiles& tiles = recorded_tiles(record.key.device);
  own_.publish(record);
  use(tiles, record, true);
}

void Tuning::use(RecordedTiles& tiles, const TuningRecord& record, bool own) const {
  if (!has_templates_in_use(record.key)) return;
  if (const auto reason = check_winner(record)) {
    warn_once("the tuning record of '" + record.key.problem.text() + "' for " + record.key.device.text() +
              " is passed over: " + *reason);
    return;
  }
  const bool is_measured = !record.key.policy.is_prediction();
  const Candidate* const winner = record.candidate(record.winner);
  const MeasuredTime time{is_measured && winner != nullptr ? winner->median_seconds.value_or(0) : 0,
                          record.measured_problem()};
  tiles.add(record.key.problem, record.winner, {is_measured, own, record.when}, time);
}

std::optional<std::string> check_winner(const TuningRecord& record) {
  KernelSpec spec = record.key.problem.spec;
  spec.tile = record.winner;
  if (!has_rows(spec, spec.tile, record.key.problem.seqlen_k))
    return "its winner has " + std::to_string(spec.tile.block_m) + " rows, fewer than the sequence";
  return check(spec, arch_limits(record.key.device.code == kTuringCode ? kOldestSm : record.key.device.sm));
}

}  // namespace flash_attn_jit
