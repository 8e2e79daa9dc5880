// The folder of tuning records: writers at once, deaths, damage, and whose records are taken.
#include <doctest/doctest.h>

#include <signal.h>
#include <sys/stat.h>
#include <unistd.h>

#include <chrono>
#include <set>
#include <thread>

#include "runtime/cache/cache_folder.h"
#include "runtime/cache/stored_zip.h"
#include "runtime/tuner/record_json.h"
#include "runtime/tuner/record_store.h"
#include "tests/cpp/captured_log.h"
#include "tests/cpp/containing.h"
#include "tests/cpp/processes.h"
#include "tests/cpp/temporary_folder.h"
#include "tests/cpp/tuning_fixture.h"

using namespace flash_attn_jit;
using namespace flash_attn_jit::testing;
namespace fs = std::filesystem;

namespace {

constexpr uid_t kSomebody = 12345;
const bool kIsRoot = ::geteuid() == 0;

// An empty cache with its store.
struct Home {
  TemporaryFolder folder;
  RecordStore store{folder.path(), FolderUse::kCache};

  fs::path file_of(const TuningRecord& record) const {
    return store.folder() / device_slug(record.key.device) / record_file_name(record.key);
  }
};

std::string texts_of(const std::vector<TuningRecord>& records) {
  std::string texts;
  for (const TuningRecord& record : records) texts += record_text(record);
  return texts;
}

std::size_t count_files(const fs::path& folder, const std::string& suffix) {
  std::size_t count = 0;
  std::error_code none;
  for (const auto& entry : fs::recursive_directory_iterator(folder, none))
    count += entry.is_regular_file() && entry.path().string().ends_with(suffix);
  return count;
}

}  // namespace

TEST_CASE("records: what is published is read, by device, and published again it takes the other's place") {
  Home home;
  RecordStore& store = home.store;
  CHECK(store.read(made_up_device()).empty());
  TuningRecord first = made_up_record(64), other = made_up_record(64);
  other.key.device.multiprocessors = 68;
  store.publish(first);
  store.publish(other);
  CHECK(texts_of(store.read(first.key.device)) == record_text(first));
  CHECK(texts_of(store.read(other.key.device)) == record_text(other));
  CHECK(store.read_all().size() == 2);
  first.seconds = 99;
  store.publish(first);
  CHECK(texts_of(store.read(first.key.device)) == record_text(first));
  CHECK(count_files(home.folder.path(), "") == 2);
}

TEST_CASE("records: names of files and folders") {
  const TuningRecord record = made_up_record();
  CHECK(device_slug(record.key.device) == "tesla-t4-sm75-40mp-native");
  CHECK(device_slug({"../../etc/pass\nwd \xff", 90, 132, "compute_75"}) == "------etc-pass-wd---sm90-132mp-compute_75");
  const std::string name = record_file_name(record.key);
  CHECK(name.starts_with("fwd_hdim64_fp16_full_gqa1_vec16_q1024_k1024_bh64."));
  CHECK(name.ends_with(".json"));
  std::set<std::string> names{name};
  RecordKey key = record.key;
  key.templates = std::string(64, '0');
  names.insert(record_file_name(key));
  key.policy.l2 = "warm";
  names.insert(record_file_name(key));
  key.device.name = "Another";
  names.insert(record_file_name(key));
  CHECK(names.size() == 4);
}

TEST_CASE("records: nobody else may write them, and a pack's all may read") {
  const auto mode_of = [](const fs::path& path) {
    struct stat status{};
    REQUIRE(::stat(path.c_str(), &status) == 0);
    return status.st_mode & 0777;
  };
  const TemporaryFolder folder;
  const TuningRecord record = made_up_record();
  for (const auto& [use, name] : {std::pair{FolderUse::kCache, "cache"}, {FolderUse::kPack, "pack"}}) {
    RecordStore store(folder / name, use);
    store.publish(record);
    const bool is_private = use == FolderUse::kCache;
    const fs::path device = store.folder() / device_slug(record.key.device);
    for (const fs::path& path : {folder / name, store.folder(), device})
      CHECK(mode_of(path) == (is_private ? 0700 : 0755));
    CHECK(mode_of(device / record_file_name(record.key)) == (is_private ? 0600 : 0644));
  }
}

