// Whose kernels are run: not those that somebody else can have put there.
#include <doctest/doctest.h>

#include <sys/stat.h>
#include <unistd.h>

#include "runtime/library/pack.h"
#include "tests/cpp/cache_fixture.h"
#include "tests/cpp/captured_log.h"
#include "tests/cpp/containing.h"
#include "tests/cpp/processes.h"
#include "tests/cpp/temporary_folder.h"

using namespace flash_attn_jit;
using namespace flash_attn_jit::testing;
namespace fs = std::filesystem;

namespace {

constexpr uid_t kSomebody = 12345, kSomebodyElse = 23456;
const bool kIsRoot = ::geteuid() == 0;

void give(const fs::path& path, uid_t user, mode_t mode) {
  REQUIRE(::chown(path.c_str(), user, user) == 0);
  REQUIRE(::chmod(path.c_str(), mode) == 0);
}

void set_mode(const fs::path& path, mode_t mode) { REQUIRE(::chmod(path.c_str(), mode) == 0); }

// A folder with one kernel in it, and a cache elsewhere that takes it for a pack.
struct PackSetting {
  TemporaryFolder folder;
  KernelId id = made_up_id("packed");
  fs::path pack = folder / "pack", file = pack / id.file_name();

  PackSetting() {
    write_all(file, serialize({id, made_up_kernel("from the pack")}));
    set_mode(pack, 0755);
    set_mode(file, 0644);
  }

  bool serves(const KernelId& asked) const {
    KernelCacheSettings settings = settings_for(folder / "cache");
    settings.prebuilt = pack;
    return KernelCache(settings).find(asked).has_value();
  }
};

}  // namespace

TEST_CASE("trust: a file of another user in a folder of our own is set aside and built anew" *
          doctest::skip(!kIsRoot)) {
  const TemporaryFolder folder;
  const KernelId id = made_up_id("a");
  const fs::path file = folder / id.file_name();
  write_all(file, serialize({id, made_up_kernel("planted")}));
  give(file, kSomebody, 0644);
  const CapturedLog log;
  CHECK_FALSE(found_anew(folder.path(), id));
  CountedBuild build;
  CHECK(KernelCache(settings_for(folder.path())).get_or_build(id, build.function()).kernel.image == "image");
  CHECK(found_anew(folder.path(), id)->kernel.image == "image");
  REQUIRE(log.warnings().size() == 1);
  CHECK(log.warnings()[0] == Containing{"belongs to user 12345"});
}

TEST_CASE("trust: a file that others may write is set aside and built anew") {
  for (const mode_t mode : {0620, 0602, 0666}) {
    const TemporaryFolder folder;
    const KernelId id = made_up_id("a");
    const fs::path file = folder / id.file_name();
    write_all(file, serialize({id, made_up_kernel("planted")}));
    set_mode(file, mode);
    const CapturedLog log;
    CHECK_FALSE(found_anew(folder.path(), id));
    CountedBuild build;
    CHECK(KernelCache(settings_for(folder.path())).get_or_build(id, build.function()).kernel.image == "image");
    REQUIRE(log.warnings().size() == 1);
    CHECK(log.warnings()[0] == Containing{"others may write"});
  }
}

TEST_CASE("trust: the listing names what is not trusted") {
  const TemporaryFolder folder;
  const KernelId good = made_up_id("good"), loose = made_up_id("loose");
  for (const KernelId& id : {good, loose}) write_all(folder / id.file_name(), serialize({id, made_up_kernel("image")}));
  set_mode(folder / good.file_name(), 0600);
  set_mode(folder / loose.file_name(), 0666);
  for (const CacheEntry& entry : list_cache(folder.path())) {
    CHECK(entry.file.has_value() == (entry.path.filename() == good.file_name()));
    if (!entry.file) CHECK(entry.fault == Containing{"others may write"});
  }
  set_mode(folder.path(), 0777);
  for (const CacheEntry& entry : list_cache(folder.path())) CHECK_FALSE(entry.file);
}

TEST_CASE("trust: the advice about a folder that others may write is to remove it, not to keep what lies in it") {
  const TemporaryFolder folder;
  set_mode(folder.path(), 0777);
  const CapturedLog log;
  CHECK_FALSE(found_anew(folder.path(), made_up_id("a")));
  REQUIRE(log.warnings().size() == 1);
  CHECK(log.warnings()[0] == Containing{"remove"});
  CHECK_FALSE(log.warnings()[0] == Containing{"chmod"});
}

