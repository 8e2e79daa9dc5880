#include <doctest/doctest.h>

#include <sys/stat.h>

#include <algorithm>
#include <thread>

#include "tests/cpp/cache_fixture.h"
#include "tests/cpp/captured_log.h"
#include "tests/cpp/containing.h"
#include "tests/cpp/processes.h"
#include "tests/cpp/temporary_folder.h"

using namespace flash_attn_jit;
using namespace flash_attn_jit::testing;
namespace fs = std::filesystem;

namespace {

std::vector<std::string> names_in(const fs::path& dir) {
  std::vector<std::string> names;
  for (const auto& entry : fs::directory_iterator(dir)) names.push_back(entry.path().filename().string());
  std::sort(names.begin(), names.end());
  return names;
}

mode_t mode_of(const fs::path& path) {
  struct stat status{};
  REQUIRE(::stat(path.c_str(), &status) == 0);
  return status.st_mode & 0777;
}

}  // namespace

TEST_CASE("cache: built once, then found") {
  const TemporaryFolder folder;
  const fs::path dir = folder / "below" / "cache";
  const KernelId id = made_up_id("a");
  CountedBuild build;
  KernelCache cache(settings_for(dir));
  CHECK_FALSE(cache.find(id));
  CHECK(cache.get_or_build(id, build.function()).origin == KernelOrigin::kCompiled);
  CHECK(cache.get_or_build(id, build.function()).origin == KernelOrigin::kDiskCache);
  CHECK(build.calls == 1);
  CHECK(found_anew(dir, id)->kernel.image == "image");
  CHECK_FALSE(found_anew(dir, made_up_id("b")));
  CHECK(mode_of(dir) == 0700);
  CHECK(mode_of(dir / id.file_name()) == 0600);
  CHECK(names_in(dir) == std::vector<std::string>{id.file_name()});
}

TEST_CASE("cache: what another process built after one looked in vain is not built again") {
  const TemporaryFolder folder;
  const KernelId id = made_up_id("a");
  CountedBuild theirs, ours;
  KernelCache cache(settings_for(folder.path()));
  CHECK_FALSE(cache.find(id));
  KernelCache(settings_for(folder.path())).get_or_build(id, theirs.function());
  CHECK(cache.build(id, ours.function()).origin == KernelOrigin::kDiskCache);
  CHECK(theirs.calls == 1);
  CHECK(ours.calls == 0);
  CHECK(cache.lookups() == 1);
}

TEST_CASE("cache: a failed build leaves nothing, and the next may succeed") {
  const TemporaryFolder folder;
  const KernelId id = made_up_id("a");
  KernelCache cache(settings_for(folder.path()));
  CHECK_THROWS_AS(cache.get_or_build(id, []() -> CompiledKernel { throw Error("no"); }), Error);
  CHECK(names_in(folder.path()).empty());
  CountedBuild build;
  CHECK(cache.get_or_build(id, build.function()).origin == KernelOrigin::kCompiled);
  CHECK(build.calls == 1);
}

TEST_CASE("cache: whatever is wrong with a file, it is said once, set aside and built anew") {
  const KernelId id = made_up_id("a");
  const std::string good = serialize({id, made_up_kernel("image")});
  const std::string of_another_key = serialize({made_up_id("b"), made_up_kernel("image")});
  std::string flipped = good;
  flipped[good.size() - 2] ^= 4;
  for (const std::string& bad : {std::string(), good.substr(0, good.size() / 2), flipped, of_another_key,
                                 std::string("something else altogether")}) {
    const TemporaryFolder folder;
    const CapturedLog log;
    write_all(folder / id.file_name(), bad);
    KernelCache cache(settings_for(folder.path()));
    CHECK_FALSE(cache.find(id));
    CountedBuild build;
    CHECK(cache.get_or_build(id, build.function()).kernel.image == "image");
    CHECK(cache.get_or_build(id, build.function()).origin == KernelOrigin::kDiskCache);
    CHECK(build.calls == 1);
    CHECK(read_all(folder / (id.file_name() + ".broken")) == bad);
    REQUIRE(log.warnings().size() == 1);
    CHECK(log.warnings()[0] == Containing{id.file_name()});
  }
}

