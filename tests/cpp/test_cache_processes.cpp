// The cache among processes: races, deaths, limits.
#include <doctest/doctest.h>

#include <fcntl.h>
#include <signal.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <functional>
#include <thread>

#include "runtime/library/pack.h"
#include "runtime/system/interrupt.h"
#include "runtime/system/subprocess.h"
#include "tests/cpp/cache_fixture.h"
#include "tests/cpp/captured_log.h"
#include "tests/cpp/containing.h"
#include "tests/cpp/failing_locks.h"
#include "tests/cpp/processes.h"
#include "tests/cpp/temporary_folder.h"

using namespace flash_attn_jit;
using namespace flash_attn_jit::testing;
namespace fs = std::filesystem;

namespace {

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
  CHECK(KernelCache(settings_for(folder / "cache")).get_or_build(id, build.function()).kernel.image == "image");
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
      for (int i = 0;; ++i) cache.get_or_build(made_up_id(std::to_string(i)), [&] { return made_up_kernel(large); });
      return 0;
    });
    while (count_names(dir, ".tmp") == 0) std::this_thread::yield();
    std::this_thread::sleep_for(std::chrono::microseconds(200 * round));
    ::kill(child, SIGKILL);
    CHECK(WIFSIGNALED(status_of(child)));
    killed_while_writing += count_names(dir, ".tmp") > 0;
    for (const CacheEntry& entry : list_cache(dir)) CHECK(entry.fault == "");
    CountedBuild build;
    CHECK(KernelCache(settings_for(dir)).get_or_build(made_up_id("next"), build.function()).kernel.image == "image");
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

TEST_CASE("what a dead process of the same number left does not keep a kernel from being stored") {
  const TemporaryFolder folder;
  const KernelId id = made_up_id("a");
  for (int i = 0; i < 2000; ++i)
    write_all(folder / (to_hex(id.key) + "." + std::to_string(::getpid()) + "-" + std::to_string(i) + ".tmp"), "half");
  CountedBuild build;
  KernelCache(settings_for(folder.path())).get_or_build(id, build.function());
  CHECK(found_anew(folder.path(), id));
}

TEST_CASE("a file system without locks keeps kernels all the same") {
  for (const int error : {ENOLCK, ENOSYS, EOPNOTSUPP, EIO}) {
    const TemporaryFolder folder;
    const FailingLocks failing(error);
    const CapturedLog log;
    const KernelId id = made_up_id("a");
    const fs::path fresh = folder / temporary_name(made_up_id("fresh").key);
    const fs::path stale = folder / temporary_name(made_up_id("stale").key);
    for (const fs::path& path : {fresh, stale}) write_all(path, "half a kernel");
    fs::last_write_time(stale, fs::file_time_type::clock::now() - std::chrono::hours(2));
    write_all(folder / id.file_name(), "rubbish");
    CountedBuild build;
    CHECK(KernelCache(settings_for(folder.path())).get_or_build(id, build.function()).kernel.image == "image");
    REQUIRE(found_anew(folder.path(), id));
    CHECK(fs::exists(fresh));  // may be somebody's
    CHECK_FALSE(fs::exists(stale));
    CHECK(count_names(folder.path(), ".lock") == 0);
    REQUIRE(log.warnings().size() == 1);
    CHECK(log.warnings()[0] == Containing{"does not verify"});
    CHECK(KernelCache(settings_for(folder.path())).keep_refused_source(id, "source") ==
          (folder / source_name(id)).string());
    CHECK_NOTHROW(write_manifest(folder.path()));
  }
}

namespace {

// Removes what nobody seems to be writing, over and over, while `work` runs.
void while_others_evict(const fs::path& dir, const std::function<void()>& work) {
  std::atomic<bool> done = false;
  std::thread evictor([&] {
    while (!done) evict(dir, 1u << 30, 1u << 30);
  });
  work();
  done = true;
  evictor.join();
}

}  // namespace

TEST_CASE("a refused source is kept although another process looks after the folder") {
  const TemporaryFolder folder;
  KernelCache cache(settings_for(folder.path()));
  while_others_evict(folder.path(), [&] {
    for (int i = 0; i < 300; ++i) {
      const KernelId id = made_up_id(std::to_string(i % 3));
      CHECK(cache.keep_refused_source(id, std::string(1 << 16, 'x')) == (folder / source_name(id)).string());
    }
  });
}

TEST_CASE("a manifest is written although another process builds into the same folder") {
  const TemporaryFolder folder;
  while_others_evict(folder.path(), [&] {
    for (int i = 0; i < 300; ++i) CHECK_NOTHROW(write_manifest(folder.path()));
  });
}

