// Records of several classes and devices in one file, to move them between machines.
#pragma once

#include <filesystem>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "runtime/tuner/guarded_json.h"
#include "runtime/tuner/tuning.h"

namespace flash_attn_jit {

inline constexpr std::uint64_t kMostDatabaseBytes = std::uint64_t{2} << 30;

// Something of a database that was not taken.
struct RefusedRecord {
  std::string what;  // "records[3] (fwd hdim64 ... for Tesla T4 ...)"
  std::string reason;
};

struct Database {
  std::vector<TuningRecord> records;
  std::vector<RefusedRecord> refused;  // elements that are no records
};

std::string database_text(const std::vector<TuningRecord>& records);

// Throws RecordError where it is no database at all.
Database parse_database(std::string_view text);

// Throws FileError, also where there is no such file, and RecordError.
Database read_database(const std::filesystem::path& file);

// Writes a file that is whole or not there. Throws FileError.
void write_database(const std::filesystem::path& file, const std::vector<TuningRecord>& records);

// Whether two devices are of one model, whatever code they run.
bool is_same_model(const TunedDevice& a, const TunedDevice& b);

struct ImportResult {
  std::size_t taken = 0;            // published now
  std::size_t same = 0;             // there already
  std::size_t older = 0;            // than what is there, which stays
  std::size_t other_templates = 0;  // of those taken: kept and not used
  std::vector<RefusedRecord> refused;
};

// Publishes what is newer than what is there. `devices`: records for others are refused; nothing: any are taken.
ImportResult import_database(Tuning& tuning, const Database& database,
                             const std::optional<std::vector<TunedDevice>>& devices);

}  // namespace flash_attn_jit