TEST_CASE("cache: a pipe or a folder in a kernel's place is set aside, and nobody waits for it") {
  const KernelId id = made_up_id("a");
  for (const bool pipe : {true, false}) {
    const TemporaryFolder folder;
    const CapturedLog log;
    const fs::path path = folder / id.file_name();
    REQUIRE((pipe ? ::mkfifo(path.c_str(), 0600) == 0 : fs::create_directory(path)));
    KernelCache cache(settings_for(folder.path()));
    CountedBuild build;
    CHECK(cache.get_or_build(id, build.function()).kernel.image == "image");
    CHECK(cache.get_or_build(id, build.function()).origin == KernelOrigin::kDiskCache);
    CHECK(log.warnings().size() == 1);
  }
}

TEST_CASE("cache: threads that ask for one kernel build it once, others do not wait for it") {
  const TemporaryFolder folder;
  KernelCache cache(settings_for(folder.path()));
  std::atomic<int> builds = 0;
  std::atomic<bool> building = false, finish = false;
  const auto slow_build = [&] {
    ++builds;
    building = true;
    while (!finish) std::this_thread::yield();
    return made_up_kernel("slow");
  };
  std::vector<std::thread> threads;
  std::atomic<int> right = 0;
  for (int i = 0; i < 8; ++i)
    threads.emplace_back([&] { right += cache.get_or_build(made_up_id("slow"), slow_build).kernel.image == "slow"; });
  while (!building) std::this_thread::yield();
  CountedBuild other;
  CHECK(cache.get_or_build(made_up_id("other"), other.function()).kernel.image == "image");
  CHECK(cache.get_or_build(made_up_id("other"), other.function()).origin == KernelOrigin::kDiskCache);
  finish = true;
  for (std::thread& thread : threads) thread.join();
  CHECK(builds == 1);
  CHECK(right == 8);
}

TEST_CASE("cache: what a build throws reaches every thread that waits for it") {
  const TemporaryFolder folder;
  KernelCache cache(settings_for(folder.path()));
  std::atomic<int> builds = 0, failures = 0;
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i)
    threads.emplace_back([&] {
      try {
        cache.get_or_build(made_up_id("a"), [&]() -> CompiledKernel {
          ++builds;
          std::this_thread::sleep_for(std::chrono::milliseconds(100));
          throw Error("refused");
        });
      } catch (const Error& error) {
        failures += std::string(error.what()) == "refused";
      }
    });
  for (std::thread& thread : threads) thread.join();
  CHECK(failures == 4);
  CHECK(builds >= 1);
  CHECK(builds <= 4);
}

TEST_CASE("cache: a pack is looked in first and never written") {
  const TemporaryFolder folder;
  const KernelId packed = made_up_id("packed"), broken = made_up_id("broken");
  const fs::path pack = folder / "pack";
  write_all(pack / packed.file_name(), serialize({packed, made_up_kernel("from the pack")}));
  write_all(pack / broken.file_name(), "rubbish");
  const auto before = names_in(pack);

  KernelCacheSettings settings = settings_for(folder / "cache");
  settings.prebuilt = pack;
  KernelCache cache(settings);
  const CapturedLog log;
  CountedBuild build;
  const FoundKernel found = cache.get_or_build(packed, build.function());
  CHECK(found.origin == KernelOrigin::kPrebuilt);
  CHECK(found.kernel.image == "from the pack");
  CHECK(build.calls == 0);
  CHECK_FALSE(fs::exists(folder / "cache"));

  CHECK(cache.get_or_build(broken, build.function()).origin == KernelOrigin::kCompiled);
  CHECK(cache.get_or_build(broken, build.function()).origin == KernelOrigin::kDiskCache);
  CHECK(names_in(pack) == before);
  REQUIRE(log.warnings().size() == 1);
  CHECK(log.warnings()[0] == Containing{"passed over"});
}

