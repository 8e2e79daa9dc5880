// A record as JSON: what its file holds, and an element of a database.
#pragma once

#include <string>
#include <string_view>

#include <nlohmann/json.hpp>

#include "runtime/tuner/guarded_json.h"
#include "runtime/tuner/record.h"

namespace flash_attn_jit {

inline constexpr int kRecordVersion = 1;
inline constexpr std::size_t kMostRecordBytes = std::size_t{8} << 20;
// Of a record's JSON, within a database's too.
inline constexpr JsonBounds kRecordBounds{8, 1'000'000};

// Texts are made plain, and cut where they are longer than a reader takes.
nlohmann::ordered_json record_json(const TuningRecord& record);
nlohmann::ordered_json key_json(const RecordKey& key);

// The same for a file: a line for each candidate.
std::string record_text(const TuningRecord& record);

// Strict: every key, its type and range; tiles and kernels whose text is theirs; a class that the measured problem has;
// a default and a winner among the candidates. What it takes is written back as it was. Throws RecordError.
TuningRecord record_of(const nlohmann::json& json);
TuningRecord parse_record(std::string_view text);

// Whether it is a time as records have it, "2026-11-27T08:00:00Z": such texts compare as their times do.
bool is_utc(std::string_view text);

}  // namespace flash_attn_jit
