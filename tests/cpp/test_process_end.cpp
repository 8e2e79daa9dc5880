// What a process keeps for all its threads stays whole to its very end: a thread may still use it then.
#include <doctest/doctest.h>

#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "runtime/cuda/nvrtc_search.h"
#include "runtime/interpreter/interpreter.h"
#include "runtime/launch/process.h"
#include "small_kernel.h"

using namespace flash_attn_jit;
using namespace flash_attn_jit::testing;

namespace {

struct Expected {
  std::string version, report;
  std::vector<std::filesystem::path> folders;
  CompiledKernel kernel;
};
Expected* expected = nullptr;  // set in the process that ends

struct LastOfAll {
  ~LastOfAll() {
    if (expected == nullptr) return;
    const bool whole = host_compiler().version == expected->version &&
                       last_interpreter_report().text() == expected->report &&
                       python_search_path() == expected->folders;
    const char no_params = 0;
    run_small_kernel(expected->kernel, 32, &no_params, {});  // once more: its object is loaded still
    _exit(whole ? 0 : 1);
  }
};

// Made before every other static object, and so destroyed after all of them.
__attribute__((init_priority(101))) LastOfAll last_of_all;

}  // namespace

TEST_CASE("the process's own objects are not destroyed while the process ends") {
  const CompiledKernel kernel = compile_small_kernel("struct Params {};", "");
  const pid_t child = fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    if (std::freopen("/dev/null", "w", stdout) == nullptr) _exit(3);  // what is buffered is the parent's
    const std::vector<std::filesystem::path> folders = {"/a/folder/whose/name/takes/memory/of/its/own"};
    set_python_search_path(folders);
    const char no_params = 0;
    run_small_kernel(kernel, 32, &no_params, {});
    expected = new Expected{host_compiler().version, last_interpreter_report().text(), folders, kernel};
    std::exit(2);
  }
  int status = 0;
  waitpid(child, &status, 0);
  REQUIRE(WIFEXITED(status));
  CHECK(WEXITSTATUS(status) == 0);
}
