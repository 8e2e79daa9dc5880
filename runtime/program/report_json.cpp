#include "runtime/program/report_json.h"

#include <algorithm>
#include <iostream>
#include <vector>

#include "runtime/tuner/record_json.h"

namespace flash_attn_jit::program {
namespace {

using Json = nlohmann::ordered_json;

template <class T>
Json or_null(const std::optional<T>& value) {
  return value ? Json(*value) : Json();
}

Json time_json(const std::optional<CandidateTime>& time) {
  if (!time) return {};
  return {{"seconds", time->seconds}, {"low", time->low}, {"high", time->high}};
}

Json tile_json(const std::optional<TileConfig>& tile) { return tile ? Json(tile->text()) : Json(); }

// RFC 4180.
std::string csv_field(const std::string& field) {
  if (field.find_first_of(",\"\n\r") == std::string::npos) return field;
  std::string quoted = "\"";
  for (const char c : field) quoted += c == '"' ? std::string("\"\"") : std::string(1, c);
  return quoted + "\"";
}

std::string csv_value(const Json& value) {
  if (value.is_null()) return "";
  return csv_field(value.is_string() ? value.get<std::string>() : value.dump());
}

// A line for each element: what stands at the columns' paths in it.
void print_csv(const Json& elements, const std::vector<const char*>& columns) {
  const auto name_of = [](std::string path) {
    std::replace(path.begin(), path.end(), '/', '.');
    return path.substr(1);
  };
  const char* between = "";
  for (const char* column : columns) {
    std::cout << between << name_of(column);
    between = ",";
  }
  std::cout << "\n";
  for (const Json& element : elements) {
    between = "";
    for (const char* column : columns) {
      std::cout << between << csv_value(element.at(Json::json_pointer(column)));
      between = ",";
    }
    std::cout << "\n";
  }
}

const std::vector<const char*> kReportColumns = {"/device/name",
                                                 "/device/sm",
                                                 "/device/multiprocessors",
                                                 "/device/code",
                                                 "/problem/kernel",
                                                 "/problem/seqlen_q",
                                                 "/problem/seqlen_k",
                                                 "/problem/batch_heads",
                                                 "/policy/timer",
                                                 "/policy/l2",
                                                 "/in_use",
                                                 "/when",
                                                 "/measured/batch",
                                                 "/measured/num_heads",
                                                 "/measured/num_heads_k",
                                                 "/measured/seqlen_q",
                                                 "/measured/seqlen_k",
                                                 "/measured/flops",
                                                 "/winner/tile",
                                                 "/winner/seconds",
                                                 "/winner/low",
                                                 "/winner/high",
                                                 "/winner/tflops",
                                                 "/winner/share_of_peak",
                                                 "/winner/registers",
                                                 "/winner/spill_stores",
                                                 "/winner/spill_loads",
                                                 "/winner/blocks_per_multiprocessor",
                                                 "/winner/predicted_seconds",
                                                 "/runner_up/tile",
                                                 "/runner_up/seconds",
                                                 "/runner_up/told_apart",
                                                 "/default/tile",
                                                 "/default/seconds",
                                                 "/default/loss",
                                                 "/model/tile",
                                                 "/model/loss",
                                                 "/candidates",
                                                 "/rejected"};

// A row with times as fields of what they are of, and the rejected in one text.
Json flat(Json row) {
  for (const char* of : {"winner", "runner_up", "default"}) {
    const Json time = row[of]["time"];
    for (const char* field : {"seconds", "low", "high"}) row[of][field] = time.is_null() ? Json() : time[field];
  }
  std::string rejected;
  for (const Json& each : row["rejected"])
    rejected += (rejected.empty() ? "" : "; ") + each["count"].dump() + " " + each["outcome"].get<std::string>();
  row["rejected"] = rejected;
  return row;
}

Json side_json(const std::optional<TuningRecord>& record) {
  if (!record) return {};
  const ReportRow row = report_row(*record, {}, true);
  const auto predicted = row.winning_candidate().predicted_seconds;
  return {{"device", record->key.device.text()},     {"driver", record->environment.driver},
          {"nvrtc", record->environment.nvrtc},      {"when", record->when},
          {"tile", record->winner.text()},           {"time", row.winner ? time_json(row.winner) : Json()},
          {"predicted_seconds", or_null(predicted)}, {"tflops", or_null(row.tflops)}};
}

const std::vector<const char*> kComparedColumns = {
    "/class",      "/verdict",     "/why",          "/change",     "/before/device", "/before/tile", "/before/seconds",
    "/before/low", "/before/high", "/after/device", "/after/tile", "/after/seconds", "/after/low",   "/after/high"};

Json flat_comparison(Json compared) {
  for (const char* side : {"before", "after"}) {
    Json& at = compared[side];
    if (at.is_null()) at = {{"device", Json()}, {"tile", Json()}, {"time", Json()}};
    for (const char* field : {"seconds", "low", "high"}) at[field] = at["time"].is_null() ? Json() : at["time"][field];
  }
  return compared;
}

}  // namespace

Json row_json(const ReportRow& row) {
  const TuningRecord& record = row.record;
  const Candidate& winner = row.winning_candidate();
  Json rejected = Json::array(), json = key_json(record.key);
  for (const Rejection& rejection : row.rejections)
    rejected.push_back(
        {{"outcome", to_text(rejection.outcome)}, {"count", rejection.count}, {"reasons", rejection.reasons}});
  Json others = Json::object();
  for (const auto& [name, seconds] : record.others) others[name] = seconds;
  json.update({{"class", record.key.problem.text()},
               {"in_use", row.in_use},
               {"differs", row.differences},
               {"when", record.when},
               {"measured",
                {{"batch", record.batch},
                 {"num_heads", record.num_heads},
                 {"num_heads_k", record.num_heads_k},
                 {"seqlen_q", record.seqlen_q},
                 {"seqlen_k", record.seqlen_k},
                 {"window_left", record.window_left},
                 {"window_right", record.window_right},
                 {"flops", row.flops}}},
               {"winner",
                {{"tile", record.winner.text()},
                 {"time", time_json(row.winner)},
                 {"tflops", or_null(row.tflops)},
                 {"share_of_peak", or_null(row.share_of_peak)},
                 {"registers", or_null(winner.registers)},
                 {"spill_stores", or_null(winner.spill_stores)},
                 {"spill_loads", or_null(winner.spill_loads)},
                 {"threads", winner.threads},
                 {"static_smem", winner.static_smem},
                 {"dynamic_smem", winner.dynamic_smem},
                 {"blocks_per_multiprocessor", winner.blocks_per_multiprocessor},
                 {"limited_by", winner.limited_by},
                 {"predicted_seconds", or_null(winner.predicted_seconds)}}},
               {"rule", record.rule},
               {"runner_up",
                {{"tile", tile_json(row.runner_up_tile)},
                 {"time", time_json(row.runner_up)},
                 {"told_apart", or_null(row.told_apart)}}},
               {"default",
                {{"tile", record.default_tile.text()},
                 {"time", time_json(row.default_tile)},
                 {"loss", or_null(row.default_loss)}}},
               {"model",
                {{"tile", tile_json(row.predicted_tile)},
                 {"loss", or_null(row.predicted_loss)},
                 {"predicted_over_measured", or_null(row.predicted_over_measured)}}},
               {"candidates", record.candidates.size()},
               {"rejected", rejected},
               {"others", others}});
  return json;
}

Json compared_json(const ComparedClass& compared) {
  return {{"class", compared.problem.text()},
          {"verdict", to_text(compared.verdict)},
          {"why", compared.why},
          {"change", or_null(compared.change)},
          {"before", side_json(compared.before)},
          {"after", side_json(compared.after)}};
}

void print_report_csv(const Json& rows) {
  Json flat_rows = Json::array();
  for (const Json& row : rows) flat_rows.push_back(flat(row));
  print_csv(flat_rows, kReportColumns);
}

void print_comparison_csv(const Json& classes) {
  Json flat_classes = Json::array();
  for (const Json& compared : classes) flat_classes.push_back(flat_comparison(compared));
  print_csv(flat_classes, kComparedColumns);
}

}  // namespace flash_attn_jit::program
