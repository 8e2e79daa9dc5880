// What tuning found for one problem class on one device: every candidate, how it was measured, and which tile won.
#pragma once

#include <array>
#include <compare>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "generator/kernel_spec.h"
#include "generator/tile_chooser.h"
#include "runtime/tuner/problem_class.h"

namespace flash_attn_jit {

inline constexpr std::string_view kNativeCode = "native", kTuringCode = "compute_75";

// The device a record is for. Two cards of one model are one device.
struct TunedDevice {
  std::string name;  // "Tesla T4"
  int sm = 0;        // compute capability x 10
  int multiprocessors = 0;
  std::string code = std::string(kNativeCode);  // what it is asked to run: that, or kTuringCode

  std::string text() const;  // "Tesla T4 (sm_75, 40 multiprocessors)", and the code where it is not its own

  friend auto operator<=>(const TunedDevice&, const TunedDevice&) = default;
};

inline constexpr std::string_view kModelTimer = "model";

// How candidates were timed. Figures of different policies are not compared.
struct MeasurementPolicy {
  std::string timer = "events";       // around bursts of launches; kModelTimer: predicted, nothing ran
  std::string l2 = "rotated inputs";  // each launch of a burst reads others, past the L2

  bool is_prediction() const { return timer == kModelTimer; }

  friend auto operator<=>(const MeasurementPolicy&, const MeasurementPolicy&) = default;
};

// A record's whole key. One of other templates is kept and not used.
struct RecordKey {
  TunedDevice device;
  std::string templates;  // SHA-256 of the family's templates, hex
  ProblemClass problem;
  MeasurementPolicy policy;

  friend auto operator<=>(const RecordKey&, const RecordKey&) = default;
};

// What may differ from where a record is used: it is used all the same, and the report says what differs.
struct TuningEnvironment {
  std::string library;  // this library's version
  std::string driver;   // "12.4"
  std::string nvrtc;    // "nvrtc 12.9", as of a kernel's built_by
  std::optional<double> power_limit_watts;
  std::optional<double> peak_tflops;     // measured: tensor instructions of the kernels' kind alone, whole device
  std::optional<double> peak_gigabytes;  // a second from DRAM, measured

  friend bool operator==(const TuningEnvironment&, const TuningEnvironment&) = default;
};

enum class Outcome {
  kMeasured,
  kPruned,  // the model says that it cannot win
  kCompileFailed,
  kLaunchFailed,  // the driver refused it, or the kernel ended with an error
  kWrongResult,
  kTimedOut,
  kCrashed,     // it took the child process with it
  kNotReached,  // the budget ended before it
};
inline constexpr std::array kOutcomes = {Outcome::kMeasured,     Outcome::kPruned,      Outcome::kCompileFailed,
                                         Outcome::kLaunchFailed, Outcome::kWrongResult, Outcome::kTimedOut,
                                         Outcome::kCrashed,      Outcome::kNotReached};
std::string_view to_text(Outcome);  // "measured", "compile failed"

// One burst of launches.
struct Sample {
  int round = 0;
  double seconds = 0;  // a launch; of the decode kernel, with what puts its splits together
  std::optional<double> clock_mhz, power_watts, temperature_celsius;
  std::vector<std::string> throttled_by;  // NVML's reasons: "sw_power_cap", ...
};

struct Candidate {
  TileConfig tile;
  Outcome outcome = Outcome::kNotReached;
  std::string reason;  // why it was not measured, in words
  std::optional<double> predicted_seconds;
  std::string limited_by;  // of the model: "tensor", "lsu", "xu", "issue", ...; empty: not known
  std::optional<int> registers, spill_stores, spill_loads;
  int threads = 0, static_smem = 0, dynamic_smem = 0;
  int blocks_per_multiprocessor = 0;
  std::optional<double> compile_seconds;
  std::optional<double> error, error_allowed;  // maximum against float64, on a small problem
  std::vector<Sample> samples;
  std::optional<double> median_seconds, low_seconds,
      high_seconds;  // of the samples; the interval of the median at 95 %
};

struct TuningRecord {
  RecordKey key;
  TuningEnvironment environment;
  // The problem that was measured, one of its class.
  std::int64_t batch = 0, num_heads = 0, num_heads_k = 0, seqlen_q = 0, seqlen_k = 0;
  std::int64_t window_left = -1, window_right = -1;  // where the mask is a window; negative: without end
  std::string when;                                  // UTC, "2026-11-27T08:00:00Z"
  double seconds = 0;                                // that tuning took
  TileConfig default_tile, winner;
  std::string rule;  // why the winner won, in words
  int rounds = 0;
  std::vector<Candidate> candidates;  // the default is one of them
  // What PyTorch's own attention takes for the same pass and problem, where it was measured: "sdpa_efficient", seconds.
  std::vector<std::pair<std::string, double>> others;

  Problem measured_problem() const { return {seqlen_q, seqlen_k, batch * num_heads, key.device.multiprocessors}; }

  // Null where the tile is none of the candidates.
  const Candidate* candidate(const TileConfig& tile) const;
};

}  // namespace flash_attn_jit
