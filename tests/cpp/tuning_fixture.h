// Tuning records made up for tests.
#pragma once

#include <algorithm>
#include <map>
#include <string>
#include <vector>

#include "generator/legality.h"
#include "generator/render.h"
#include "runtime/tuner/record.h"
#include "runtime/tuner/template_digest.h"

namespace flash_attn_jit::testing {

inline TunedDevice made_up_device(const std::string& name = "Tesla T4") { return {name, 75, 40, "native"}; }

// A legal tile that no default table has for `spec`.
inline TileConfig unusual_tile(const KernelSpec& spec) {
  static std::map<KernelSpec, TileConfig> found;  // the tile space takes its time
  if (const auto known = found.find(spec); known != found.end()) return known->second;
  const std::vector<TileConfig> usual = default_tiles(spec);
  for (const TileConfig& tile : tile_space(spec, arch_limits(75)))
    if (std::find(usual.begin(), usual.end(), tile) == usual.end()) return found[spec] = tile;
  return {};
}

inline Candidate measured_candidate(const TileConfig& tile, double seconds, double spread = 0.01) {
  Candidate candidate;
  candidate.tile = tile;
  candidate.outcome = Outcome::kMeasured;
  candidate.predicted_seconds = seconds * 1.05;
  candidate.limited_by = "tensor";
  candidate.registers = 250;
  candidate.spill_stores = candidate.spill_loads = 0;
  candidate.threads = tile.threads();
  candidate.dynamic_smem = 57344;
  candidate.blocks_per_multiprocessor = 1;
  candidate.compile_seconds = 0.6;
  candidate.error = 4e-4;
  candidate.error_allowed = 2e-3;
  candidate.samples = {{0, seconds, 1590.0, 69.5, 61.0, {"sw_power_cap"}}, {1, seconds * (1 + spread), {}, {}, {}, {}}};
  candidate.median_seconds = seconds;
  candidate.low_seconds = seconds * (1 - spread);
  candidate.high_seconds = seconds * (1 + spread);
  return candidate;
}

// The winner is a tile that is no default. `when` is a day of 2026-11.
inline TuningRecord made_up_record_of(const KernelSpec& spec, std::int64_t seqlen_q, std::int64_t seqlen_k,
                                      const std::string& day = "27") {
  TuningRecord record;
  record.batch = 4;
  record.num_heads = 16;
  record.num_heads_k = 16 / spec.group_size;
  record.seqlen_q = seqlen_q;
  record.seqlen_k = seqlen_k;
  record.key.device = made_up_device();
  record.key.templates = template_digest(spec.kind, embedded_templates());
  record.key.problem = class_of(spec, record.measured_problem());
  record.environment = {"0.1.0", "12.4", "nvrtc 12.9", 70.0, 50.1, 240.0};
  record.when = "2026-11-" + day + "T08:00:00Z";
  record.seconds = 12.5;
  record.default_tile = default_tiles(spec).front();
  record.winner = unusual_tile(spec);
  record.rule = "lowest median, 4.1 % below the default's";
  record.rounds = 2;
  Candidate slow = measured_candidate(default_tiles(spec).back(), 1.5e-3);
  record.candidates = {measured_candidate(record.winner, 1.2e-3), measured_candidate(record.default_tile, 1.25e-3)};
  if (slow.tile != record.default_tile) record.candidates.push_back(slow);
  Candidate pruned;
  pruned.tile = {32, 8, 2, 16, {1, 2, 3}};
  pruned.outcome = Outcome::kPruned;
  pruned.reason = "predicted 2.1 times the best";
  pruned.predicted_seconds = 2.5e-3;
  record.candidates.push_back(pruned);
  record.others = {{"sdpa_efficient", 2.5e-3}};
  return record;
}

inline TuningRecord made_up_record(int head_dim = 64, std::int64_t seqlen = 1000, const std::string& day = "27") {
  KernelSpec spec;
  spec.head_dim = head_dim;
  return made_up_record_of(spec, seqlen, seqlen, day);
}

inline TuningRecord made_up_decode_record(std::int64_t seqlen_q = 1) {
  return made_up_record_of(parse_kernel_without_tile("decode hdim64 fp16 full gqa4 vec16"), seqlen_q, 4000);
}

// One that the model made: nothing ran.
inline TuningRecord predicted_record(int head_dim = 64, std::int64_t seqlen = 1000) {
  TuningRecord record = made_up_record(head_dim, seqlen);
  record.key.policy = {"model", "none"};
  for (Candidate& candidate : record.candidates) {
    if (candidate.outcome == Outcome::kMeasured) candidate.outcome = Outcome::kNotReached;
    candidate.samples.clear();
    candidate.median_seconds = candidate.low_seconds = candidate.high_seconds = std::nullopt;
  }
  return record;
}

}  // namespace flash_attn_jit::testing
