// flash-attn-jit cache: where the disk cache is, what is in it, and its upkeep.
#include <chrono>
#include <ctime>
#include <iostream>
#include <optional>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "runtime/cache/cache_folder.h"
#include "runtime/launch/process.h"
#include "runtime/program/command.h"
#include "runtime/program/flag_values.h"

namespace flash_attn_jit::program {
namespace {

using Json = nlohmann::ordered_json;

struct CacheFlags {
  bool json = false;
  std::string max_bytes;                // of prune
  std::optional<std::string> built_by;  // of clear
};

std::string utc_text(std::filesystem::file_time_type time) {
  const auto system = std::chrono::file_clock::to_sys(time);
  const std::time_t seconds =
      std::chrono::system_clock::to_time_t(std::chrono::time_point_cast<std::chrono::system_clock::duration>(system));
  std::tm parts{};
  char text[32];
  std::strftime(text, sizeof text, "%Y-%m-%dT%H:%M:%SZ", gmtime_r(&seconds, &parts));
  return text;
}

Json entry_json(const CacheEntry& entry) {
  Json json = {{"file", entry.path.filename().string()},
               {"bytes", entry.bytes},
               {"last_used", utc_text(entry.last_used)},
               {"valid", entry.file.has_value()}};
  if (!entry.file) {
    json["fault"] = entry.fault;
    return json;
  }
  json["spec"] = entry.file->id.spec;
  json["target"] = entry.file->id.target;
  json["built_by"] = entry.file->kernel.built_by;
  json["seconds"] = entry.file->kernel.seconds;
  return json;
}

void print_entry(const CacheEntry& entry) {
  std::cout << utc_text(entry.last_used) << "  " << entry.bytes << " bytes  ";
  if (entry.file)
    std::cout << entry.file->id.spec << "  " << entry.file->id.target << "  " << entry.file->kernel.built_by << "\n";
  else
    std::cout << entry.path.filename().string() << "  BROKEN: " << entry.fault << "\n";
}

void require_folder() {
  if (config().cache_dir.empty())
    throw ConfigError(
        "there is no folder for the cache: HOME is not set, and this user has no entry in the system's list "
        "of users; set FLASH_ATTN_JIT_CACHE_DIR to a folder");
}

int show_path(const CacheFlags& flags) {
  const std::string dir = config().cache_dir.string();
  std::cout << (flags.json ? json_text({{"path", dir}}) : dir) << "\n";
  return kSuccess;
}

int list(const CacheFlags& flags) {
  const std::vector<CacheEntry> entries = list_cache(config().cache_dir);
  std::uint64_t bytes = 0;
  Json kernels = Json::array();
  for (const CacheEntry& entry : entries) {
    bytes += entry.bytes;
    if (flags.json)
      kernels.push_back(entry_json(entry));
    else
      print_entry(entry);
  }
  if (flags.json)
    std::cout << json_text({{"path", config().cache_dir.string()}, {"bytes", bytes}, {"kernels", kernels}}) << "\n";
  else
    std::cout << config().cache_dir.string() << ": " << entries.size() << " kernels, " << bytes << " bytes\n";
  return kSuccess;
}

int verify(const CacheFlags& flags) {
  const std::vector<CacheEntry> entries = list_cache(config().cache_dir);
  Json broken = Json::array();
  for (const CacheEntry& entry : entries) {
    if (entry.file) continue;
    broken.push_back(entry_json(entry));
    if (!flags.json) print_entry(entry);
  }
  if (flags.json)
    std::cout << json_text({{"path", config().cache_dir.string()}, {"verified", entries.size()}, {"broken", broken}})
              << "\n";
  else
    std::cout << config().cache_dir.string() << ": " << entries.size() << " kernels read, " << broken.size()
              << " broken\n";
  return broken.empty() ? kSuccess : kFailure;
}

int report_removal(const CacheFlags& flags, const CacheRemoval& removed) {
  if (flags.json)
    std::cout << json_text({{"path", config().cache_dir.string()},
                            {"removed_files", removed.files},
                            {"removed_bytes", removed.bytes}})
              << "\n";
  else
    std::cout << config().cache_dir.string() << ": removed " << removed.files << " files, " << removed.bytes
              << " bytes\n";
  if (removed.fault.empty()) return kSuccess;
  std::cerr << "flash-attn-jit cache: " << removed.fault << "\n";
  return kFailure;
}

int prune(const CacheFlags& flags) {
  const std::uint64_t max_bytes =
      flags.max_bytes.empty() ? config().cache_max_bytes
                              : static_cast<std::uint64_t>(parse_number("--max-bytes", flags.max_bytes, 0, INT64_MAX));
  return report_removal(flags, prune_cache(config().cache_dir, max_bytes));
}

int clear(const CacheFlags& flags) {
  if (!flags.built_by) return report_removal(flags, clear_cache(config().cache_dir));
  if (flags.built_by->empty())
    throw UsageError(
        "--built-by is ''; accepted: a compiler as 'flash-attn-jit cache list' names it, such as 'nvrtc 12.9'");
  const CacheRemoval removed = clear_built_by(config().cache_dir, *flags.built_by);
  if (const int code = report_removal(flags, removed); code != kSuccess || removed.files > 0) return code;
  std::cerr << "flash-attn-jit cache: nothing there was made by '" << *flags.built_by
            << "'; 'flash-attn-jit cache list' names each kernel's compiler whole\n";
  return kFailure;
}

}  // namespace

void add_cache(CLI::App& app, Action& chosen) {
  CLI::App* const cache = app.add_subcommand("cache", "Show and look after the disk cache of compiled kernels");
  cache->require_subcommand(1);
  const auto flags = std::make_shared<CacheFlags>();
  const auto add = [&](const char* name, const char* what, int (*work)(const CacheFlags&)) {
    CLI::App* const command = cache->add_subcommand(name, what);
    command->add_flag("--json", flags->json, "Print JSON");
    command->callback([&chosen, flags, work] {
      chosen = [flags, work] {
        require_folder();
        return work(*flags);
      };
    });
    return command;
  };
  add("path", "Print the cache's folder", show_path);
  add("list", "List the kernels, the last used first", list);
  add("verify", "Read every kernel and check it; fails where one is broken", verify);
  add("prune", "Remove leftovers, then the least recently used kernels beyond a size", prune)
      ->add_option("--max-bytes", flags->max_bytes,
                   "Keep at most this many bytes; default: FLASH_ATTN_JIT_CACHE_MAX_BYTES");
  add("clear", "Remove everything that the cache wrote", clear)
      ->add_option("--built-by", flags->built_by, "Only what this compiler made, as list names it: 'nvrtc 12.9'");
}

}  // namespace flash_attn_jit::program
