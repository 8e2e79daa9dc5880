// The interpreter's compiler: how it is found, what it makes, what its failures say.
#include <doctest/doctest.h>

#include <sys/wait.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <string>
#include <thread>

#include "containing.h"
#include "generator/legality.h"
#include "generator/tile_chooser.h"
#include "runtime/compile/host_compiler.h"
#include "runtime/interpreter/interpreter.h"
#include "runtime/launch/process.h"
#include "runtime/system/interrupt.h"
#include "runtime/system/subprocess.h"
#include "temporary_folder.h"

using namespace flash_attn_jit;
using namespace flash_attn_jit::testing;

namespace {

// Sets an environment variable while it lives.
class Environment {
 public:
  Environment(const char* name, const char* value) : name_(name), old_(std::getenv(name)) { setenv(name, value, 1); }
  ~Environment() { setenv(name_, old_.c_str(), 1); }

 private:
  const char* name_;
  std::string old_;
};

class SignalIgnored {
 public:
  explicit SignalIgnored(int signal) : signal_(signal), old_(std::signal(signal, SIG_IGN)) {}
  ~SignalIgnored() { std::signal(signal_, old_); }

 private:
  int signal_;
  void (*old_)(int);
};

std::string failure_of(const RenderedKernel& kernel, const HostCompiler& compiler) {
  try {
    compile_for_host(kernel, compiler);
  } catch (const HostCompileFailure& failure) {
    return failure.what();
  }
  return "";
}

std::string message_of(const auto& action) {
  try {
    action();
  } catch (const ConfigError& error) {
    return error.what();
  }
  return "";
}

KernelSpec some_spec() {
  KernelSpec spec;
  spec.head_dim = 16;
  spec.tile = default_tiles(spec).back();
  return spec;
}

}  // namespace

TEST_CASE("subprocess: status, output, signals, programs that are not there") {
  const ProgramResult result = run_program({"sh", "-c", "echo out; echo err >&2; cat; exit 3"});
  CHECK(result.status == 3);
  CHECK(result.output == "out\nerr\n");
  CHECK(run_program({"sh", "-c", "kill -9 $$"}).status == 128 + 9);
  const ProgramResult missing = run_program({"/nowhere/compiler"});
  CHECK_FALSE(missing.started);
  CHECK(missing.text() == Containing{"cannot be started: No such file"});
}

TEST_CASE("subprocess: a status that this process cannot learn is not taken for a failure to start") {
  const SignalIgnored no_children(SIGCHLD), no_pipes(SIGPIPE);
  const ProgramResult result = run_program({"sh", "-c", "echo out; exit 3"});
  CHECK(result.status_is_unknown());
  CHECK_FALSE(result.succeeded());
  CHECK(result.output == "out\n");
  CHECK(result.text() == Containing{"No child processes"});
  // The program itself waits for its own children, and is ended by a pipe that nobody reads.
  CHECK(run_program({"sh", "-c", "sh -c 'exit 5'; echo $?"}).output == "5\n");
  CHECK(run_program({"sh", "-c", "(yes; echo $? >&2) | true"}).output == "141\n");
}

TEST_CASE("subprocess: a program and what it started end where the user has asked to stop") {
  const TemporaryFolder folder;
  std::atomic<bool> stop = false;
  set_interrupt_check([&] { return stop.load(); });
  std::thread user([&] {
    while (!std::filesystem::exists(folder / "begun")) std::this_thread::yield();
    stop = true;
  });
  const auto start = std::chrono::steady_clock::now();
  const std::string script =
      "(sleep 20; touch " + (folder / "ended").string() + ") & touch " + (folder / "begun").string() + "; wait";
  CHECK_THROWS_AS(run_program({"sh", "-c", script}), Interrupted);
  set_interrupt_check({});
  user.join();
  CHECK(std::chrono::steady_clock::now() - start < std::chrono::seconds(10));
  CHECK_FALSE(std::filesystem::exists(folder / "ended"));
}

