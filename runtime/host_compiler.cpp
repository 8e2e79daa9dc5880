#include "runtime/host_compiler.h"

#include <unistd.h>

#include <chrono>
#include <cstdlib>
#include <fstream>
#include <sstream>

#include "runtime/config.h"
#include "runtime/files.h"
#include "runtime/subprocess.h"

#if defined(__SANITIZE_ADDRESS__)
#define FLASH_ATTN_JIT_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define FLASH_ATTN_JIT_ASAN 1
#endif
#endif

namespace flash_attn_jit {
namespace {

class TemporaryFolder {
 public:
  TemporaryFolder() {
    path_ = make_temporary_folder("flash-attn-jit");
  }
  ~TemporaryFolder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  TemporaryFolder(const TemporaryFolder&) = delete;
  TemporaryFolder& operator=(const TemporaryFolder&) = delete;

  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
};

void write_file(const std::filesystem::path& path, const std::string& text) {
  std::ofstream file(path, std::ios::binary);
  file << text;
  file.close();
  if (!file) throw Error("the kernel's source cannot be written to " + path.string() + "; is the disk full?");
}

std::optional<HostCompiler> try_compiler(const std::string& name) {
  const ProgramResult result = run_program({name, "--version"});
  if (result.status != 0) return std::nullopt;
  return HostCompiler{name, result.output.substr(0, result.output.find('\n'))};
}

// What makes compiling and running together shortest. GCC 12 takes half the time of -O1 with -Og, and the
// object runs as fast. Clang 14 unrolls where a template asks for it, unless it optimises nothing: a tenth of
// the time.
const char* optimization(const HostCompiler& compiler) {
  return compiler.version.find("clang") != std::string::npos ? "-O0" : "-Og";
}

}  // namespace

HostCompiler find_host_compiler(const std::optional<std::string>& choice) {
  if (choice) {
    if (auto compiler = try_compiler(*choice)) return *compiler;
    throw ConfigError(
        "FLASH_ATTN_JIT_CXX is '" + *choice +
        "', which does not run; accepted: the path or name of a C++ compiler (GCC 11, Clang 15 or newer)");
  }
  for (const char* name : {"c++", "g++", "clang++"})
    if (auto compiler = try_compiler(name)) return *compiler;
  throw ConfigError(
      "the interpreter needs a C++ compiler, and none of c++, g++ and clang++ is on PATH; install one "
      "(Debian, Ubuntu: "
      "apt-get install g++) or name it in FLASH_ATTN_JIT_CXX");
}

const HostCompiler& host_compiler() {
  static const HostCompiler compiler = find_host_compiler(config().cxx);
  return compiler;
}

std::vector<std::string> host_compiler_flags(const HostCompiler& compiler) {
  return {
      "-std=c++17",
      "-DFLASH_ATTN_JIT_HOST",
      "-w",
      "-fPIC",
      "-shared",
      "-fno-exceptions",
      "-fno-rtti",
      optimization(compiler),
      // One rounding for each operation, as the source says.
      "-ffp-contract=off",
      // Every check that needs nothing from its surroundings. The handlers are in primitives_host.cuh: no
      // sanitizer library, hence -nodefaultlibs.
      "-fsanitize=shift,integer-divide-by-zero,unreachable,return,signed-integer-overflow,bounds,"
      "float-cast-overflow,bool,enum,pointer-overflow",
      "-nodefaultlibs",
#ifdef FLASH_ATTN_JIT_ASAN
      // The process has AddressSanitizer's library, so an object may use it.
      "-fsanitize=address",
      "-fno-omit-frame-pointer",
      "-g",
#else
      "-s",
#endif
  };
}

CompiledKernel compile_for_host(const RenderedKernel& kernel, const HostCompiler& compiler) {
  const TemporaryFolder folder;
  const std::filesystem::path source = folder.path() / "kernel.cpp", object = folder.path() / "kernel.so";
  write_file(source, kernel.source);
  std::vector<std::string> command{compiler.path.string()};
  for (std::string& flag : host_compiler_flags(compiler)) command.push_back(std::move(flag));
  for (const char* argument : {"-o", object.c_str(), source.c_str(), "-lm", "-lc"})
    command.push_back(argument);

  const auto begin = std::chrono::steady_clock::now();
  const ProgramResult result = run_program(command);
  if (result.status != 0)
    throw HostCompileFailure(
        "the host compiler (" + compiler.version + ") ended with status " + std::to_string(result.status),
        result.output);
  CompiledKernel compiled;
  compiled.image = read_file(object).value();
  compiled.entry = kernel.entry;
  compiled.threads = kernel.threads;
  compiled.dynamic_smem = kernel.dynamic_smem;
  compiled.built_by = compiler.version;
  compiled.log = result.output;
  compiled.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  return compiled;
}

}  // namespace flash_attn_jit
