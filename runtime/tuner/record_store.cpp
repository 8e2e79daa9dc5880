#include "runtime/tuner/record_store.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <functional>
#include <memory>
#include <utility>

#include "runtime/cache/cache_folder.h"
#include "runtime/cache/pack_files.h"
#include "runtime/system/log.h"
#include "runtime/system/sha256.h"
#include "runtime/system/side_by_side.h"
#include "runtime/tuner/record_json.h"

namespace flash_attn_jit {
namespace {

namespace fs = std::filesystem;

constexpr std::string_view kRecordSuffix = ".json", kTemporarySuffix = ".tmp";
constexpr std::size_t kMostSlugName = 64;

KernelKey hash_of(const RecordKey& key) { return make_key({{"tuning record", key_json(key).dump()}}); }

// Nothing where there is none. Throws FileError where what lies in it is not to be trusted.
std::optional<TrustedFolder> open_trusted(const fs::path& path, FolderUse use) {
  auto folder = TrustedFolder::open(path, use);
  if (folder)
    if (const auto reason = folder->distrust()) throw FileError(*reason);
  return folder;
}

// In order. Throws FileError.
std::vector<std::string> names_in(const fs::path& folder,
                                  const std::function<bool(const fs::directory_entry&)>& wanted) {
  std::vector<std::string> names;
  std::error_code error;
  for (fs::directory_iterator entry(folder, error), end; !error && entry != end; entry.increment(error))
    if (wanted(*entry)) names.push_back(entry->path().filename().string());
  if (error && error != std::errc::no_such_file_or_directory)
    throw FileError("cannot read the folder " + folder.string() + ": " + error.message());
  std::sort(names.begin(), names.end());
  return names;
}

// Throws FileError, RecordError. Nothing where the file has vanished.
std::optional<TuningRecord> parse_record_of(const std::optional<std::string>& text, const std::string& name,
                                            const std::string& slug) {
  if (!text) return std::nullopt;
  if (text->size() > kMostRecordBytes) throw RecordError("it is larger than any record");
  TuningRecord record = parse_record(*text);
  if (device_slug(record.key.device) != slug || record_file_name(record.key) != name)
    throw RecordError("it holds the record of another key: " + device_slug(record.key.device) + "/" +
                      record_file_name(record.key));
  return record;
}

// Null where there is none. Throws FileError where what lies in it is not to be trusted.
std::unique_ptr<PackFiles> open_zip(const fs::path& path) {
  std::unique_ptr<PackFiles> zip = PackFiles::open(path);
  if (zip != nullptr)
    if (const auto reason = zip->distrust()) throw FileError(*reason);
  return zip;
}

// What processes that were killed left. Nobody writes a record for an hour.
void remove_leftovers(const fs::path& folder) {
  const auto is_left = [](const fs::directory_entry& entry) {
    std::error_code vanished;
    const auto age = fs::file_time_type::clock::now() - entry.last_write_time(vanished);
    return !vanished && entry.path().extension() == kTemporarySuffix && age > std::chrono::hours(1);
  };
  for (const std::string& name : names_in(folder, is_left)) ::unlink((folder / name).c_str());
}

// In order. Throws FileError.
std::vector<std::string> device_folders_in_zip(const fs::path& path) {
  std::vector<std::string> slugs;
  const std::unique_ptr<PackFiles> zip = open_zip(path);
  if (zip == nullptr) return slugs;
  const std::string prefix = std::string(kRecordFolder) + "/";
  for (const std::string& name : zip->names()) {
    const std::size_t end = name.find('/', prefix.size());
    if (packed_file_kind(name) != PackedFileKind::kRecord || end == std::string::npos) continue;
    const std::string slug = name.substr(prefix.size(), end - prefix.size());
    if (slugs.empty() || slugs.back() != slug) slugs.push_back(slug);
  }
  return slugs;
}

}  // namespace

std::string device_slug(const TunedDevice& device) {
  std::string slug;
  for (const char c : device.name.substr(0, kMostSlugName)) {
    const bool is_upper = c >= 'A' && c <= 'Z', is_lower = c >= 'a' && c <= 'z', is_digit = c >= '0' && c <= '9';
    slug += is_upper ? static_cast<char>(c - 'A' + 'a') : is_lower || is_digit ? c : '-';
  }
  return slug + "-sm" + std::to_string(device.sm) + "-" + std::to_string(device.multiprocessors) + "mp-" + device.code;
}

std::string record_file_name(const RecordKey& key) {
  std::string name = key.problem.text();
  std::replace(name.begin(), name.end(), ' ', '_');
  return name + "." + to_hex(hash_of(key)).substr(0, 16) + std::string(kRecordSuffix);
}

RecordStore::RecordStore(fs::path home, FolderUse use) : home_(std::move(home)), use_(use) {}

std::vector<TuningRecord> RecordStore::read(const TunedDevice& device) const {
  std::vector<TuningRecord> records;
  read_folder(device_slug(device), records);
  const std::lock_guard guard(mutex_);
  for (const auto& [key, record] : in_memory_) records.push_back(record);
  std::erase_if(records, [&](const TuningRecord& record) { return record.key.device != device; });
  return records;
}

std::vector<TuningRecord> RecordStore::read_all() const {
  std::vector<TuningRecord> records;
  for (const std::string& slug : device_folders()) read_folder(slug, records);
  const std::lock_guard guard(mutex_);
  for (const auto& [key, record] : in_memory_) records.push_back(record);
  return records;
}

std::vector<std::string> RecordStore::device_folders() const {
  if (home_.empty()) return {};
  try {
    if (is_zip()) return device_folders_in_zip(home_);
    return names_in(folder(), [](const fs::directory_entry& entry) {
      std::error_code vanished;
      return entry.is_directory(vanished);
    });
  } catch (const FileError& error) {
    warn_once(std::string("tuning records are passed over: ") + error.what());
    return {};
  }
}

void RecordStore::read_folder(const std::string& slug, std::vector<TuningRecord>& records) const {
  if (home_.empty()) return;
  const fs::path path = folder() / slug;
  try {
    const auto source = is_zip() ? open_in_zip(slug) : open(slug);
    if (!source) return;
    const std::vector<std::string>& names = source->names;
    std::vector<std::optional<TuningRecord>> read(names.size());
    run_side_by_side(names.size(), [&](std::size_t i) {
      try {
        read[i] = parse_record_of(source->read(names[i]), names[i], slug);
      } catch (const Error& error) {
        warn_once("tuning record " + (path / names[i]).string() + " is passed over: " + error.what());
      }
    });
    for (std::optional<TuningRecord>& record : read)
      if (record) records.push_back(*std::move(record));
  } catch (const FileError& error) {
    warn_once("tuning records in " + path.string() + " are passed over: " + error.what());
  }
}

bool RecordStore::is_zip() const {
  std::error_code ignored;
  return use_ == FolderUse::kPack && fs::is_regular_file(home_, ignored);
}

std::optional<RecordStore::Source> RecordStore::open(const std::string& slug) const {
  for (const fs::path& above : {home_, folder()})
    if (!open_trusted(above, use_)) return std::nullopt;
  auto trusted = open_trusted(folder() / slug, use_);
  if (!trusted) return std::nullopt;
  const auto is_record = [](const fs::directory_entry& entry) { return entry.path().extension() == kRecordSuffix; };
  const auto kept = std::make_shared<const TrustedFolder>(*std::move(trusted));
  return Source{names_in(folder() / slug, is_record),
                [kept](const std::string& name) { return kept->read(name, kMostRecordBytes); }};
}

std::optional<RecordStore::Source> RecordStore::open_in_zip(const std::string& slug) const {
  const std::shared_ptr<const PackFiles> zip = open_zip(home_);
  if (zip == nullptr) return std::nullopt;
  const std::string prefix = std::string(kRecordFolder) + "/" + slug + "/";
  std::vector<std::string> names;
  for (const std::string& name : zip->names())
    if (packed_file_kind(name) == PackedFileKind::kRecord && name.starts_with(prefix))
      names.push_back(name.substr(prefix.size()));
  return Source{std::move(names), [zip, prefix](const std::string& name) { return zip->read(prefix + name); }};
}

void RecordStore::publish(const TuningRecord& record) {
  const std::string text = record_text(record);
  parse_record(text);
  try {
    write(record, text);
  } catch (const FileError& error) {
    if (use_ == FolderUse::kPack) throw;
    warn_once(std::string("tuning records are kept in memory only: ") + error.what() +
              ". Set FLASH_ATTN_JIT_CACHE_DIR to a folder of your own");
    const std::lock_guard guard(mutex_);
    in_memory_.insert_or_assign(record.key, record);
  }
}

void RecordStore::write(const TuningRecord& record, const std::string& text) const {
  if (home_.empty())
    throw FileError(
        "there is no folder for them: HOME is not set, and this process's user has no entry in the system's list of "
        "users");
  const fs::path path = folder() / device_slug(record.key.device);
  const bool is_private = use_ == FolderUse::kCache;
  create_folders(path, is_private ? 0700 : 0755);
  for (const fs::path& each : {home_, folder(), path}) open_trusted(each, use_);
  write_file(path / record_file_name(record.key), path / temporary_name(hash_of(record.key)), text,
             is_private ? 0600 : 0644);
  remove_leftovers(path);
}

}  // namespace flash_attn_jit