TEST_CASE("cache: a stored kernel that cannot be used here is a miss with a name, and is replaced") {
  const TemporaryFolder folder;
  const KernelId id = made_up_id("a");
  KernelCache cache(settings_for(folder.path()));
  CountedBuild newer{.image = "newer"}, older{.image = "older"};
  cache.get_or_build(id, newer.function());
  const auto objection = [](const CompiledKernel& kernel) -> std::optional<std::string> {
    if (kernel.image == "newer") return "the driver is too old for it (a)";
    return std::nullopt;
  };
  const CapturedLog log;
  CHECK_FALSE(cache.find(id, objection));
  CHECK(cache.get_or_build(id, older.function(), objection).kernel.image == "older");
  CHECK(found_anew(folder.path(), id)->kernel.image == "older");
  CHECK_FALSE(fs::exists(folder / (id.file_name() + ".broken")));
  REQUIRE(log.warnings().size() == 1);
  CHECK(log.warnings()[0] == Containing{"the driver is too old for it"});
}

TEST_CASE("cache: a folder that somebody else may write is not trusted") {
  const TemporaryFolder folder;
  const KernelId id = made_up_id("a");
  CountedBuild build;
  KernelCache(settings_for(folder.path())).get_or_build(id, build.function());
  REQUIRE(::chmod(folder.path().c_str(), 0777) == 0);
  const auto before = names_in(folder.path());

  const CapturedLog log;
  KernelCache cache(settings_for(folder.path()));
  CHECK_FALSE(cache.find(id));
  CHECK(cache.get_or_build(id, build.function()).origin == KernelOrigin::kCompiled);
  CHECK(cache.find(id)->kernel.image == "image");  // from memory
  cache.get_or_build(made_up_id("b"), build.function());
  CHECK(build.calls == 3);
  CHECK(names_in(folder.path()) == before);
  REQUIRE(log.warnings().size() == 1);
  CHECK(log.warnings()[0] == Containing{"other users may write"});
}

TEST_CASE("cache: a folder of another user is not trusted" * doctest::skip(::geteuid() != 0)) {
  const TemporaryFolder folder;
  const KernelId id = made_up_id("a");
  CountedBuild build;
  KernelCache(settings_for(folder.path())).get_or_build(id, build.function());
  REQUIRE(::chown(folder.path().c_str(), 12345, 12345) == 0);
  const CapturedLog log;
  CHECK_FALSE(found_anew(folder.path(), id));
  REQUIRE(log.warnings().size() == 1);
  CHECK(log.warnings()[0] == Containing{"belongs to user 12345"});
}

TEST_CASE("cache: where no folder can be, memory serves, and that is said once") {
  const TemporaryFolder folder;
  write_all(folder / "file", "");
  const CapturedLog log;
  KernelCache cache(settings_for(folder / "file" / "cache"));  // binds root too
  CountedBuild build;
  for (const char* name : {"a", "b", "a", "b"})
    CHECK(cache.get_or_build(made_up_id(name), build.function()).kernel.image == "image");
  CHECK(build.calls == 2);
  REQUIRE(log.warnings().size() == 1);
  CHECK(log.warnings()[0] == Containing{"memory only"});
  CHECK(log.warnings()[0] == Containing{"FLASH_ATTN_JIT_CACHE_DIR"});
}

TEST_CASE("a pack that cannot be written is an error") {
  const TemporaryFolder folder;
  write_all(folder / "file", "");
  KernelCacheSettings settings = settings_for(folder / "file" / "pack");
  settings.use = FolderUse::kPack;
  CountedBuild build;
  CHECK_THROWS_AS(KernelCache(settings).get_or_build(made_up_id("a"), build.function()), FileError);
}

TEST_CASE("a pack is for everybody to read") {
  const TemporaryFolder folder;
  KernelCacheSettings settings = settings_for(folder / "pack");
  settings.use = FolderUse::kPack;
  CountedBuild build;
  const mode_t old = ::umask(022);
  KernelCache(settings).get_or_build(made_up_id("a"), build.function());
  ::umask(old);
  CHECK(mode_of(settings.dir) == 0755);
  CHECK(mode_of(settings.dir / made_up_id("a").file_name()) == 0644);
}

