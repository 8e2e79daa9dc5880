// Figures of the report, comparisons, and databases taken in.
#include <doctest/doctest.h>

#include <fstream>

#include "runtime/tuner/database.h"
#include "runtime/tuner/flops.h"
#include "runtime/tuner/record_json.h"
#include "runtime/tuner/report_data.h"
#include "tests/cpp/containing.h"
#include "tests/cpp/temporary_folder.h"
#include "tests/cpp/tuning_fixture.h"

using namespace flash_attn_jit;
using namespace flash_attn_jit::testing;

namespace {

// Counted one by one.
double counted_pairs(Mask mask, std::int64_t queries, std::int64_t keys, std::int64_t left, std::int64_t right) {
  if (mask == Mask::kCausal) left = -1, right = 0;
  double count = 0;
  for (std::int64_t i = 0; i < queries; ++i)
    for (std::int64_t j = 0; j < keys; ++j) {
      const std::int64_t place = i + keys - queries;
      const bool in_window = (left < 0 || j >= place - left) && (right < 0 || j <= place + right);
      count += mask == Mask::kNone || in_window;
    }
  return count;
}

// A record whose winner takes `seconds`, give or take the spread.
TuningRecord record_of_time(double seconds, double spread, int head_dim = 64) {
  TuningRecord record = made_up_record(head_dim);
  record.candidates[0] = measured_candidate(record.winner, seconds, spread);
  return record;
}

Verdict verdict(const TuningRecord& before, const TuningRecord& after) {
  const auto compared = compare_records({before}, {after});
  REQUIRE(compared.size() == 1);
  return compared[0].verdict;
}

}  // namespace

TEST_CASE("pairs that the mask lets see each other, as counted one by one") {
  for (const std::int64_t queries : {0, 1, 5, 8, 13})
    for (const std::int64_t keys : {0, 1, 5, 8, 13}) {
      CHECK(visible_pairs(Mask::kNone, queries, keys, -1, -1) == counted_pairs(Mask::kNone, queries, keys, -1, -1));
      CHECK(visible_pairs(Mask::kCausal, queries, keys, -1, -1) == counted_pairs(Mask::kCausal, queries, keys, -1, -1));
      for (const std::int64_t left : {-1, 0, 2, 5, 30})
        for (const std::int64_t right : {-1, 0, 1, 7, 30}) {
          CAPTURE(queries);
          CAPTURE(keys);
          CAPTURE(left);
          CAPTURE(right);
          CHECK(visible_pairs(Mask::kWindow, queries, keys, left, right) ==
                counted_pairs(Mask::kWindow, queries, keys, left, right));
        }
    }
}

TEST_CASE("operations of each kind of kernel") {
  TuningRecord record = made_up_record();
  const double heads = 64, pairs = 1e6;
  const auto of_kind = [&](KernelKind kind) {
    record.key.problem.spec.kind = kind;
    return flops(record);
  };
  CHECK(of_kind(KernelKind::kForward) == 2 * 2 * pairs * heads * 64);
  CHECK(of_kind(KernelKind::kBackwardDkDv) == 2 * 4 * pairs * heads * 64);
  CHECK(of_kind(KernelKind::kBackwardDq) == 2 * 3 * pairs * heads * 64);
  CHECK(of_kind(KernelKind::kBackwardPreprocess) == 2 * 1000 * heads * 64);
  record.key.problem.spec = {};
  record.key.problem.spec.head_dim = 64;
  record.key.problem.spec.mask = Mask::kCausal;
  CHECK(flops(record) == 2 * 2 * (1000 * 1001 / 2) * heads * 64);
}