TEST_CASE("the compiler's work counts where its status cannot be learnt") {
  RenderedKernel empty, wrong;
  empty.source = "int flash_attn_jit_test_symbol;\n";
  wrong.source = "this is no kernel;\n";
  const auto check = [&] {
    const HostCompiler compiler = find_host_compiler("c++");
    CHECK(compiler.version == host_compiler().version);
    CHECK(compile_for_host(empty, compiler).image == Containing{"flash_attn_jit_test_symbol"});
    const std::string refused = failure_of(wrong, compiler);
    CHECK(refused == Containing{"No child processes"});
    CHECK(refused == Containing{"wrote no object"});
  };
  SUBCASE("SIGCHLD is ignored") {
    const SignalIgnored no_children(SIGCHLD);
    check();
  }
  SUBCASE("another thread waits for any child") {
    std::atomic<bool> stop = false;
    std::thread reaper([&] {
      while (!stop)
        if (waitpid(-1, nullptr, 0) < 0) std::this_thread::yield();
    });
    const HostCompiler compiler = find_host_compiler("c++");
    CHECK(compile_for_host(empty, compiler).image == Containing{"flash_attn_jit_test_symbol"});
    stop = true;
    reaper.join();
  }
}

TEST_CASE("a compiler that ends with 0 and writes no object, or half of one") {
  const TemporaryFolder folder;
  const auto wrapper = [&](const std::string& work) {
    write_all(folder / "cxx", "#!/bin/sh\ncase \"$*\" in *--version*) echo some compiler; exit 0;; esac\n" + work);
    std::filesystem::permissions(folder / "cxx", std::filesystem::perms::owner_all);
    return HostCompiler{folder / "cxx", "some compiler"};
  };
  RenderedKernel rendered;
  rendered.source = "int flash_attn_jit_test_symbol;\n";
  CHECK(failure_of(rendered, wrapper("exit 0\n")) == Containing{"ended with status 0 and wrote no object"});
  const std::string object = R"(while [ "$1" != -o ]; do shift; done; )";
  CHECK(failure_of(rendered, wrapper(object + "echo words > \"$2\"\n")) == Containing{"wrote no whole object"});
  const std::string half = "c++ \"$@\" && " + object + R"(head -c 1000 "$2" > "$2.half" && mv "$2.half" "$2")";
  CHECK(failure_of(rendered, wrapper(half + "\n")) == Containing{"wrote no whole object"});
}

TEST_CASE("a compiler that is named is taken, or the error names the variable") {
  const HostCompiler compiler = find_host_compiler("c++");
  CHECK(compiler.path == "c++");
  CHECK(compiler.version != "");
  const std::string message = message_of([] { find_host_compiler("/nowhere/g++"); });
  CHECK(message == Containing{"No such file"});
  CHECK(message == Containing{"FLASH_ATTN_JIT_CXX is '/nowhere/g++'"});
  CHECK(message == Containing{"accepted: "});
}

TEST_CASE("without any compiler, the error says what to install") {
  const Environment path("PATH", "/nowhere");
  const std::string message = message_of([] { find_host_compiler(std::nullopt); });
  CHECK(message == Containing{"apt-get install g++"});
  CHECK(message == Containing{"clang++ cannot be started: No such file"});
  CHECK(message == Containing{"FLASH_ATTN_JIT_CXX"});
}

TEST_CASE("a refused source: the log names the template's line") {
  RenderedKernel rendered;
  rendered.source = "#line 7 \"softmax.cuh\"\nthis is no kernel;\n";
  try {
    compile_for_host(rendered, host_compiler());
    FAIL("it compiled");
  } catch (const HostCompileFailure& failure) {
    CHECK(failure.log == Containing{"softmax.cuh:7:"});
    CHECK(std::string(failure.what()) == Containing{host_compiler().version});
  }
}

TEST_CASE(
    "a kernel for the interpreter: undefined behaviour is checked, and the second time it comes from the "
    "cache") {
  const std::vector<std::string> flags = host_compiler_flags(host_compiler());
  CHECK(
      std::any_of(flags.begin(), flags.end(), [](const std::string& f) { return f.starts_with("-fsanitize=shift"); }));
  const FoundKernel first = process_host_kernels().find_or_compile(some_spec());
  CHECK(first.kernel.entry == some_spec().name());
  CHECK(first.kernel.threads == some_spec().tile.threads());
  CHECK(first.kernel.built_by == host_compiler().version);
  CHECK(first.kernel.min_driver == 0);
  const FoundKernel second = process_host_kernels().find_or_compile(some_spec());
  CHECK(second.origin == KernelOrigin::kDiskCache);
  CHECK(second.kernel.image == first.kernel.image);
  CHECK(second.kernel.entry == first.kernel.entry);
  CHECK(second.kernel.dynamic_smem == first.kernel.dynamic_smem);
}

TEST_CASE("a spec that is not legal on a T4 is refused before it is compiled") {
  KernelSpec spec = some_spec();
  spec.head_dim = kMostHeadDim + 1;
  CHECK_THROWS_AS(process_host_kernels().find_or_compile(spec), UnsupportedError);
}
