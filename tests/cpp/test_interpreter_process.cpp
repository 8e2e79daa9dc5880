// The interpreter in a process that has other work: signals, limits of the system.
#include <doctest/doctest.h>

#include <sys/mman.h>
#include <unistd.h>

#include <chrono>
#include <string>
#include <utility>

#include "containing.h"
#include "generator/errors.h"
#include "runtime/interpreter/fiber.h"
#include "runtime/system/interrupt.h"
#include "small_kernel.h"

using namespace flash_attn_jit;
using namespace flash_attn_jit::testing;

namespace {

class WithInterruptCheck {
 public:
  explicit WithInterruptCheck(InterruptCheck check) { set_interrupt_check(std::move(check)); }
  ~WithInterruptCheck() { set_interrupt_check({}); }
};

CompiledKernel endless_kernel() {
  return compile_small_kernel("struct Params {};", "for (volatile int i = 0; i < 2000000000; ++i) block_barrier();");
}

}  // namespace

TEST_CASE("a kernel that runs for long ends soon after the user has asked to stop") {
  const CompiledKernel kernel = endless_kernel(), short_kernel = compile_small_kernel("struct Params {};", "");
  const char no_params = 0;
  using Clock = std::chrono::steady_clock;
  const auto start = Clock::now();
  int asked = 0;
  const WithInterruptCheck check([&] {
    if (asked++ == 0) run_small_kernel(short_kernel, 32, &no_params, {});  // as a signal handler may
    return Clock::now() - start > std::chrono::milliseconds(300);
  });
  CHECK_THROWS_AS(run_small_kernel(kernel, 64, &no_params, {}), Interrupted);
  CHECK(asked > 1);
  CHECK(Clock::now() - start < std::chrono::seconds(5));
}

TEST_CASE("a grid of many short blocks ends too") {
  const CompiledKernel kernel = compile_small_kernel("struct Params {};", "");
  const char no_params = 0;
  bool stop = false;
  const WithInterruptCheck check([&] { return std::exchange(stop, true); });
  CHECK_THROWS_AS(interpret(kernel, {.blocks = 0x7fffffff, .threads = 32, .dynamic_smem = 0}, &no_params, {}),
                  Interrupted);
}

TEST_CASE("stacks that cannot be protected are an error that names the limit") {
  const std::size_t page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  // Every second page has another protection, so that each is a mapping of its own, until the system gives no more.
  constexpr std::size_t kMost = 1 << 21;
  auto* pages =
      static_cast<char*>(mmap(nullptr, kMost * page, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  REQUIRE(pages != MAP_FAILED);
  std::size_t used = 0;
  while (used < kMost && mprotect(pages + used * page, page, PROT_NONE) == 0) used += 2;
  std::string message;
  if (used < kMost) {
    mprotect(pages, 40 * page, PROT_READ);  // room for a few mappings, not for a block's stacks
    try {
      const FiberStacks stacks(1024);
    } catch (const Error& error) {
      message = error.what();
    }
  }
  munmap(pages, kMost * page);
  if (used >= kMost) {
    MESSAGE("left out: this system allows more than a million mappings");
    return;
  }
  CHECK(message == Containing{"cannot protect the stacks of 1024 threads (Cannot allocate memory)"});
  CHECK(message == Containing{"vm.max_map_count"});
  const FiberStacks stacks(1024);
}
