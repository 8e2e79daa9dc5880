#include "runtime/tuner/database.h"

#include <algorithm>
#include <map>

#include "runtime/cache/cache_folder.h"
#include "runtime/tuner/record_json.h"

namespace flash_attn_jit {
namespace {

using Json = nlohmann::json;

constexpr const char* kDatabaseFormat = "flash-attn-jit tuning database";
constexpr int kDatabaseVersion = 1;
constexpr std::size_t kMostRecords = 1'000'000;

// An element of "records" lies within the database and that array.
constexpr int kRecordDepth = 2;
constexpr JsonBounds kBounds{kRecordBounds.depth + kRecordDepth, kRecordBounds.values};

std::string name_of(std::size_t index) { return "records[" + std::to_string(index) + "]"; }

std::string name_of(std::size_t index, const TuningRecord& record) {
  return name_of(index) + " (" + record.key.problem.text() + " for " + record.key.device.text() + ")";
}

std::string names_of(const std::vector<TunedDevice>& devices) {
  std::string names;
  for (const TunedDevice& device : devices) names += (names.empty() ? "" : ", ") + device.text();
  return names.empty() ? "no GPU" : names;
}

// Records are turned into values as they come, so that the whole never stands in memory as JSON.
class Collector {
 public:
  bool take(int depth, const Json& json) {
    if (depth != kRecordDepth) return false;
    if (index_ >= kMostRecords) throw RecordError("it has more than " + std::to_string(kMostRecords) + " records");
    try {
      database_.records.push_back(record_of(json));
    } catch (const RecordError& error) {
      database_.refused.push_back({name_of(index_), error.what()});
    }
    ++index_;
    return true;
  }

  Database database() && { return std::move(database_); }

 private:
  Database database_;
  std::size_t index_ = 0;
};

}  // namespace

std::string database_text(const std::vector<TuningRecord>& records) {
  std::string text = "{\"format\": " + Json(kDatabaseFormat).dump() +
                     ", \"version\": " + std::to_string(kDatabaseVersion) + ", \"records\": [";
  const char* before = "\n";
  for (const TuningRecord& record : records) {
    text += before + record_json(record).dump();
    before = ",\n";
  }
  return text + "\n]}\n";
}

Database parse_database(std::string_view text) {
  Collector collector;
  const Json rest = parse_guarded(text, kBounds, [&](int depth, Json& json) { return collector.take(depth, json); });
  JsonObject object(rest, "");
  if (object.text("format", 256) != kDatabaseFormat) object.refuse("format", "'" + std::string(kDatabaseFormat) + "'");
  object.integer("version", kDatabaseVersion, kDatabaseVersion);
  if (!object.array("records", kMostRecords).empty()) throw RecordError("records has elements that are no objects");
  object.end();
  return std::move(collector).database();
}

Database read_database(const std::filesystem::path& file) {
  const auto text = read_file(file, kMostDatabaseBytes);
  if (!text) throw FileError("there is no file " + file.string());
  try {
    return parse_database(*text);
  } catch (const RecordError& error) {
    throw RecordError(file.string() + " is no tuning database: " + error.what());
  }
}

void write_database(const std::filesystem::path& file, const std::vector<TuningRecord>& records) {
  const std::filesystem::path temporary =
      std::filesystem::absolute(file).parent_path() / temporary_name(make_key({{"tuning database", file.string()}}));
  write_file(file, temporary, database_text(records), 0644);
}

bool is_same_model(const TunedDevice& a, const TunedDevice& b) {
  return a.name == b.name && a.sm == b.sm && a.multiprocessors == b.multiprocessors;
}

ImportResult import_database(Tuning& tuning, const Database& database,
                             const std::optional<std::vector<TunedDevice>>& devices) {
  ImportResult result{.refused = database.refused};
  std::map<RecordKey, TuningRecord> there;
  for (TuningRecord& record : tuning.store().read_all()) there.insert_or_assign(record.key, std::move(record));
  for (std::size_t i = 0; i < database.records.size(); ++i) {
    const TuningRecord& record = database.records[i];
    const auto fits = [&](const TunedDevice& device) { return is_same_model(device, record.key.device); };
    if (devices && std::none_of(devices->begin(), devices->end(), fits)) {
      result.refused.push_back({name_of(i, record), "this machine has " + names_of(*devices)});
      continue;
    }
    if (const auto reason = check_winner(record)) {
      result.refused.push_back({name_of(i, record), *reason});
      continue;
    }
    if (const auto known = there.find(record.key); known != there.end() && known->second.when >= record.when) {
      ++(known->second.when == record.when ? result.same : result.older);
      continue;
    }
    tuning.publish(record);
    ++result.taken;
    if (!tuning.has_templates_in_use(record.key)) ++result.other_templates;
    there.insert_or_assign(record.key, record);
  }
  return result;
}

}  // namespace flash_attn_jit