TEST_CASE("a row of the report") {
  TuningRecord record = made_up_record();
  Candidate crashed = record.candidates.back();
  crashed.tile.block_n = 16;
  crashed.outcome = Outcome::kCrashed;
  crashed.reason = "signal 11";
  Candidate pruned_too = record.candidates.back();
  pruned_too.tile.block_n = 24;
  record.candidates.insert(record.candidates.end(), {crashed, pruned_too});
  record.candidates[1].predicted_seconds = 1e-3;  // the model prefers the default
  const ReportRow row = report_row(record, {"13.0", "nvrtc 12.9", 60.0}, true);
  CHECK(row.winner->seconds == 1.2e-3);
  CHECK(row.tflops.value() == doctest::Approx(4 * 64 * 64 * 1e6 / 1.2e-3 / 1e12));
  CHECK(row.share_of_peak.value() == doctest::Approx(*row.tflops / 50.1));
  CHECK(row.runner_up_tile == record.default_tile);
  CHECK(row.told_apart == true);
  CHECK(row.default_loss.value() == doctest::Approx(1.25 / 1.2 - 1));
  CHECK(row.predicted_tile == record.default_tile);
  CHECK(row.predicted_loss.value() == doctest::Approx(1.25 / 1.2 - 1));
  CHECK(row.predicted_over_measured.value() == doctest::Approx(1.05));
  CHECK(row.differences == std::vector<std::string>{"driver 12.4, here 13.0", "power limit 70 W, here 60 W"});
  REQUIRE(row.rejections.size() == 2);
  CHECK(row.rejections[0].outcome == Outcome::kPruned);
  CHECK(row.rejections[0].count == 2);
  CHECK(row.rejections[0].reasons == std::vector<std::string>{"predicted 2.1 times the best"});
  CHECK(row.rejections[1].reasons == std::vector<std::string>{"signal 11"});
  CHECK(report_row(record, {}, true).differences.empty());

  record.candidates[1] = measured_candidate(record.default_tile, 1.21e-3);
  CHECK(report_row(record, {}, true).told_apart == false);
}

TEST_CASE("a row of a prediction: times as predicted, and nothing told apart") {
  const TuningRecord record = predicted_record();
  const ReportRow row = report_row(record, {}, false);
  CHECK(row.winner.value().seconds == doctest::Approx(1.05 * 1.2e-3));
  CHECK(row.winner->low == row.winner->high);
  CHECK(row.default_loss.value() == doctest::Approx(1.25 / 1.2 - 1));
  CHECK(row.runner_up_tile == record.default_tile);
  CHECK_FALSE(row.told_apart);
  CHECK_FALSE(row.predicted_over_measured);
  CHECK(row.tflops.value() == doctest::Approx(4 * 64 * 64 * 1e6 / (1.05 * 1.2e-3) / 1e12));
  CHECK(row.predicted_tile == record.winner);
  CHECK_FALSE(row.in_use);
}

TEST_CASE("two databases: faster, slower, the same, or it cannot be told") {
  const TuningRecord slow = record_of_time(1e-3, 0.005), fast = record_of_time(0.9e-3, 0.005);
  CHECK(verdict(slow, fast) == Verdict::kFaster);
  CHECK(verdict(fast, slow) == Verdict::kSlower);
  CHECK(verdict(slow, record_of_time(1.002e-3, 0.005)) == Verdict::kSame);
  CHECK(verdict(record_of_time(1e-3, 0.0005), record_of_time(1.002e-3, 0.0005)) ==
        Verdict::kSame);  // they do not overlap
  CHECK(verdict(slow, record_of_time(0.99e-3, 0.05)) == Verdict::kCannotTell);
  CHECK(compare_records({slow}, {fast})[0].change.value() == doctest::Approx(-0.1));

  TuningRecord elsewhere = fast;
  elsewhere.key.device = made_up_device("NVIDIA GeForce RTX 2080 Ti");
  CHECK(verdict(slow, elsewhere) == Verdict::kFaster);
  TuningRecord other_sizes = fast;
  other_sizes.seqlen_q = 999;
  CHECK(compare_records({slow}, {other_sizes})[0].why == Containing{"other sizes"});
  CHECK(verdict(slow, other_sizes) == Verdict::kCannotTell);

  const auto compared = compare_records({slow, record_of_time(1e-3, 0, 80)}, {fast, record_of_time(1e-3, 0, 128)});
  REQUIRE(compared.size() == 3);
  CHECK(compared[1].verdict == Verdict::kOnlyBefore);
  CHECK(compared[2].verdict == Verdict::kOnlyAfter);
  // With several devices a class meets its own device's.
  const auto two = compare_records({slow, elsewhere}, {fast});
  REQUIRE(two.size() == 2);
  CHECK(two[0].verdict == Verdict::kOnlyBefore);
  CHECK(two[1].verdict == Verdict::kFaster);
  // Of other templates, before an update say, it is the same class; the newest counts.
  TuningRecord newer = made_up_record(64, 1000, "28");
  newer.key.templates = std::string(64, '1');
  newer.candidates[0] = measured_candidate(newer.winner, 2e-3);
  CHECK(compare_records({slow}, {fast, newer})[0].verdict == Verdict::kSlower);
}

