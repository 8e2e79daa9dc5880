#include "runtime/compile/host_compiler.h"

#include <link.h>
#include <unistd.h>

#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <sstream>

#include "runtime/system/files.h"
#include "runtime/system/sanitizers.h"
#include "runtime/system/subprocess.h"

namespace flash_attn_jit {
namespace {

void write_file(const std::filesystem::path& path, const std::string& text) {
  std::ofstream file(path, std::ios::binary);
  file << text;
  file.close();
  if (!file) throw Error("the kernel's source cannot be written to " + path.string() + "; is the disk full?");
}

// The compiler, or nothing; then `why` says what happened.
std::optional<HostCompiler> try_compiler(const std::string& name, std::string& why) {
  const ProgramResult result = run_program({name, "--version"});
  const std::string version = result.output.substr(0, result.output.find('\n'));
  if (result.succeeded() || (result.status_is_unknown() && !version.empty())) return HostCompiler{name, version};
  why = result.text();
  return std::nullopt;
}

// Whether a shared object was written to its end: linkers write the table of sections, and what says where it is, last.
bool is_whole_object(const std::string& image) {
  ElfW(Ehdr) header;
  if (image.size() < sizeof header) return false;
  std::memcpy(&header, image.data(), sizeof header);
  if (std::memcmp(header.e_ident, ELFMAG, SELFMAG) != 0 || header.e_shoff == 0) return false;
  const std::uint64_t table_bytes = std::uint64_t{header.e_shentsize} * header.e_shnum;
  return header.e_shoff <= image.size() && table_bytes <= image.size() - header.e_shoff;
}

// What the compiler wrote. Throws HostCompileFailure where it failed, or says that it did not and wrote none.
std::string object_of(const ProgramResult& result, const std::filesystem::path& path, const HostCompiler& compiler) {
  const std::string program = "the host compiler (" + compiler.version + ") ";
  if (!result.succeeded() && !result.status_is_unknown())
    throw HostCompileFailure(program + result.text(), result.output);
  std::optional<std::string> image = read_file(path);
  if (!image || !is_whole_object(*image))
    throw HostCompileFailure(program + result.text() + (image ? " and wrote no whole object" : " and wrote no object") +
                                 "; FLASH_ATTN_JIT_CXX names another compiler",
                             result.output);
  return *std::move(image);
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
    std::string why;
    if (auto compiler = try_compiler(*choice, why)) return *compiler;
    throw ConfigError("FLASH_ATTN_JIT_CXX is '" + *choice + "', which does not run (" + why +
                      "); accepted: the path or name of a C++ compiler (GCC 11, Clang 15 or newer)");
  }
  std::string tried;
  for (const char* name : {"c++", "g++", "clang++"}) {
    std::string why;
    if (auto compiler = try_compiler(name, why)) return *compiler;
    tried += std::string(tried.empty() ? "" : "; ") + name + " " + why;
  }
  throw ConfigError("the interpreter needs a C++ compiler, and none on PATH runs (" + tried +
                    "); install one (Debian, Ubuntu: apt-get install g++) or name it in FLASH_ATTN_JIT_CXX");
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
      // Every check that needs nothing from its surroundings, but for that of pointers' overflow: it takes a third of
      // the time to compile, and no tensor is where such a pointer leads to. The handlers are in primitives_host.cuh:
      // no sanitizer library, hence -nodefaultlibs.
      "-fsanitize=shift,integer-divide-by-zero,unreachable,return,signed-integer-overflow,bounds,"
      "float-cast-overflow,bool,enum",
      "-nodefaultlibs",
#ifdef FLASH_ATTN_JIT_ASAN
      // The process has AddressSanitizer's library, so an object may use it.
      "-fsanitize=address",
      "-fno-omit-frame-pointer",
      "-g1",
#else
      "-s",
#endif
  };
}

CompiledKernel compile_for_host(const RenderedKernel& kernel, const HostCompiler& compiler) {
  const ScratchFolder folder("flash-attn-jit");
  const std::filesystem::path source = folder.path() / "kernel.cpp", object = folder.path() / "kernel.so";
  write_file(source, kernel.source);
  std::vector<std::string> command{compiler.path.string()};
  for (std::string& flag : host_compiler_flags(compiler)) command.push_back(std::move(flag));
  for (const char* argument : {"-o", object.c_str(), source.c_str(), "-lm", "-lc"}) command.push_back(argument);

  const auto begin = std::chrono::steady_clock::now();
  const ProgramResult result = run_program(command);
  CompiledKernel compiled;
  compiled.image = object_of(result, object, compiler);
  set_launch_shape(compiled, kernel);
  compiled.built_by = compiler.version;
  compiled.log = result.output;
  compiled.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  return compiled;
}

}  // namespace flash_attn_jit
