// flash-attn-jit report: what tuning found, as a table, JSON or CSV, and two databases side by side.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <iostream>
#include <map>
#include <memory>
#include <set>
#include <string>

#include "runtime/cuda/nvml.h"
#include "runtime/cuda/nvrtc_choice.h"
#include "runtime/cuda/nvrtc_search.h"
#include "runtime/launch/process.h"
#include "runtime/program/command.h"
#include "runtime/program/flag_values.h"
#include "runtime/program/report_json.h"
#include "runtime/system/log.h"
#include "runtime/tuner/database.h"
#include "runtime/tuner/report_data.h"

namespace flash_attn_jit::program {
namespace {

using Json = nlohmann::ordered_json;

struct ReportFlags {
  bool json = false, csv = false;
  std::string database, against, device;
};

std::string text(const char* format, double number) {
  char buffer[64];
  std::snprintf(buffer, sizeof buffer, format, number);
  return buffer;
}

std::string seconds_text(double seconds) {
  return seconds < 1e-3 ? text("%.4g us", seconds * 1e6) : text("%.4g ms", seconds * 1e3);
}

std::string time_text(const CandidateTime& time) {
  if (time.low == time.high) return seconds_text(time.seconds);
  return seconds_text(time.seconds) + " (" + seconds_text(time.low) + " to " + seconds_text(time.high) + ")";
}

std::string percent_text(double share) { return text("%.1f %%", share * 100); }

std::string resources_text(const Candidate& candidate) {
  std::string found = candidate.registers ? std::to_string(*candidate.registers) + " registers" : "registers not known";
  if (candidate.spill_stores && candidate.spill_loads)
    found += *candidate.spill_stores + *candidate.spill_loads == 0
                 ? ", no spills"
                 : ", spills " + std::to_string(*candidate.spill_stores) + " bytes stored and " +
                       std::to_string(*candidate.spill_loads) + " read";
  return found + ", " + std::to_string(candidate.blocks_per_multiprocessor) + " blocks a multiprocessor";
}

std::string problem_text(const TuningRecord& record) {
  std::string found = "batch " + std::to_string(record.batch) + ", heads " + std::to_string(record.num_heads) + "/" +
                      std::to_string(record.num_heads_k) + ", lengths " + std::to_string(record.seqlen_q) + " x " +
                      std::to_string(record.seqlen_k);
  if (record.key.problem.spec.mask == Mask::kWindow)
    found += ", window " + std::to_string(record.window_left) + ", " + std::to_string(record.window_right);
  return found;
}

std::string runner_up_text(const ReportRow& row) {
  if (!row.runner_up) return row.record.key.policy.is_prediction() ? "none" : "none was measured";
  std::string found = row.runner_up_tile->text() + ", " + time_text(*row.runner_up) + ", " +
                      percent_text(row.runner_up->seconds / row.winner->seconds - 1) + " slower";
  if (row.told_apart) found += *row.told_apart ? ": told apart" : ": cannot be told apart";
  return found;
}

std::string default_text(const ReportRow& row) {
  if (row.record.default_tile == row.record.winner) return "is the winner";
  const std::string tile = row.record.default_tile.text();
  if (!row.default_loss)
    return tile + ", " + std::string(to_text(row.record.candidate(row.record.default_tile)->outcome));
  return tile + ", " + time_text(*row.default_tile) + ", loses " + percent_text(*row.default_loss);
}

std::string model_text(const ReportRow& row) {
  std::string found =
      row.predicted_tile == row.record.winner ? "chose the winner" : "chose " + row.predicted_tile->text();
  if (row.predicted_loss && row.predicted_tile != row.record.winner)
    found += ", which loses " + percent_text(*row.predicted_loss);
  if (row.predicted_over_measured)
    found += "; predicted " + text("%.2f", *row.predicted_over_measured) + " of the winner's time";
  return found;
}

void print_line(const char* what, const std::string& line) { std::cout << "  " << what << line << "\n"; }

constexpr std::size_t kMostReasonsPrinted = 3;

void print_row(const ReportRow& row) {
  const TuningRecord& record = row.record;
  const bool predicted = record.key.policy.is_prediction();
  std::cout << record.key.problem.text() << (row.in_use ? "" : "  NOT USED: made with other templates") << "\n";
  std::string winner = record.winner.text();
  if (row.winner) winner += ", " + time_text(*row.winner);
  if (row.tflops) winner += ", " + text("%.1f TFLOP/s", *row.tflops) + (predicted ? " as predicted" : "");
  if (row.share_of_peak)
    winner += ", " + percent_text(*row.share_of_peak) + (predicted ? " of the card's peak" : " of the measured peak");
  print_line("winner     ", winner);
  print_line("           ", resources_text(row.winning_candidate()));
  if (row.winner) print_line("runner-up  ", runner_up_text(row));
  print_line("default    ", default_text(row));
  if (row.predicted_tile && !predicted) print_line("model      ", model_text(row));
  for (const Rejection& rejection : row.rejections) {
    std::string line = std::to_string(rejection.count) + " " + std::string(to_text(rejection.outcome));
    const std::size_t shown = std::min(rejection.reasons.size(), kMostReasonsPrinted);
    for (std::size_t i = 0; i < shown; ++i)
      line += (i == 0 ? ": " : "; ") + rejection.reasons[i].substr(0, rejection.reasons[i].find('\n'));
    if (rejection.reasons.size() > shown) line += "; ... (--json has all)";
    print_line("rejected   ", line);
  }
  for (const auto& [name, seconds] : record.others)
    print_line("beside it  ",
               name + ", " + seconds_text(seconds) +
                   (row.winner ? ", " + text("%.2f", seconds / row.winner->seconds) + " times the winner's" : ""));
  print_line(predicted ? "predicted  " : "measured   ",
             problem_text(record) + "; " + record.key.policy.timer + ", " + record.key.policy.l2 + "; " + record.when);
  for (const std::string& difference : row.differences) print_line("elsewhere  ", difference);
}

void print_table(const std::vector<ReportRow>& rows) {
  std::string device;
  for (const ReportRow& row : rows) {
    if (const std::string next = row.record.key.device.text(); next != device) {
      std::cout << (device.empty() ? "" : "\n") << "== " << next << "\n";
      device = next;
    }
    print_row(row);
  }
}

ReportPlace place_here() {
  ReportPlace place;
  Driver* const driver = process_driver();
  if (driver == nullptr) return place;
  place.driver = driver_version_text(driver->version());
  const NvrtcSearch search = search_nvrtc(config(), python_search_path());
  const auto nvrtc = choose_nvrtc(search.candidates, {CodeKind::kCubin, driver->version()});
  if (nvrtc && nvrtc->version) place.nvrtc = "nvrtc " + nvrtc->version->text();
  return place;
}

// By name, of the first GPU here that has it; nothing where nobody tells.
std::map<std::string, double> power_limits_here() {
  std::map<std::string, double> limits;
  Driver* const driver = process_driver();
  if (driver == nullptr) return limits;
  try {
    const Nvml nvml;
    for (int i = 0; i < driver->device_count(); ++i)
      if (const auto limit = nvml.state(driver->device_figures(i).pci_bus_id).power_limit_watts)
        limits.emplace(driver->device_info(i).name, *limit);
  } catch (const Error& error) {
    log(LogLevel::kInfo, std::string("power limits are not compared: ") + error.what());
  }
  return limits;
}

std::vector<TuningRecord> records_of(const std::string& file) {
  if (file.empty()) return process_tuning().store().read_all();
  Database database = read_database(existing_file("--database", file));
  for (const RefusedRecord& refused : database.refused)
    std::cerr << "flash-attn-jit report: " << file << ": " << refused.what << " is passed over: " << refused.reason
              << "\n";
  return std::move(database.records);
}

// Those of the devices of this name, or all.
std::vector<TuningRecord> of_device(std::vector<TuningRecord> records, const std::string& device) {
  if (device.empty()) return records;
  std::set<std::string> names;
  for (const TuningRecord& record : records) names.insert(record.key.device.name);
  std::erase_if(records, [&](const TuningRecord& record) { return record.key.device.name != device; });
  if (!records.empty()) return records;
  std::string accepted;
  for (const std::string& name : names) accepted += (accepted.empty() ? "" : ", ") + name;
  throw UsageError("--device is '" + device +
                   "'; accepted: " + (accepted.empty() ? "nothing, there are no records" : accepted));
}

std::vector<ReportRow> rows_of(std::vector<TuningRecord> records) {
  if (records.empty()) return {};
  std::sort(records.begin(), records.end(), [](const TuningRecord& a, const TuningRecord& b) {
    return std::tie(a.key, a.when) < std::tie(b.key, b.when);
  });
  ReportPlace place = place_here();
  const std::map<std::string, double> power_limits = power_limits_here();
  std::vector<ReportRow> rows;
  for (TuningRecord& record : records) {
    const auto limit = power_limits.find(record.key.device.name);
    place.power_limit_watts = limit == power_limits.end() ? std::nullopt : std::optional(limit->second);
    const bool in_use = process_tuning().has_templates_in_use(record.key);
    rows.push_back(report_row(std::move(record), place, in_use));
  }
  return rows;
}

int report(const ReportFlags& flags) {
  const std::vector<ReportRow> rows = rows_of(of_device(records_of(flags.database), flags.device));
  const std::string source = flags.database.empty() ? process_tuning().store().folder().string() : flags.database;
  if (flags.json || flags.csv) {
    Json classes = Json::array();
    for (const ReportRow& row : rows) classes.push_back(row_json(row));
    if (flags.csv)
      print_report_csv(classes);
    else
      std::cout << json_text({{"source", source}, {"classes", classes}}) << "\n";
    return kSuccess;
  }
  print_table(rows);
  std::cout << (rows.empty() ? "" : "\n") << source << ": " << rows.size() << " records\n";
  return kSuccess;
}

std::string side_text(const Json& side) {
  if (side.is_null()) return "nothing";
  std::string found = side["tile"].get<std::string>();
  if (!side["time"].is_null()) found += ", " + seconds_text(side["time"]["seconds"].get<double>());
  if (!side["tflops"].is_null()) found += ", " + text("%.1f TFLOP/s", side["tflops"].get<double>());
  return found + "; " + side["device"].get<std::string>();
}

void print_comparison(const Json& classes) {
  std::map<std::string, int> counts;
  for (const Json& each : classes) {
    const std::string verdict = each["verdict"].get<std::string>(), why = each["why"].get<std::string>();
    ++counts[verdict];
    std::cout << each["class"].get<std::string>() << "\n  " << verdict;
    if (!each["change"].is_null()) std::cout << ", takes " << text("%+.1f %%", each["change"].get<double>() * 100);
    std::cout << (why.empty() ? "" : ": " + why) << "\n";
    print_line("before     ", side_text(each["before"]));
    print_line("after      ", side_text(each["after"]));
  }
  std::string line;
  for (const auto& [verdict, count] : counts)
    line += (line.empty() ? "" : ", ") + std::to_string(count) + " " + verdict;
  std::cout << (line.empty() ? "no classes" : line) << "\n";
}

int compare(const ReportFlags& flags) {
  const auto before = records_of(flags.against), after = of_device(records_of(flags.database), flags.device);
  Json classes = Json::array();
  for (const ComparedClass& compared : compare_records(before, after)) classes.push_back(compared_json(compared));
  if (flags.csv)
    print_comparison_csv(classes);
  else if (flags.json)
    std::cout << json_text({{"before", flags.against}, {"classes", classes}}) << "\n";
  else
    print_comparison(classes);
  return kSuccess;
}

}  // namespace

void add_report(CLI::App& app, Action& chosen) {
  CLI::App* const command = app.add_subcommand("report", "Show what tuning found, from its records; needs no GPU");
  const auto flags = std::make_shared<ReportFlags>();
  command->add_flag("--json", flags->json, "Print JSON");
  command->add_flag("--csv", flags->csv, "Print CSV, a line for each problem class");
  command->add_option("--database", flags->database,
                      "Records of this file, as tune --export writes it; default: the cache's");
  command->add_option("--against", flags->against, "Compare with the records of this file: those before");
  command->add_option("--device", flags->device, "Only the records of the GPU of this name");
  command->callback([&chosen, flags] {
    chosen = [flags] {
      if (flags->json && flags->csv) throw UsageError("--json and --csv are both given; accepted: one of them");
      return flags->against.empty() ? report(*flags) : compare(*flags);
    };
  });
}

}  // namespace flash_attn_jit::program