TEST_CASE("trust: what root left in an image is read by its user, and what that user lacks is told" *
          doctest::skip(!kIsRoot)) {
  const TemporaryFolder folder;
  const KernelId id = made_up_id("a");
  write_all(folder / id.file_name(), serialize({id, made_up_kernel("of the image")}));
  set_mode(folder / id.file_name(), 0644);
  set_mode(folder.path(), 0755);
  CHECK(code_as_user(kSomebody, [&] {
          const CapturedLog log;
          KernelCache cache(settings_for(folder.path()));
          const auto found = cache.find(id);
          if (!found || found->kernel.image != "of the image") return 1;
          if (!log.warnings().empty()) return 2;
          CountedBuild build;
          for (int i = 0; i < 2; ++i) cache.get_or_build(made_up_id("b"), build.function());
          if (build.calls != 1 || log.warnings().size() != 1) return 3;
          return log.warnings()[0] == Containing{"FLASH_ATTN_JIT_PREBUILT"} ? 0 : 4;
        }) == 0);
}

TEST_CASE("trust: a cache of root's that its user may not open is told with the way out" * doctest::skip(!kIsRoot)) {
  const TemporaryFolder folder;
  const fs::path dir = folder / "cache";
  CountedBuild build;
  KernelCache(settings_for(dir)).get_or_build(made_up_id("a"), build.function());
  set_mode(folder.path(), 0755);
  CHECK(code_as_user(kSomebody, [&] {
          const CapturedLog log;
          KernelCache cache(settings_for(dir));
          for (int i = 0; i < 2; ++i) cache.get_or_build(made_up_id("a"), build.function());
          if (build.calls != 2 || log.warnings().size() != 1) return 1;
          return log.warnings()[0] == Containing{"FLASH_ATTN_JIT_PREBUILT"} ? 0 : 2;
        }) == 0);
}

TEST_CASE("trust: a pack that others may write is passed over") {
  for (const auto& [folder_mode, file_mode] : {std::pair<mode_t, mode_t>{0777, 0644}, {0775, 0644}, {0755, 0664}}) {
    const PackSetting setting;
    const CapturedLog log;
    CHECK(setting.serves(setting.id));
    set_mode(setting.pack, folder_mode);
    set_mode(setting.file, file_mode);
    CHECK_FALSE(setting.serves(setting.id));
    CHECK_FALSE(setting.serves(made_up_id("another")));
    REQUIRE(log.warnings().size() == 1);
    CHECK(log.warnings()[0] == Containing{"may write"});
    CHECK(log.warnings()[0] == Containing{setting.pack.string()});
  }
}

TEST_CASE("trust: a pack may be anybody's, but all of it one owner's or root's" * doctest::skip(!kIsRoot)) {
  const PackSetting setting;
  const CapturedLog log;
  give(setting.pack, kSomebody, 0755);
  CHECK(setting.serves(setting.id));
  give(setting.file, kSomebody, 0644);
  CHECK(setting.serves(setting.id));
  CHECK(log.warnings().empty());
  give(setting.file, kSomebodyElse, 0644);
  CHECK_FALSE(setting.serves(setting.id));
  REQUIRE(log.warnings().size() == 1);
  CHECK(log.warnings()[0] == Containing{"belongs to user 23456"});
}

TEST_CASE("trust: a pack is not made where others may write") {
  const TemporaryFolder folder;
  set_mode(folder.path(), 0777);
  CHECK_THROWS_WITH_AS(open_pack_for_writing(Config{}, folder.path()), doctest::Contains("may write"), FileError);
  KernelCacheSettings settings = settings_for(folder.path());
  settings.use = FolderUse::kPack;
  CountedBuild build;
  CHECK_THROWS_AS(KernelCache(settings).get_or_build(made_up_id("a"), build.function()), FileError);
  CHECK(build.calls == 0);
}

TEST_CASE("trust: code that would run in this process is never taken from a pack") {
  const PackSetting setting;
  KernelId host = setting.id;
  host.is_host_code = true;
  CHECK(setting.serves(setting.id));
  CHECK_FALSE(setting.serves(host));
}
