// The cache among processes: races, deaths, limits.
#include <doctest/doctest.h>

#include <fcntl.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <functional>
#include <thread>

#include "tests/cpp/cache_fixture.h"
#include "tests/cpp/captured_log.h"
#include "tests/cpp/temporary_folder.h"

using namespace flash_attn_jit;
using namespace flash_attn_jit::testing;
namespace fs = std::filesystem;

namespace {

pid_t start_process(const std::function<int()>& work) {
  const pid_t child = ::fork();
  REQUIRE(child >= 0);
  if (child != 0) return child;
  int code = 99;
  try {
    code = work();
  } catch (...) {
  }
  ::_exit(code);
}

int status_of(pid_t child) {
  int status = 0;
  REQUIRE(::waitpid(child, &status, 0) == child);
  return status;
}

void append_byte(const fs::path& path) {
  const int fd = ::open(path.c_str(), O_WRONLY | O_APPEND | O_CREAT, 0600);
  if (fd < 0 || ::write(fd, "x", 1) != 1 || ::close(fd) != 0) ::_exit(98);
}

void sleep_ms(int ms) { std::this_thread::sleep_for(std::chrono::milliseconds(ms)); }

std::size_t count_names(const fs::path& dir, const std::string& suffix) {
  std::size_t count = 0;
  for (const auto& entry : fs::directory_iterator(dir)) count += entry.path().string().ends_with(suffix);
  return count;
}

}  // namespace

TEST_CASE("processes that ask for one kernel build it once") {
  const TemporaryFolder folder;
  const fs::path dir = folder / "cache", builds = folder / "builds";
  constexpr int kProcesses = 12, kKernels = 3;
  std::vector<pid_t> children;
  for (int i = 0; i < kProcesses; ++i)
    children.push_back(start_process([&] {
      KernelCache cache(settings_for(dir));
      for (int kernel = 0; kernel < kKernels; ++kernel) {
        const std::string name = std::to_string(kernel);
        const FoundKernel found = cache.get_or_build(made_up_id(name), [&] {
          append_byte(builds);
          sleep_ms(50);
          return made_up_kernel(name);
        });
        if (found.kernel.image != name) return 1;
      }
      return 0;
    }));
  for (const pid_t child : children) CHECK(status_of(child) == 0);
  CHECK(fs::file_size(builds) == kKernels);
  CHECK(count_names(dir, ".kernel") == kKernels);
  CHECK(count_names(dir, "") == kKernels);  // no locks, no temporaries
}

TEST_CASE("a process killed while it builds holds up nobody") {
  const TemporaryFolder folder;
  const KernelId id = made_up_id("a");
  const pid_t child = start_process([&] {
    KernelCache(settings_for(folder / "cache")).get_or_build(id, [&] {
      append_byte(folder / "started");
      sleep_ms(60'000);
      return made_up_kernel("never");
    });
    return 0;
  });
  while (!fs::exists(folder / "started")) sleep_ms(1);
  ::kill(child, SIGKILL);
  CHECK(WIFSIGNALED(status_of(child)));
  CountedBuild build;
  CHECK(KernelCache(settings_for(folder / "cache")).get_or_build(id, build.function()).kernel.image ==
        "image");
  CHECK(build.calls == 1);
}

TEST_CASE("a process killed while it writes leaves nothing broken") {
  const TemporaryFolder folder;
  const fs::path dir = folder / "cache";
  fs::create_directories(dir);
  fs::permissions(dir, fs::perms::owner_all);
  const std::string large(8 << 20, 'x');
  int killed_while_writing = 0;
  for (int round = 0; round < 20; ++round) {
    const pid_t child = start_process([&] {
      KernelCacheSettings settings = settings_for(dir);
      settings.max_bytes = 1u << 30;
      KernelCache cache(settings);
      for (int i = 0;; ++i)
        cache.get_or_build(made_up_id(std::to_string(i)), [&] { return made_up_kernel(large); });
      return 0;
    });
    while (count_names(dir, ".tmp") == 0) std::this_thread::yield();
    std::this_thread::sleep_for(std::chrono::microseconds(200 * round));
    ::kill(child, SIGKILL);
    CHECK(WIFSIGNALED(status_of(child)));
    killed_while_writing += count_names(dir, ".tmp") > 0;
    for (const CacheEntry& entry : list_cache(dir)) CHECK(entry.fault == "");
    CountedBuild build;
    CHECK(KernelCache(settings_for(dir)).get_or_build(made_up_id("next"), build.function()).kernel.image ==
          "image");
    clear_cache(dir);
    CHECK(count_names(dir, "") == 0);
  }
  CHECK(killed_while_writing > 0);  // or this test saw nothing
}

TEST_CASE("a write beyond the file-size limit is an error, not the process's death") {
  const TemporaryFolder folder;
  const pid_t child = start_process([&] {
    ::signal(SIGXFSZ, SIG_DFL);
    const rlimit limit{1000, 1000};
    if (::setrlimit(RLIMIT_FSIZE, &limit) != 0) return 2;
    const CapturedLog log;
    KernelCache cache(settings_for(folder / "cache"));
    CountedBuild build{.image = std::string(5000, 'x')};
    for (int i = 0; i < 2; ++i)
      for (const char* name : {"a", "b"})
        if (cache.get_or_build(made_up_id(name), build.function()).kernel.image != build.image) return 3;
    if (build.calls != 2) return 4;
    if (log.warnings().size() != 1) return 5;
    if (log.warnings()[0].find("File too large") == std::string::npos) return 6;
    return 0;
  });
  const int status = status_of(child);
  CHECK(WIFEXITED(status));
  CHECK(WEXITSTATUS(status) == 0);
  CHECK(count_names(folder / "cache", "") == 0);
}

TEST_CASE("what dead writers left is removed by the next that writes") {
  const TemporaryFolder folder;
  write_all(folder / temporary_name(made_up_id("dead").key), "half a kernel");
  write_all(folder / lock_name(made_up_id("dead").key), "");
  CountedBuild build;
  KernelCache(settings_for(folder.path())).get_or_build(made_up_id("a"), build.function());
  CHECK(count_names(folder.path(), ".kernel") == 1);
  CHECK(count_names(folder.path(), "") == 1);
}