TEST_CASE("a wait for another process is told, with who is waited for, and ends when the user asks") {
  const TemporaryFolder folder;
  const KernelId id = made_up_id("a");
  int started[2];
  REQUIRE(::pipe(started) == 0);
  const pid_t holder = start_process([&] {
    KernelCache(settings_for(folder.path())).get_or_build(id, [&] {
      if (::write(started[1], "x", 1) != 1) ::_exit(97);
      sleep_ms(60'000);
      return made_up_kernel("never");
    });
    return 0;
  });
  char byte;
  REQUIRE(::read(started[0], &byte, 1) == 1);

  const CapturedLog log;
  std::atomic<bool> stop = false;
  set_interrupt_check([&] { return stop.load(); });
  std::atomic<int> interrupted = 0;
  KernelCache cache(settings_for(folder.path()));
  CountedBuild build;
  const auto ask = [&] {
    try {
      cache.get_or_build(id, build.function());
    } catch (const Interrupted&) {
      ++interrupted;
    }
  };
  std::thread first(ask), second(ask);  // one waits for the process, the other for that one
  while (log.warnings().empty()) sleep_ms(20);
  sleep_ms(100);
  REQUIRE(log.warnings().size() == 1);
  CHECK(log.warnings()[0] == Containing{"process " + std::to_string(holder)});
  CHECK(log.warnings()[0] == Containing{(folder / lock_name(id.key)).string()});
  CHECK(interrupted == 0);
  stop = true;
  first.join();
  second.join();
  CHECK(interrupted == 2);
  set_interrupt_check({});
  CHECK(build.calls == 0);
  ::kill(holder, SIGKILL);
  status_of(holder);
  CHECK(cache.get_or_build(id, build.function()).origin == KernelOrigin::kCompiled);
  for (const int end : started) ::close(end);
}

TEST_CASE("who waits for a thread that was interrupted builds itself") {
  const TemporaryFolder folder;
  KernelCache cache(settings_for(folder.path()));
  const KernelId id = made_up_id("a");
  std::atomic<bool> building = false;
  std::thread first([&] {
    CHECK_THROWS_AS(cache.get_or_build(id,
                                       [&]() -> CompiledKernel {
                                         building = true;
                                         sleep_ms(100);
                                         throw Interrupted();
                                       }),
                    Interrupted);
  });
  while (!building) std::this_thread::yield();
  CountedBuild build;
  CHECK(cache.get_or_build(id, build.function()).kernel.image == "image");
  first.join();
  CHECK(build.calls == 1);
}

TEST_CASE("a process forked while a thread builds builds for itself") {
  const TemporaryFolder folder;
  KernelCache cache(settings_for(folder / "cache"));
  const KernelId id = made_up_id("a");
  std::atomic<bool> building = false, finish = false;
  std::thread builder([&] {
    cache.get_or_build(id, [&] {
      building = true;
      while (!finish) std::this_thread::yield();
      return made_up_kernel("the parent's");
    });
  });
  while (!building) std::this_thread::yield();
  const pid_t child = start_process([&] {
    ::alarm(20);
    CountedBuild build;
    return cache.get_or_build(id, build.function()).kernel.image == "the parent's" && build.calls == 0 ? 0 : 1;
  });
  sleep_ms(300);
  finish = true;
  builder.join();
  CHECK(status_of(child) == 0);  // it waited for the lock, and found the kernel
}

TEST_CASE("a forked process does not hold the locks of the threads that it lacks") {
  const TemporaryFolder folder;
  const KernelId id = made_up_id("a");
  // The grandchild outlives its parent, which is killed while it builds.
  const pid_t parent = start_process([&] {
    KernelCache cache(settings_for(folder / "cache"));
    std::atomic<bool> building = false;
    std::thread builder([&] {
      cache.get_or_build(id, [&] {
        building = true;
        sleep_ms(60'000);
        return made_up_kernel("never");
      });
    });
    while (!building) std::this_thread::yield();
    if (::fork() == 0) {
      ::alarm(20);
      CountedBuild build;
      cache.get_or_build(id, build.function());
      append_byte(folder / (build.calls == 1 ? "built" : "not built"));
      ::_exit(0);
    }
    ::kill(::getpid(), SIGKILL);
    return 0;
  });
  CHECK(WIFSIGNALED(status_of(parent)));
  for (int i = 0; i < 200 && !fs::exists(folder / "built"); ++i) sleep_ms(50);
  CHECK(fs::exists(folder / "built"));
}

TEST_CASE("a process forked while threads use the cache and the log can use them too") {
  const CapturedLog log;
  const KernelId id = made_up_id("a");
  KernelCache in_memory(settings_for("/proc/no such folder"));
  CountedBuild build;
  in_memory.get_or_build(id, build.function());
  std::atomic<bool> done = false;
  std::vector<std::thread> busy;
  for (int i = 0; i < 2; ++i)
    busy.emplace_back([&] {
      while (!done) {
        warn_once("said once");
        in_memory.find(id);
      }
    });
  int hung = 0;
  for (int i = 0; i < 300; ++i) {
    const int status = status_of(start_process([&] {
      ::alarm(2);
      set_log_sink([](LogLevel, const std::string&) {});
      warn_once("said once");
      return in_memory.find(id) ? 0 : 1;
    }));
    hung += WIFSIGNALED(status);
    if (hung == 2) break;
  }
  done = true;
  for (std::thread& thread : busy) thread.join();
  CHECK(hung == 0);
}

TEST_CASE("a process forked while a program is started does not keep that program's output open") {
  std::atomic<bool> done = false;
  std::atomic<int> longest_ms = 0;
  std::thread starter([&] {
    while (!done) {
      const auto start = std::chrono::steady_clock::now();
      run_program({"true"});
      const auto ms = std::chrono::duration_cast<std::chrono::milliseconds>(std::chrono::steady_clock::now() - start);
      longest_ms = std::max(longest_ms.load(), static_cast<int>(ms.count()));
    }
  });
  std::vector<pid_t> children;
  for (int i = 0; i < 100; ++i) {
    children.push_back(start_process([] {
      sleep_ms(10'000);
      return 0;
    }));
    sleep_ms(1);
  }
  done = true;
  sleep_ms(1500);
  for (const pid_t child : children) {
    ::kill(child, SIGKILL);
    status_of(child);
  }
  starter.join();
  CHECK(longest_ms.load() < 1000);
}