TEST_CASE("records: of many writers at once every file is whole, and every record there") {
  Home home;
  constexpr int kProcesses = 4, kRecords = 6;
  std::vector<pid_t> children;
  for (int i = 0; i < kProcesses; ++i)
    children.push_back(start_process([&] {
      RecordStore store(home.folder.path(), FolderUse::kCache);
      for (int round = 0; round < 2; ++round)
        for (int head_dim = 1; head_dim <= kRecords; ++head_dim) {
          TuningRecord record = made_up_record(head_dim * 8);
          record.seconds = i;
          store.publish(record);
          for (const TuningRecord& read : store.read(record.key.device))
            if (read.seconds >= kProcesses) return 1;
        }
      return 0;
    }));
  const CapturedLog log;
  while (count_files(home.folder.path(), ".json") < kRecords) home.store.read_all();
  for (const pid_t child : children) CHECK(status_of(child) == 0);
  CHECK(log.warnings().empty());
  CHECK(home.store.read_all().size() == kRecords);
  CHECK(count_files(home.folder.path(), "") == kRecords);
}

TEST_CASE("records: a process killed while it writes leaves what was there, or what it wrote") {
  Home home;
  TuningRecord record = made_up_record();
  record.rule = "the first";
  home.store.publish(record);
  for (int i = 0; i < 500; ++i) record.candidates[0].samples.push_back(record.candidates[0].samples[0]);
  const fs::path device = home.store.folder() / device_slug(record.key.device);
  int killed_while_writing = 0;
  for (int round = 0; round < 10; ++round) {
    const pid_t child = start_process([&] {
      RecordStore store(home.folder.path(), FolderUse::kCache);
      for (int i = 0;; ++i) {
        record.rule = std::to_string(i);
        store.publish(record);
      }
      return 0;
    });
    while (count_files(device, ".tmp") == 0) std::this_thread::yield();
    std::this_thread::sleep_for(std::chrono::microseconds(100 * round));
    ::kill(child, SIGKILL);
    status_of(child);
    killed_while_writing += count_files(device, ".tmp") > 0;
    const CapturedLog log;
    CHECK(home.store.read(record.key.device).size() == (round == 0 ? 1 : 2));
    CHECK(log.warnings().empty());
    // What is left is removed by the next writer, once nobody can be writing it.
    for (const auto& entry : fs::directory_iterator(device))
      if (entry.path().extension() == ".tmp")
        fs::last_write_time(entry.path(), fs::file_time_type::clock::now() - std::chrono::hours(2));
    write_all(device / "fresh.tmp", "half a record");
    RecordStore(home.folder.path(), FolderUse::kCache).publish(made_up_record(128));
    CHECK(count_files(device, ".tmp") == 1);
    fs::remove(device / "fresh.tmp");
  }
  CHECK(killed_while_writing > 0);  // or this test saw nothing
}

