// Tuning records as JSON: what is written, and that nothing else is read.
#include <doctest/doctest.h>

#include <cmath>
#include <functional>
#include <limits>
#include <random>

#include "runtime/tuner/database.h"
#include "runtime/tuner/record_json.h"
#include "tests/cpp/containing.h"
#include "tests/cpp/tuning_fixture.h"

using namespace flash_attn_jit;
using namespace flash_attn_jit::testing;
using Json = nlohmann::json;

namespace {

std::string refusal(const std::string& text) {
  try {
    parse_record(text);
  } catch (const RecordError& error) {
    return error.what();
  }
  return "";
}

Json changed(const std::string& pointer, const Json& value) {
  Json json = record_json(made_up_record());
  json[Json::json_pointer(pointer)] = value;
  return json;
}

// Where `text` is taken, it is written back the same. Whether it was.
bool taken_as_it_is(const std::string& text) {
  TuningRecord record;
  try {
    record = parse_record(text);
  } catch (const RecordError& error) {
    CHECK(is_plain(error.what()));
    return false;
  }
  CHECK(Json::parse(record_text(record)) == Json::parse(text));
  return true;
}

std::vector<std::string> pointers_of(const Json& json) {
  std::vector<std::string> pointers;
  const Json flat = json.flatten();
  for (const auto& [pointer, value] : flat.items()) pointers.push_back(pointer);
  return pointers;
}

}  // namespace

TEST_CASE("a record is read back as it was written") {
  for (const TuningRecord& record : {made_up_record(), made_up_record(128, 4096), predicted_record()}) {
    const std::string text = record_text(record);
    CHECK(record_text(parse_record(text)) == text);
    CHECK(parse_record(text).key == record.key);
    CHECK(text == Containing{"\n {\"tile\":"});  // a line for each candidate
  }
}

TEST_CASE("a record's keys, in their order") {
  const nlohmann::ordered_json json = record_json(made_up_record());
  const auto keys = [](const nlohmann::ordered_json& object) {
    std::string names;
    for (const auto& [key, value] : object.items()) names += (names.empty() ? "" : " ") + key;
    return names;
  };
  CHECK(keys(json) ==
        "format version key environment measured when seconds default winner rule rounds candidates others");
  CHECK(keys(json["key"]) == "device templates problem policy");
  CHECK(keys(json["candidates"][0]) ==
        "tile outcome reason predicted_seconds limited_by registers spill_stores spill_loads threads static_smem "
        "dynamic_smem blocks_per_multiprocessor compile_seconds error error_allowed samples median_seconds low_seconds "
        "high_seconds");
  CHECK(json["key"]["problem"]["kernel"] == "fwd hdim64 fp16 full gqa1 vec16");
  CHECK(json["candidates"][0]["samples"][1]["clock_mhz"].is_null());
}