TEST_CASE("cache: the least recently used goes first") {
  const TemporaryFolder folder;
  KernelCacheSettings settings = settings_for(folder.path());
  CountedBuild build{.image = std::string(1000, 'x')};
  const std::uint64_t size = serialize({made_up_id("a"), made_up_kernel(build.image)}).size();
  settings.max_bytes = 3 * size + size / 2;
  KernelCache cache(settings);
  const auto is_there = [&](const char* name) { return fs::exists(folder / made_up_id(name).file_name()); };
  const auto tick = [] { std::this_thread::sleep_for(std::chrono::milliseconds(20)); };
  for (const char* name : {"a", "b", "c"}) cache.get_or_build(made_up_id(name), build.function()), tick();
  REQUIRE(cache.find(made_up_id("a")));  // now b is the oldest
  tick();
  cache.get_or_build(made_up_id("d"), build.function());
  CHECK(is_there("a"));
  CHECK_FALSE(is_there("b"));
  CHECK(is_there("c"));
  CHECK(is_there("d"));
}

TEST_CASE("cache: a kernel larger than the bound is kept in memory") {
  const TemporaryFolder folder;
  const CapturedLog log;
  KernelCacheSettings settings = settings_for(folder.path());
  settings.max_bytes = 100;
  KernelCache cache(settings);
  CountedBuild build;
  for (int i = 0; i < 3; ++i) cache.get_or_build(made_up_id("a"), build.function());
  CHECK(build.calls == 1);
  CHECK(names_in(folder.path()).empty());
  REQUIRE(log.warnings().size() == 1);
  CHECK(log.warnings()[0] == Containing{"bounded to 100 bytes"});
}

TEST_CASE("cache: prune, clear and list touch what is theirs alone") {
  const TemporaryFolder folder;
  const KernelId a = made_up_id("a"), b = made_up_id("b"), c = made_up_id("c");
  KernelCache cache(settings_for(folder.path()));
  CountedBuild build;
  for (const KernelId& id : {a, b}) cache.get_or_build(id, build.function());
  write_all(folder / c.file_name(), "rubbish");
  CHECK(cache.keep_refused_source(a, "source") == (folder / source_name(a)).string());
  write_all(folder / (b.file_name() + ".broken"), "rubbish");
  write_all(folder / temporary_name(c.key), "left by the dead");
  write_all(folder / lock_name(c.key), "");
  const std::vector<std::string> foreign = {"foreign.kernel", "notes.txt", "x.lock", "y.tmp", "z.0123.kernel"};
  for (const std::string& name : foreign) write_all(folder / name, "mine");

  const auto entries = list_cache(folder.path());
  REQUIRE(entries.size() == 4);
  CHECK(std::count_if(entries.begin(), entries.end(), [](const CacheEntry& e) { return e.file.has_value(); }) == 2);
  for (const CacheEntry& entry : entries) CHECK(entry.file.has_value() == entry.fault.empty());

  CHECK(prune_cache(folder.path(), 1 << 20).files == 3);
  std::vector<std::string> expected = foreign;
  for (const KernelId& id : {a, b, c}) expected.push_back(id.file_name());
  std::sort(expected.begin(), expected.end());
  CHECK(names_in(folder.path()) == expected);

  CHECK(prune_cache(folder.path(), 0).files == 3);
  cache.get_or_build(a, build.function());
  CHECK(clear_cache(folder.path()).files == 1);
  CHECK(names_in(folder.path()) == foreign);
}

TEST_CASE("cache: a folder that is not there is empty") {
  const TemporaryFolder folder;
  CHECK(list_cache(folder / "none").empty());
  CHECK(prune_cache(folder / "none", 0).files == 0);
  CHECK(clear_cache(folder / "none").files == 0);
}

TEST_CASE("cache: what is being built is not cleared away") {
  const TemporaryFolder folder;
  const KernelId id = made_up_id("a");
  KernelCache cache(settings_for(folder.path()));
  cache.get_or_build(id, [&] {
    write_all(folder / temporary_name(id.key), "half");
    const auto before = names_in(folder.path());
    CHECK(before.size() == 2);  // the lock and the half
    CHECK(clear_cache(folder.path()).files == 0);
    CHECK(names_in(folder.path()) == before);
    return made_up_kernel("image");
  });
  CHECK(clear_cache(folder.path()).files == 2);
}

