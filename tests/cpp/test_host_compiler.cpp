// The interpreter's compiler: how it is found, what it makes, what its failures say.
#include <doctest/doctest.h>

#include <algorithm>
#include <cstdlib>
#include <string>

#include "containing.h"
#include "generator/default_tiles.h"
#include "generator/legality.h"
#include "runtime/host_compiler.h"
#include "runtime/interpreter/interpreter.h"
#include "runtime/kernel_library.h"
#include "runtime/subprocess.h"

using namespace flash_attn_jit;
using namespace flash_attn_jit::testing;

namespace {

// Sets an environment variable while it lives.
class Environment {
 public:
  Environment(const char* name, const char* value) : name_(name), old_(std::getenv(name)) {
    setenv(name, value, 1);
  }
  ~Environment() { setenv(name_, old_.c_str(), 1); }

 private:
  const char* name_;
  std::string old_;
};

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
  spec.tile = default_tiles(spec, arch_limits(75)).back();
  return spec;
}

}  // namespace

TEST_CASE("subprocess: status, output, signals, programs that are not there") {
  const ProgramResult result = run_program({"sh", "-c", "echo out; echo err >&2; cat; exit 3"});
  CHECK(result.status == 3);
  CHECK(result.output == "out\nerr\n");
  CHECK(run_program({"sh", "-c", "kill -9 $$"}).status == 128 + 9);
  const ProgramResult missing = run_program({"/nowhere/compiler"});
  CHECK(missing.status == 127);
  CHECK(missing.output == Containing{"No such file"});
}

TEST_CASE("a compiler that is named is taken, or the error names the variable") {
  const HostCompiler compiler = find_host_compiler("c++");
  CHECK(compiler.path == "c++");
  CHECK(compiler.version != "");
  const std::string message = message_of([] { find_host_compiler("/nowhere/g++"); });
  CHECK(message == Containing{"FLASH_ATTN_JIT_CXX is '/nowhere/g++'"});
  CHECK(message == Containing{"accepted: "});
}

TEST_CASE("without any compiler, the error says what to install") {
  const Environment path("PATH", "/nowhere");
  const std::string message = message_of([] { find_host_compiler(std::nullopt); });
  CHECK(message == Containing{"apt-get install g++"});
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
  CHECK(std::any_of(flags.begin(), flags.end(),
                    [](const std::string& f) { return f.starts_with("-fsanitize=shift"); }));
  const FoundKernel first = find_or_compile_for_host(some_spec());
  CHECK(first.kernel.entry == some_spec().name());
  CHECK(first.kernel.threads == some_spec().tile.threads());
  CHECK(first.kernel.built_by == host_compiler().version);
  CHECK(first.kernel.min_driver == 0);
  const FoundKernel second = find_or_compile_for_host(some_spec());
  CHECK(second.origin == KernelOrigin::kDiskCache);
  CHECK(second.kernel.image == first.kernel.image);
  CHECK(second.kernel.entry == first.kernel.entry);
  CHECK(second.kernel.dynamic_smem == first.kernel.dynamic_smem);
}

TEST_CASE("a spec that is not legal on a T4 is refused before it is compiled") {
  KernelSpec spec = some_spec();
  spec.dtype = DType::kBFloat16;
  CHECK_THROWS_AS(find_or_compile_for_host(spec), UnsupportedError);
}