TEST_CASE("what a compiler says is written so that it can be read, and shown on a terminal") {
  TuningRecord record = made_up_record();
  record.candidates.back().reason = "\x1b[31mred\x1b[0m \xff\xfe \xc2\x9b" + std::string(100'000, 'x') + "\u00e9";
  record.candidates.back().error = std::numeric_limits<double>::quiet_NaN();
  record.rule = std::string(16 * 1024 - 1, 'x') + "\u00e9";  // cut within a character
  const TuningRecord read = parse_record(record_text(record));
  CHECK(read.candidates.back().reason == Containing{" [31mred [0m \uFFFD\uFFFD  xxx"});
  CHECK(read.candidates.back().reason.size() == 16 * 1024);
  CHECK_FALSE(read.candidates.back().error);
  CHECK(read.rule == std::string(16 * 1024 - 1, 'x'));
}

TEST_CASE("what is no record is refused, with what and where") {
  const auto refused = [](const std::string& pointer, const Json& value, const std::string& where,
                          const std::string& what) {
    CAPTURE(pointer);
    const std::string message = refusal(changed(pointer, value).dump());
    CHECK(message == Containing{where});
    CHECK(message == Containing{what});
  };
  refused("/format", "something else", "format is \"something else\"", "flash-attn-jit tuning record");
  refused("/version", 2, "version is 2", "from 1 to 1");
  refused("/key/device/name", "", "key.device.name", "a device's name");
  refused("/key/device/name", "T4\x1b[2J", "key.device.name", "control characters");
  refused("/key/device/sm", 70, "key.device.sm is 70", "from 75");
  refused("/key/device/sm", "75", "key.device.sm is \"75\"", "a whole number");
  refused("/key/device/sm", 75.5, "key.device.sm is 75.5", "a whole number");
  refused("/key/device/multiprocessors", 0, "key.device.multiprocessors", "from 1");
  refused("/key/device/multiprocessors", UINT64_MAX, "key.device.multiprocessors", "from 1");
  refused("/key/device/code", "ptx", "key.device.code", "native, compute_75");
  refused("/key/templates", std::string(64, 'G'), "key.templates", "SHA-256");
  refused("/key/templates", std::string(63, 'a'), "key.templates", "SHA-256");
  refused("/key/problem/kernel", "fwd hdim64", "key.problem.kernel", "seven words");
  refused("/key/problem/kernel", "fwd hdim0 fp16 full gqa1 vec16", "key.problem.kernel", "1 to 512");
  refused("/key/problem/kernel", "fwd hdim064 fp16 full gqa1 vec16", "key.problem.kernel", "hdim064");
  refused("/key/problem/kernel", "fwd hdim64 fp16 full gqa0 vec16", "key.problem.kernel", "1 or more");
  refused("/key/problem/kernel", "bwd_preprocess hdim64 fp16 causal gqa1 vec16", "key.problem.kernel",
          "one for all masks");
  refused("/key/problem/kernel", "fwd hdim64 fp16 full gqa1 vec16 m64n16w4q64l2b4k7", "key.problem.kernel", "");
  refused("/key/problem/kernel", std::string(300, 'f'), "key.problem.kernel has 300 bytes", "at most 256");
  refused("/key/problem/seqlen_q", 1000, "key.problem.seqlen_q", "power of two");
  refused("/key/problem/seqlen_q", 2048, "measured has another class", "q1024");
  refused("/key/problem/seqlen_q", 16, "key.problem.seqlen_q is 16", "from 64");
  refused("/key/problem/batch_heads", 1 << 20, "key.problem.batch_heads", "to 4096");
  refused("/key/policy/timer", 5, "key.policy.timer is 5", "a text");
  refused("/environment/driver", Json(), "environment.driver is null", "a text");
  refused("/environment/power_limit_watts", -1, "environment.power_limit_watts", "a number from");
  refused("/measured/batch", -1, "measured.batch", "from 0");
  refused("/measured/num_heads_k", 8, "measured.num_heads", "group size");
  refused("/measured/seqlen_q", std::int64_t{1} << 40, "measured.seqlen_q", "from 0");
  refused("/when", "yesterday", "when is \"yesterday\"", "2026-11-27T08:00:00Z");
  refused("/seconds", "long", "seconds is \"long\"", "a number");
  refused("/default", "m1n1w1q1l1b1k1", "default", "the tile of a candidate");
  refused("/winner", "m1n1w1q1l1b1k1", "winner", "the tile of a candidate");
  refused("/winner", "m32n8w2q16l1b2k3", "winner", "was measured");  // pruned
  refused("/winner", "m01n1w1q1l1b1k1", "winner", "m256n16w8q96l2b4k7");
  refused("/candidates", Json::object(), "candidates is an object", "an array");
  refused("/candidates/0/tile", "huge", "candidates[0].tile", "huge");
  refused("/candidates/1/tile", made_up_record().winner.text(), "candidates[1].tile", "came before");
  refused("/candidates/0/outcome", "won", "candidates[0].outcome", "measured, pruned, compile failed");
  refused("/candidates/0/samples/1/seconds", 0, "candidates[0].samples[1].seconds", "a number from");
  refused("/candidates/0/samples/0/throttled_by/0", 7, "candidates[0].samples[0].throttled_by", "a text");
  refused("/candidates/0/median_seconds", Json(), "candidates[0].median_seconds", "null where");
  refused("/candidates/0/low_seconds", 1, "candidates[0].low_seconds", "at most median_seconds");
  refused("/candidates/0/high_seconds", 1e-9, "candidates[0].high_seconds", "at least median_seconds");
  refused("/candidates/0/outcome", "timed out", "candidates[0].median_seconds", "only there");
  refused("/others/sdpa_efficient", "fast", "others.sdpa_efficient", "a number");
  refused("/unheard_of", 1, "unheard_of", "is not known");
  refused("/candidates/0/samples/0/extra", 1, "candidates[0].samples[0]", "is not known");
}

TEST_CASE("every key is needed") {
  const Json whole = record_json(made_up_record());
  for (const std::string& pointer : pointers_of(whole)) {
    const Json::json_pointer at(pointer);
    const std::string key = at.back();
    if (key.find_first_not_of("0123456789") == std::string::npos || pointer.starts_with("/others")) continue;
    Json json = whole;
    json[at.parent_pointer()].erase(key);
    CAPTURE(pointer);
    CHECK(refusal(json.dump()) == Containing{key + " is missing"});
  }
}

TEST_CASE("texts that are no JSON, and JSON that is too much") {
  CHECK(refusal("") == Containing{"parse error"});
  CHECK(refusal("[]") == Containing{"it is an array; accepted: an object"});
  CHECK(refusal("{\"format\": \"\xff\"}") == Containing{"UTF-8"});
  CHECK(refusal("{\"a\": 1, \"a\": 1}") == Containing{"\"a\" comes twice"});
  CHECK(refusal("{\"seconds\": 1e999}") == Containing{"number overflow"});
  CHECK(refusal(std::string(1'000'000, '[')) == Containing{"nested deeper"});
  std::string many = "[0";
  for (int i = 0; i < 1'000'001; ++i) many += ",0";
  CHECK(refusal(many + "]") == Containing{"more values"});
  CHECK(refusal(std::string(9 << 20, ' ')) == Containing{"at most 8388608"});
}

TEST_CASE("damaged and hostile records: no crash, and what is taken is written back the same") {
  const std::string whole = record_text(made_up_record());
  std::mt19937 random(20261127);
  const auto below = [&](std::size_t count) {
    return std::uniform_int_distribution<std::size_t>(0, count - 1)(random);
  };
  int taken = 0, refused = 0;
  const auto count = [&](const std::string& text) { ++(taken_as_it_is(text) ? taken : refused); };

  for (std::size_t bytes = 0; bytes + 2 < whole.size(); bytes += 1 + below(40))
    CHECK_FALSE(taken_as_it_is(whole.substr(0, bytes)));
  for (int i = 0; i < 1500; ++i) {
    std::string text = whole;
    for (std::size_t flips = 1 + below(3); flips > 0; --flips)
      text[below(text.size())] ^= static_cast<char>(1 << below(8));
    count(text);
  }
  const Json json = Json::parse(whole);
  const std::vector<std::string> pointers = pointers_of(json);
  const std::vector<Json> values = {Json(),
                                    true,
                                    0,
                                    -1,
                                    1,
                                    64,
                                    1e-3,
                                    1e300,
                                    -0.0,
                                    INT64_MIN,
                                    UINT64_MAX,
                                    "",
                                    "m1n1w1q1l1b1k1",
                                    "fwd",
                                    "\u0000",
                                    Json::array(),
                                    Json::object(),
                                    Json::array({Json::array()})};
  for (int i = 0; i < 1500; ++i) {
    Json swapped = json;
    for (std::size_t swaps = 1 + below(2); swaps > 0; --swaps) {
      const bool with_another = below(3) == 0;
      const Json value =
          with_another ? json[Json::json_pointer(pointers[below(pointers.size())])] : values[below(values.size())];
      try {
        swapped[Json::json_pointer(pointers[below(pointers.size())])] = value;
      } catch (const Json::exception&) {
        // the swap before took away its place
      }
    }
    count(swapped.dump());
  }
  CHECK(taken > 50);
  CHECK(refused > 1000);
}

TEST_CASE("a database: records out and in, a bad one alone refused") {
  const std::vector<TuningRecord> records = {made_up_record(64), made_up_record(128), predicted_record(80)};
  const std::string text = database_text(records);
  const Database read = parse_database(text);
  CHECK(read.refused.empty());
  CHECK(database_text(read.records) == text);
  CHECK(parse_database(database_text({})).records.empty());

  Json json = Json::parse(text);
  json["records"][1]["candidates"][0]["tile"] = 5;
  const Database with_a_bad_one = parse_database(json.dump());
  CHECK(with_a_bad_one.records.size() == 2);
  REQUIRE(with_a_bad_one.refused.size() == 1);
  CHECK(with_a_bad_one.refused[0].what == "records[1]");
  CHECK(with_a_bad_one.refused[0].reason == Containing{"candidates[0].tile is 5"});
}

TEST_CASE("what is no database is refused, damaged ones do not crash") {
  const std::string whole = database_text({made_up_record(64), made_up_record(128)});
  const auto refusal_of = [](const std::string& text) -> std::string {
    try {
      parse_database(text);
    } catch (const RecordError& error) {
      return error.what();
    }
    return "";
  };
  const Json json = Json::parse(whole);
  const auto with = [&](const std::string& key, const Json& value) {
    Json copy = json;
    copy[key] = value;
    return refusal_of(copy.dump());
  };
  CHECK(refusal_of(record_text(made_up_record())) == Containing{"format"});
  CHECK(with("version", 7) == Containing{"version is 7"});
  CHECK(with("records", {{"a", json["records"][0]}}) == Containing{"records is an object"});
  CHECK(with("records", Json::array({1, 2})) == Containing{"no objects"});
  CHECK(with("more", Json::array({json["records"][0]})) == Containing{"is not known"});
  CHECK(refusal_of(std::string(1000, '[')) == Containing{"nested deeper"});

  std::mt19937 random(7);
  std::size_t refused = 0;
  for (int i = 0; i < 300; ++i) {
    std::string text = whole.substr(0, i % 3 == 0 ? random() % whole.size() : whole.size());
    for (int flips = i % 4; flips > 0 && !text.empty(); --flips)
      text[random() % text.size()] ^= static_cast<char>(1 << random() % 8);
    try {
      const Database read = parse_database(text);
      for (const TuningRecord& record : read.records) CHECK_NOTHROW(parse_record(record_text(record)));
      refused += read.refused.size();
    } catch (const RecordError&) {
      ++refused;
    }
  }
  CHECK(refused > 100);
}
