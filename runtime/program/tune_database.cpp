#include "runtime/program/tune_database.h"

#include <algorithm>
#include <iostream>
#include <set>

#include "runtime/launch/process.h"
#include "runtime/program/command.h"
#include "runtime/program/flag_values.h"
#include "runtime/tuner/database.h"

namespace flash_attn_jit::program {
namespace {

using Json = nlohmann::ordered_json;

constexpr std::size_t kMostRefusedPrinted = 20;

int export_database(const std::string& file, bool as_json) {
  const std::vector<TuningRecord> records = process_tuning().store().read_all();
  if (records.empty()) {
    std::cerr << "flash-attn-jit tune: there are no records in " << process_tuning().store().folder().string() << "\n";
    return kFailure;
  }
  write_database(file, records);
  std::set<std::string> devices;
  for (const TuningRecord& record : records) devices.insert(record.key.device.text());
  if (as_json) {
    std::cout << json_text({{"file", file}, {"records", records.size()}, {"devices", devices}}) << "\n";
    return kSuccess;
  }
  std::cout << file << ": " << records.size() << " records\n";
  for (const std::string& device : devices) std::cout << "  of " << device << "\n";
  return kSuccess;
}

std::vector<TunedDevice> devices_here() {
  std::vector<TunedDevice> devices;
  Driver* const driver = process_driver();
  for (int i = 0; driver != nullptr && i < driver->device_count(); ++i)
    devices.push_back(tuned_device(driver->device_info(i), config().target));
  return devices;
}

void print_import(const std::string& file, const ImportResult& result, bool as_json) {
  const std::size_t printed = std::min(result.refused.size(), kMostRefusedPrinted);
  for (std::size_t i = 0; i < printed; ++i)
    std::cerr << "flash-attn-jit tune: " << result.refused[i].what << " is refused: " << result.refused[i].reason
              << "\n";
  if (result.refused.size() > printed)
    std::cerr << "flash-attn-jit tune: so are " << result.refused.size() - printed << " more; --json names all\n";
  if (as_json) {
    Json refused = Json::array();
    for (const RefusedRecord& each : result.refused)
      refused.push_back({{"record", each.what}, {"reason", each.reason}});
    std::cout << json_text({{"file", file},
                            {"taken", result.taken},
                            {"same", result.same},
                            {"older", result.older},
                            {"other_templates", result.other_templates},
                            {"refused", refused}})
              << "\n";
    return;
  }
  std::cout << file << ": " << result.taken << " records taken, " << result.same << " there already, " << result.older
            << " older than what is there, " << result.refused.size() << " refused\n";
  if (result.other_templates > 0)
    std::cout << "  " << result.other_templates
              << " of those taken were made with other templates than this library's: kept and not used\n";
}

int import_database(const TuneDatabaseFlags& flags, bool as_json) {
  const Database database = read_database(existing_file("--import", flags.import_from));
  std::optional<std::vector<TunedDevice>> devices;
  if (!flags.any_device) devices = devices_here();
  const ImportResult result = flash_attn_jit::import_database(process_tuning(), database, devices);
  print_import(flags.import_from, result, as_json);
  if (result.refused.empty()) return kSuccess;
  if (!flags.any_device)
    std::cerr << "flash-attn-jit tune: --any-device takes the records of other GPUs too, as for a folder that several "
                 "machines share\n";
  return kFailure;
}

}  // namespace

std::shared_ptr<TuneDatabaseFlags> add_tune_database(CLI::App& tune) {
  const auto flags = std::make_shared<TuneDatabaseFlags>();
  tune.add_option("--export", flags->export_to, "Write every record of the cache into this file");
  tune.add_option("--import", flags->import_from,
                  "Take the records of this file that are for a GPU of this machine and newer than what is there");
  tune.add_flag("--any-device", flags->any_device, "With --import: also those for other GPUs");
  return flags;
}

int run_tune_database(const TuneDatabaseFlags& flags, bool as_json) {
  if (!flags.export_to.empty() && !flags.import_from.empty())
    throw UsageError("--export and --import are both given; accepted: one of them");
  if (flags.any_device && flags.import_from.empty())
    throw UsageError("--any-device is given without --import; accepted: both together");
  return flags.export_to.empty() ? import_database(flags, as_json) : export_database(flags.export_to, as_json);
}

}  // namespace flash_attn_jit::program