TEST_CASE("records: damaged, foreign and hostile files are passed over, each with one warning") {
  Home home;
  RecordStore& store = home.store;
  const TuningRecord good = made_up_record(64), moved = made_up_record(128), loose = made_up_record(96);
  for (const TuningRecord& record : {good, moved, loose}) store.publish(record);
  const fs::path device = home.file_of(good).parent_path();
  fs::rename(home.file_of(moved), device / "renamed.json");
  REQUIRE(::chmod(home.file_of(loose).c_str(), 0666) == 0);
  write_all(device / "half.json", record_text(good).substr(0, 300));
  write_all(device / "rubbish.json", std::string(1000, '\xff'));
  write_all(device / "empty.json", "");
  {
    std::ofstream(device / "huge.json").seekp(std::streamoff{1} << 33).put('x');
  }
  REQUIRE(::mkfifo((device / "pipe.json").c_str(), 0600) == 0);
  fs::create_directory(device / "folder.json");
  fs::create_symlink("/dev/zero", device / "endless.json");
  write_all(device / "note.txt", "nobody's business");
  for (const auto& entry : fs::directory_iterator(device))
    if (entry.is_regular_file() && entry.path() != home.file_of(loose)) ::chmod(entry.path().c_str(), 0600);

  const CapturedLog log;
  for (int i = 0; i < 2; ++i) CHECK(texts_of(store.read(good.key.device)) == record_text(good));
  const std::vector<std::string> warnings = log.warnings();
  CHECK(warnings.size() == 9);
  const auto said = [&](const std::string& file, const std::string& reason) {
    std::string about;
    for (const std::string& warning : warnings)
      if (warning == Containing{"/" + file + " is passed over"}) about = warning;
    CHECK_MESSAGE(about == Containing{reason}, file);
  };
  said("renamed.json", "the record of another key");
  said(record_file_name(loose.key), "others may write it");
  said("half.json", "parse error");
  said("rubbish.json", "parse error");
  said("empty.json", "parse error");
  said("huge.json", "File too large");
  said("pipe.json", "Invalid argument");
  said("folder.json", "Is a directory");
  said("endless.json", "endless.json");
}

TEST_CASE("records: a folder that others may write is passed over, and nothing is put there") {
  for (const int level : {0, 1, 2}) {
    Home home;
    RecordStore& store = home.store;
    const TuningRecord record = made_up_record();
    store.publish(record);
    const fs::path loose = level == 0   ? home.folder.path()
                           : level == 1 ? store.folder()
                                        : home.file_of(record).parent_path();
    REQUIRE(::chmod(loose.c_str(), 0777) == 0);
    const CapturedLog log;
    CHECK(store.read(record.key.device).empty());
    CHECK(store.read_all().empty());
    REQUIRE(log.warnings().size() == 1);
    CHECK(log.warnings()[0] == Containing{"other users may write into the folder " + loose.string()});
    store.publish(made_up_record(128));
    CHECK(count_files(home.folder.path(), "") == 1);
    CHECK(store.read(record.key.device).size() == 1);  // from memory
    RecordStore pack(home.folder.path(), FolderUse::kPack);
    CHECK(pack.read(record.key.device).empty());
    CHECK_THROWS_AS(pack.publish(record), FileError);
  }
}

TEST_CASE("records: another user's are not taken into a cache, a pack may be anybody's" * doctest::skip(!kIsRoot)) {
  Home home;
  const TuningRecord record = made_up_record();
  home.store.publish(record);
  const fs::path file = home.file_of(record), device = file.parent_path();
  for (const fs::path& path : {home.folder.path(), home.store.folder(), device, file})
    REQUIRE(::chown(path.c_str(), kSomebody, kSomebody) == 0);
  const CapturedLog log;
  CHECK(home.store.read(record.key.device).empty());
  CHECK(RecordStore(home.folder.path(), FolderUse::kPack).read(record.key.device).size() == 1);
  REQUIRE(log.warnings().size() == 1);
  CHECK(log.warnings()[0] == Containing{"belongs to user 12345"});
}