TEST_CASE("import takes what is newer, for a device of this machine, and says what it does not take") {
  const TemporaryFolder folder;
  Tuning tuning({folder / "cache", std::nullopt, embedded_templates(), default_tile_chooser()});
  const std::vector<TunedDevice> here = {made_up_device()};
  TuningRecord foreign = made_up_record(96), other_templates = made_up_record(80), illegal = made_up_record(32);
  foreign.key.device = made_up_device("NVIDIA H100");
  other_templates.key.templates = std::string(64, '0');
  illegal.candidates[0].tile = illegal.winner = {100, 16, 4, 64, {}};
  const Database database{{made_up_record(64), foreign, other_templates, illegal}, {{"records[4]", "made up"}}};
  ImportResult result = import_database(tuning, database, here);
  CHECK(result.taken == 2);
  CHECK(result.other_templates == 1);
  REQUIRE(result.refused.size() == 3);
  CHECK(result.refused[0].what == "records[4]");
  CHECK(result.refused[1].what == Containing{"for NVIDIA H100 (sm_75, 40 multiprocessors)"});
  CHECK(result.refused[1].reason == "this machine has Tesla T4 (sm_75, 40 multiprocessors)");
  CHECK(result.refused[2].reason == Containing{"100 rows"});
  CHECK(import_database(tuning, {{foreign}, {}}, std::vector<TunedDevice>{}).refused[0].reason ==
        "this machine has no GPU");

  result = import_database(tuning, database, std::nullopt);
  CHECK(result.taken == 1);
  CHECK(result.same == 2);
  TuningRecord turing_code = made_up_record(64);  // the same model, other code
  turing_code.key.device.code = "compute_75";
  result = import_database(tuning, {{made_up_record(64, 1000, "26"), made_up_record(64, 1000, "28"), turing_code}, {}},
                           here);
  CHECK(result.older == 1);
  CHECK(result.taken == 2);
  CHECK(tuning.store().read(made_up_device()).size() == 2);
  for (const TuningRecord& record : tuning.store().read(made_up_device()))
    if (record.key.problem.spec.head_dim == 64) CHECK(record.when == made_up_record(64, 1000, "28").when);
}

TEST_CASE("database files: whole or not there, and bounded") {
  const TemporaryFolder folder;
  write_database(folder / "db.json", {made_up_record()});
  CHECK(read_database(folder / "db.json").records.size() == 1);
  CHECK_THROWS_WITH_AS(read_database(folder / "none.json"), doctest::Contains("none.json"), FileError);
  write_all(folder / "bad.json", "{}");
  CHECK_THROWS_WITH_AS(read_database(folder / "bad.json"), doctest::Contains("bad.json"), RecordError);
  {
    std::ofstream(folder / "huge.json").seekp(std::streamoff{1} << 33).put('x');
  }
  CHECK_THROWS_WITH_AS(read_database(folder / "huge.json"), doctest::Contains("too large"), FileError);
  CHECK_THROWS_AS(write_database(folder / "no such folder/db.json", {}), FileError);
}