TEST_CASE("cache: without any folder memory serves, and that is said once") {
  const CapturedLog log;
  KernelCache cache(settings_for(""));
  CountedBuild build;
  for (const char* name : {"a", "b", "a", "b"})
    CHECK(cache.get_or_build(made_up_id(name), build.function()).kernel.image == "image");
  CHECK(build.calls == 2);
  CHECK(cache.keep_refused_source(made_up_id("a"), "source") == Containing{"nowhere"});
  CHECK_FALSE(fs::exists(made_up_id("a").file_name()));
  REQUIRE(log.warnings().size() == 1);
  CHECK(log.warnings()[0] == Containing{"HOME"});
  CHECK(log.warnings()[0] == Containing{"FLASH_ATTN_JIT_CACHE_DIR"});
}

TEST_CASE("cache: bytes that cannot be removed count as there" * doctest::skip(::geteuid() != 0)) {
  const TemporaryFolder folder;
  const auto file_of = [&](const char* name) { return folder / made_up_id(name).file_name(); };
  constexpr uid_t kSomebody = 12345;
  for (const char* name : {"of root", "old", "new"}) {
    write_all(file_of(name), std::string(1000, 'x'));
    if (name != std::string("of root")) REQUIRE(::chown(file_of(name).c_str(), kSomebody, kSomebody) == 0);
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
  }
  REQUIRE(::chmod(folder.path().c_str(), 01777) == 0);  // everybody may remove their own files
  CHECK(code_as_user(kSomebody, [&] {
          const CacheRemoval removal = evict(folder.path(), 2000, 2000);
          return removal.files == 1 && removal.bytes == 1000 ? 0 : 1;
        }) == 0);
  CHECK(fs::exists(file_of("of root")));
  CHECK_FALSE(fs::exists(file_of("old")));
  CHECK(fs::exists(file_of("new")));
}

TEST_CASE("cache: a store with room to spare does not read the folder, and the bound holds all the same") {
  const TemporaryFolder folder;
  KernelCacheSettings settings = settings_for(folder.path());
  CountedBuild build{.image = std::string(1000, 'x')};
  const std::uint64_t size = serialize({made_up_id("0"), made_up_kernel(build.image)}).size();
  settings.max_bytes = 100 * size;
  KernelCache cache(settings);
  cache.get_or_build(made_up_id("0"), build.function());
  const fs::path dead = folder / temporary_name(made_up_id("dead").key);  // goes when the folder is read
  write_all(dead, "half a kernel");
  cache.get_or_build(made_up_id("1"), build.function());
  CHECK(fs::exists(dead));
  for (int i = 2; i < 300; ++i) {
    cache.get_or_build(made_up_id(std::to_string(i)), build.function());
    std::uint64_t bytes = 0;
    for (const CacheEntry& entry : list_cache(folder.path())) bytes += entry.bytes;
    REQUIRE(bytes <= settings.max_bytes);
    REQUIRE(fs::exists(folder / made_up_id(std::to_string(i)).file_name()));
  }
  CHECK_FALSE(fs::exists(dead));
  CHECK(list_cache(folder.path()).size() > 80);
}

TEST_CASE("cache: the kernel just stored is not what makes room") {
  const TemporaryFolder folder;
  KernelCacheSettings settings = settings_for(folder.path());
  CountedBuild build{.image = std::string(10000, 'x')};
  const std::uint64_t size = serialize({made_up_id("a"), made_up_kernel(build.image)}).size();
  settings.max_bytes = size + 10;
  KernelCache cache(settings);
  for (const char* name : {"a", "b", "c"}) {
    cache.get_or_build(made_up_id(name), build.function());
    CHECK(found_anew(folder.path(), made_up_id(name)));
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
  }
  CHECK(list_cache(folder.path()).size() == 1);
}