TEST_CASE("records: those of a pack that is a zip file") {
  const TemporaryFolder folder;
  const TuningRecord record = made_up_record();
  const std::string slug = "tuning/" + device_slug(record.key.device) + "/";
  const fs::path path = folder / "pack.zip";
  const auto pack_of = [&](const std::map<std::string, std::string>& files, mode_t mode = 0644) {
    write_all(path, stored_zip(files));
    REQUIRE(::chmod(path.c_str(), mode) == 0);
    return RecordStore(path, FolderUse::kPack);
  };
  const std::map<std::string, std::string> files = {
      {slug + record_file_name(record.key), record_text(record)}, {"manifest.json", "{}"}, {"tuning/x.json", "{}"}};
  {
    const CapturedLog log;
    CHECK(texts_of(pack_of(files).read(record.key.device)) == record_text(record));
    CHECK(texts_of(pack_of(files).read_all()) == record_text(record));
    CHECK(pack_of(files).read(made_up_device("Tesla T5")).empty());
    CHECK(pack_of({}).read_all().empty());
    CHECK(log.warnings().empty());
  }
  const auto told = [&](const RecordStore& pack) {
    const CapturedLog log;
    CHECK(pack.read(record.key.device).empty());
    CHECK(pack.read_all().empty());
    REQUIRE(log.warnings().size() >= 1);
    return log.warnings()[0];
  };
  CHECK(told(pack_of(files, 0666)) == Containing{"other users may write the file"});
  CHECK(told(pack_of({{slug + "other.json", record_text(record)}})) == Containing{"of another key"});
  CHECK(told(pack_of({{slug + record_file_name(record.key), std::string(kMostRecordBytes + 1, ' ')}})) ==
        Containing{"larger than any record"});
  pack_of(files);
  write_all(path, "no zip");
  CHECK(told(RecordStore(path, FolderUse::kPack)) == Containing{"no zip file"});
}

TEST_CASE("records: without a folder memory serves, and that is said once") {
  for (const char* folder : {"", "/proc/no such folder"}) {
    RecordStore store(folder, FolderUse::kCache);
    const CapturedLog log;
    TuningRecord record = made_up_record();
    for (const int seconds : {1, 2}) {
      record.seconds = seconds;
      store.publish(record);
    }
    store.publish(made_up_record(128));
    CHECK(texts_of(store.read_all()) == record_text(record) + record_text(made_up_record(128)));
    CHECK(store.read(made_up_device("Another")).empty());
    CHECK(log.warnings().size() <= 1);  // process-wide once for each reason
    for (const std::string& warning : log.warnings()) {
      CHECK(warning == Containing{"kept in memory only"});
      CHECK(warning == Containing{"FLASH_ATTN_JIT_CACHE_DIR"});
    }
  }
}

TEST_CASE("records: one that no reader would take is refused before it is written") {
  Home home;
  TuningRecord record = made_up_record();
  record.winner = {1, 1, 1, 1, {}};
  CHECK_THROWS_WITH_AS(home.store.publish(record), doctest::Contains("winner"), RecordError);
  CHECK(count_files(home.folder.path(), "") == 0);
}

TEST_CASE("records: the cache's upkeep neither touches them nor counts them") {
  Home home;
  home.store.publish(made_up_record());
  CHECK(list_cache(home.folder.path()).empty());
  for (const CacheRemoval& removal :
       {evict(home.folder.path(), 0, 0), prune_cache(home.folder.path(), 0), clear_cache(home.folder.path()),
        clear_built_by(home.folder.path(), "nvrtc 12.9")}) {
    CHECK(removal.files == 0);
    CHECK(removal.bytes_left == 0);
    CHECK(removal.fault.empty());
  }
  CHECK(home.store.read_all().size() == 1);
}

TEST_CASE("the digest of a family's templates: any edit of its own changes it, one of another family's does not") {
  const TemplateSet& whole = embedded_templates();
  for (const KernelKind kind : kKernelKinds) {
    const std::string digest = template_digest(kind, whole);
    CHECK(digest.size() == 64);
    const auto own = templates_of(kind, whole);
    CHECK(own.size() < whole.size());
    for (const auto& [file, text] : whole) {
      CAPTURE(file);
      TemplateSet edited = whole;
      edited[file] += "// \n";
      CHECK((template_digest(kind, edited) != digest) == own.contains(file));
      edited.erase(file);
      CHECK(template_digest(kind, edited) == (own.contains(file) ? "" : digest));
    }
  }
  CHECK(template_digest(KernelKind::kForward, whole) != template_digest(KernelKind::kBackwardDq, whole));
}
