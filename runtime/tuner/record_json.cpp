#include "runtime/tuner/record_json.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <set>

#include "generator/families/families.h"
#include "generator/legality.h"

namespace flash_attn_jit {
namespace {

using Json = nlohmann::json;
using OrderedJson = nlohmann::ordered_json;

constexpr const char* kRecordFormat = "flash-attn-jit tuning record";

// Bounds of what a reader takes. Numbers are below 2^53, so that they are the same whether they are written with a
// fraction or without.
constexpr std::size_t kMostWord = 256, kMostReason = 16 << 10;  // bytes
constexpr std::size_t kMostCandidates = 4096, kMostSamples = 4096, kMostOthers = 64, kMostThrottles = 32;
constexpr std::int64_t kMostSize = std::int64_t{1} << 31;
constexpr int kMostInt = std::numeric_limits<int>::max();
constexpr double kLeastSeconds = 1e-12, kMostSeconds = 1e9, kMostMeasure = 1e12;

OrderedJson word(std::string_view text) { return made_plain(text, kMostWord); }
OrderedJson sentence(std::string_view text) { return made_plain(text, kMostReason); }

// What is not finite is not known: JSON has no word for it.
OrderedJson number_json(double number) { return std::isfinite(number) ? OrderedJson(number) : OrderedJson(); }

OrderedJson or_null(const std::optional<double>& number) { return number ? number_json(*number) : OrderedJson(); }
OrderedJson or_null(const std::optional<int>& number) { return number ? OrderedJson(*number) : OrderedJson(); }

OrderedJson environment_json(const TuningEnvironment& environment) {
  return {{"library", word(environment.library)},
          {"driver", word(environment.driver)},
          {"nvrtc", word(environment.nvrtc)},
          {"power_limit_watts", or_null(environment.power_limit_watts)},
          {"peak_tflops", or_null(environment.peak_tflops)},
          {"peak_gigabytes", or_null(environment.peak_gigabytes)}};
}

OrderedJson measured_json(const TuningRecord& record) {
  return {{"batch", record.batch},
          {"num_heads", record.num_heads},
          {"num_heads_k", record.num_heads_k},
          {"seqlen_q", record.seqlen_q},
          {"seqlen_k", record.seqlen_k},
          {"window_left", record.window_left},
          {"window_right", record.window_right}};
}

OrderedJson sample_json(const Sample& sample) {
  OrderedJson throttled_by = OrderedJson::array();
  for (const std::string& reason : sample.throttled_by) throttled_by.push_back(word(reason));
  return {{"round", sample.round},
          {"seconds", number_json(sample.seconds)},
          {"clock_mhz", or_null(sample.clock_mhz)},
          {"power_watts", or_null(sample.power_watts)},
          {"temperature_celsius", or_null(sample.temperature_celsius)},
          {"throttled_by", std::move(throttled_by)}};
}

OrderedJson candidate_json(const Candidate& candidate) {
  OrderedJson samples = OrderedJson::array();
  for (const Sample& sample : candidate.samples) samples.push_back(sample_json(sample));
  return {{"tile", candidate.tile.text()},
          {"outcome", to_text(candidate.outcome)},
          {"reason", sentence(candidate.reason)},
          {"predicted_seconds", or_null(candidate.predicted_seconds)},
          {"limited_by", word(candidate.limited_by)},
          {"registers", or_null(candidate.registers)},
          {"spill_stores", or_null(candidate.spill_stores)},
          {"spill_loads", or_null(candidate.spill_loads)},
          {"threads", candidate.threads},
          {"static_smem", candidate.static_smem},
          {"dynamic_smem", candidate.dynamic_smem},
          {"blocks_per_multiprocessor", candidate.blocks_per_multiprocessor},
          {"compile_seconds", or_null(candidate.compile_seconds)},
          {"error", or_null(candidate.error)},
          {"error_allowed", or_null(candidate.error_allowed)},
          {"samples", std::move(samples)},
          {"median_seconds", or_null(candidate.median_seconds)},
          {"low_seconds", or_null(candidate.low_seconds)},
          {"high_seconds", or_null(candidate.high_seconds)}};
}

// Reads a text with `parse`, whose own text it has to be.
template <class Parse, class Text>
auto parsed(JsonObject& object, std::string_view key, const Parse& parse, const Text& text_of) {
  const std::string text = object.text(key, kMostWord);
  try {
    auto value = parse(text);
    if (text_of(value) == text) return value;
    object.refuse(key, "'" + text_of(value) + "'");
  } catch (const SpecError& error) {
    throw RecordError(object.where(key) + ": " + error.what());
  }
}

TileConfig tile_at(JsonObject& object, std::string_view key) {
  return parsed(object, key, TileConfig::parse, [](const TileConfig& tile) { return tile.text(); });
}

TunedDevice read_device(JsonObject object) {
  TunedDevice device;
  device.name = object.text("name", kMostWord);
  if (device.name.empty()) object.refuse("name", "a device's name");
  device.sm = static_cast<int>(object.integer("sm", kOldestSm, 999));
  device.multiprocessors = static_cast<int>(object.integer("multiprocessors", 1, 1 << 20));
  device.code = object.text("code", kMostWord);
  if (device.code != kNativeCode && device.code != kTuringCode)
    object.refuse("code", std::string(kNativeCode) + ", " + std::string(kTuringCode));
  object.end();
  return device;
}

std::int64_t bucket_at(JsonObject& object, std::string_view key, const Buckets& buckets) {
  const std::int64_t end = object.integer(key, buckets.least, buckets.greatest);
  if (buckets.of(end) != end) object.refuse(key, "a bucket's upper end, a power of two");
  return end;
}

ProblemClass read_problem(JsonObject object) {
  ProblemClass problem;
  problem.spec = parsed(object, "kernel", parse_kernel_without_tile,
                        [](const KernelSpec& spec) { return ProblemClass{.spec = spec}.kernel(); });
  if (problem.spec.head_dim < 1 || problem.spec.head_dim > kMostHeadDim)
    object.refuse("kernel", "head dims " + accepted_head_dims());
  if (problem.spec.group_size < 1) object.refuse("kernel", "group sizes (gqa) of 1 or more");
  if (normalized(problem.spec) != problem.spec)
    object.refuse("kernel", "'" + ProblemClass{.spec = normalized(problem.spec)}.kernel() + "', one for all masks");
  problem.seqlen_q = bucket_at(object, "seqlen_q", query_buckets(problem.spec));
  problem.seqlen_k = bucket_at(object, "seqlen_k", kSeqlenBuckets);
  problem.batch_heads = bucket_at(object, "batch_heads", kBatchHeadsBuckets);
  object.end();
  return problem;
}

RecordKey read_key(JsonObject object) {
  RecordKey key;
  key.device = read_device(object.object("device"));
  key.templates = object.text("templates", kMostWord);
  if (key.templates.size() != 64 || key.templates.find_first_not_of("0123456789abcdef") != std::string::npos)
    object.refuse("templates", "a SHA-256 in hex");
  key.problem = read_problem(object.object("problem"));
  JsonObject policy = object.object("policy");
  key.policy.timer = policy.text("timer", kMostWord);
  key.policy.l2 = policy.text("l2", kMostWord);
  policy.end();
  object.end();
  return key;
}

TuningEnvironment read_environment(JsonObject object) {
  TuningEnvironment environment;
  environment.library = object.text("library", kMostWord);
  environment.driver = object.text("driver", kMostWord);
  environment.nvrtc = object.text("nvrtc", kMostWord);
  environment.power_limit_watts = object.number_or_null("power_limit_watts", 1e-3, kMostMeasure);
  environment.peak_tflops = object.number_or_null("peak_tflops", 1e-6, kMostMeasure);
  environment.peak_gigabytes = object.number_or_null("peak_gigabytes", 1e-6, kMostMeasure);
  object.end();
  return environment;
}

void read_measured(JsonObject object, TuningRecord& record) {
  record.batch = object.integer("batch", 0, kMostSize);
  record.num_heads = object.integer("num_heads", 1, kMostSize);
  record.num_heads_k = object.integer("num_heads_k", 1, kMostSize);
  record.seqlen_q = object.integer("seqlen_q", 0, kMostSize);
  record.seqlen_k = object.integer("seqlen_k", 0, kMostSize);
  record.window_left = object.integer("window_left", -1, kMostSize);
  record.window_right = object.integer("window_right", -1, kMostSize);
  object.end();
  const KernelSpec& spec = record.key.problem.spec;
  if (family_of(spec.kind).reads_mask && record.num_heads != record.num_heads_k * spec.group_size)
    object.refuse("num_heads", "num_heads_k times the kernel's group size");
  if (class_of(spec, record.measured_problem()) != record.key.problem)
    throw RecordError("measured has another class than key.problem: " +
                      class_of(spec, record.measured_problem()).text());
}

Sample read_sample(JsonObject object) {
  Sample sample;
  sample.round = static_cast<int>(object.integer("round", 0, kMostInt));
  sample.seconds = object.number("seconds", kLeastSeconds, kMostSeconds);
  sample.clock_mhz = object.number_or_null("clock_mhz", 0, kMostMeasure);
  sample.power_watts = object.number_or_null("power_watts", 0, kMostMeasure);
  sample.temperature_celsius = object.number_or_null("temperature_celsius", -300, kMostMeasure);
  const std::string where = object.where("throttled_by");
  for (const Json& reason : object.array("throttled_by", kMostThrottles))
    sample.throttled_by.push_back(text_in(reason, where, kMostWord));
  object.end();
  return sample;
}

Outcome outcome_at(JsonObject& object) {
  const std::string text = object.text("outcome", kMostWord);
  std::string accepted;
  for (const Outcome outcome : kOutcomes) {
    if (text == to_text(outcome)) return outcome;
    accepted += (accepted.empty() ? "" : ", ") + std::string(to_text(outcome));
  }
  object.refuse("outcome", accepted);
}

// The median with its interval: all or nothing.
void read_times(JsonObject& object, Candidate& candidate) {
  candidate.median_seconds = object.number_or_null("median_seconds", kLeastSeconds, kMostSeconds);
  candidate.low_seconds = object.number_or_null("low_seconds", kLeastSeconds, kMostSeconds);
  candidate.high_seconds = object.number_or_null("high_seconds", kLeastSeconds, kMostSeconds);
  const bool has_median = candidate.median_seconds.has_value();
  if (has_median != candidate.low_seconds.has_value() || has_median != candidate.high_seconds.has_value())
    object.refuse("median_seconds", "null where low_seconds or high_seconds is, and only there");
  if (has_median != (candidate.outcome == Outcome::kMeasured))
    object.refuse("median_seconds", "a number where the outcome is 'measured', and only there");
  if (has_median && !(*candidate.low_seconds <= *candidate.median_seconds))
    object.refuse("low_seconds", "at most median_seconds");
  if (has_median && !(*candidate.median_seconds <= *candidate.high_seconds))
    object.refuse("high_seconds", "at least median_seconds");
}

Candidate read_candidate(JsonObject object) {
  Candidate candidate;
  candidate.tile = tile_at(object, "tile");
  candidate.outcome = outcome_at(object);
  candidate.reason = object.text("reason", kMostReason);
  candidate.predicted_seconds = object.number_or_null("predicted_seconds", kLeastSeconds, kMostSeconds);
  candidate.limited_by = object.text("limited_by", kMostWord);
  candidate.registers = object.integer_or_null("registers", 0, kMostInt);
  candidate.spill_stores = object.integer_or_null("spill_stores", 0, kMostInt);
  candidate.spill_loads = object.integer_or_null("spill_loads", 0, kMostInt);
  candidate.threads = static_cast<int>(object.integer("threads", 0, kMostInt));
  candidate.static_smem = static_cast<int>(object.integer("static_smem", 0, kMostInt));
  candidate.dynamic_smem = static_cast<int>(object.integer("dynamic_smem", 0, kMostInt));
  candidate.blocks_per_multiprocessor = static_cast<int>(object.integer("blocks_per_multiprocessor", 0, kMostInt));
  candidate.compile_seconds = object.number_or_null("compile_seconds", 0, kMostSeconds);
  candidate.error = object.number_or_null("error", 0, kMostMeasure);
  candidate.error_allowed = object.number_or_null("error_allowed", 0, kMostMeasure);
  const Json& samples = object.array("samples", kMostSamples);
  for (std::size_t i = 0; i < samples.size(); ++i)
    candidate.samples.push_back(read_sample({samples[i], object.where("samples[" + std::to_string(i) + "]")}));
  read_times(object, candidate);
  object.end();
  return candidate;
}

void read_candidates(JsonObject& object, TuningRecord& record) {
  const Json& candidates = object.array("candidates", kMostCandidates);
  std::set<TileConfig> tiles;
  for (std::size_t i = 0; i < candidates.size(); ++i) {
    const std::string where = object.where("candidates[" + std::to_string(i) + "]");
    record.candidates.push_back(read_candidate({candidates[i], where}));
    if (!tiles.insert(record.candidates.back().tile).second)
      throw RecordError(where + ".tile is " + record.candidates.back().tile.text() + ", which came before");
  }
}

void read_choice(JsonObject& object, TuningRecord& record) {
  record.default_tile = tile_at(object, "default");
  record.winner = tile_at(object, "winner");
  if (record.candidate(record.default_tile) == nullptr) object.refuse("default", "the tile of a candidate");
  const Candidate* const winner = record.candidate(record.winner);
  if (winner == nullptr) object.refuse("winner", "the tile of a candidate");
  const bool was_measured = winner->outcome == Outcome::kMeasured;
  const bool is_predicted = winner->outcome == Outcome::kNotReached && winner->predicted_seconds.has_value();
  if (!was_measured && !(record.key.policy.is_prediction() && is_predicted))
    object.refuse("winner",
                  "a candidate that was measured or, where policy.timer is 'model', not reached but predicted");
}

}  // namespace

bool is_utc(std::string_view text) {
  constexpr std::string_view kPattern = "dddd-dd-ddTdd:dd:ddZ";
  if (text.size() != kPattern.size()) return false;
  for (std::size_t i = 0; i < text.size(); ++i)
    if (kPattern[i] == 'd' ? text[i] < '0' || text[i] > '9' : text[i] != kPattern[i]) return false;
  return true;
}

OrderedJson key_json(const RecordKey& key) {
  return {{"device",
           {{"name", word(key.device.name)},
            {"sm", key.device.sm},
            {"multiprocessors", key.device.multiprocessors},
            {"code", key.device.code}}},
          {"templates", key.templates},
          {"problem",
           {{"kernel", key.problem.kernel()},
            {"seqlen_q", key.problem.seqlen_q},
            {"seqlen_k", key.problem.seqlen_k},
            {"batch_heads", key.problem.batch_heads}}},
          {"policy", {{"timer", word(key.policy.timer)}, {"l2", word(key.policy.l2)}}}};
}

OrderedJson record_json(const TuningRecord& record) {
  OrderedJson candidates = OrderedJson::array();
  for (const Candidate& candidate : record.candidates) candidates.push_back(candidate_json(candidate));
  OrderedJson others = OrderedJson::object();
  for (const auto& [name, seconds] : record.others) others[made_plain(name, kMostWord)] = number_json(seconds);
  return {{"format", kRecordFormat},
          {"version", kRecordVersion},
          {"key", key_json(record.key)},
          {"environment", environment_json(record.environment)},
          {"measured", measured_json(record)},
          {"when", record.when},
          {"seconds", number_json(record.seconds)},
          {"default", record.default_tile.text()},
          {"winner", record.winner.text()},
          {"rule", sentence(record.rule)},
          {"rounds", record.rounds},
          {"candidates", std::move(candidates)},
          {"others", std::move(others)}};
}

std::string record_text(const TuningRecord& record) {
  std::string text;
  const OrderedJson json = record_json(record);
  for (const auto& [key, value] : json.items()) {
    text += (text.empty() ? "{\n" : ",\n") + OrderedJson(key).dump() + ": ";
    if (key != "candidates" || value.empty()) {
      text += value.dump();
      continue;
    }
    const char* before = "[\n ";
    for (const OrderedJson& candidate : value) {
      text += before + candidate.dump();
      before = ",\n ";
    }
    text += "]";
  }
  return text + "}\n";
}

TuningRecord record_of(const Json& json) {
  JsonObject object(json, "");
  if (object.text("format", kMostWord) != kRecordFormat)
    object.refuse("format", "'" + std::string(kRecordFormat) + "'");
  object.integer("version", kRecordVersion, kRecordVersion);
  TuningRecord record;
  record.key = read_key(object.object("key"));
  record.environment = read_environment(object.object("environment"));
  read_measured(object.object("measured"), record);
  record.when = object.text("when", kMostWord);
  if (!is_utc(record.when)) object.refuse("when", "a time like 2026-11-27T08:00:00Z");
  record.seconds = object.number("seconds", 0, kMostSeconds);
  read_candidates(object, record);
  read_choice(object, record);
  record.rule = object.text("rule", kMostReason);
  record.rounds = static_cast<int>(object.integer("rounds", 0, kMostInt));
  JsonObject others = object.object("others");
  if (object.at("others").size() > kMostOthers)
    throw RecordError("others has more than " + std::to_string(kMostOthers) + " elements");
  for (const auto& [name, seconds] : object.at("others").items())
    record.others.emplace_back(text_in(Json(name), "the name in others", kMostWord),
                               others.number(name, kLeastSeconds, kMostSeconds));
  object.end();
  return record;
}

TuningRecord parse_record(std::string_view text) {
  if (text.size() > kMostRecordBytes)
    throw RecordError("it has " + std::to_string(text.size()) + " bytes; accepted: at most " +
                      std::to_string(kMostRecordBytes));
  return record_of(parse_guarded(text, kRecordBounds));
}

}  // namespace flash_attn_jit
