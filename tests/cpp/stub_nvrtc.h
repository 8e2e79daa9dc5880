// An NVRTC for tests: of any version, with any log, for any architectures. What it makes the stub libcuda loads.
#pragma once

#include <doctest/doctest.h>

#include <filesystem>
#include <string>

#include "runtime/launch/process.h"
#include "runtime/system/dynamic_library.h"
#include "runtime/system/subprocess.h"
#include "tests/cpp/temporary_folder.h"

namespace flash_attn_jit::testing {

struct StubNvrtc {
  std::string major = "98", minor = "0";  // newer than any that the machine may have
  std::string architectures = "75,80";
  std::string log =
      "ptxas info    : 0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\\n"
      "ptxas info    : Used 99 registers\\n";
  int meet = 1;  // a compile waits until so many are under way, at most a second
};

inline constexpr const char* kStubNvrtcSource = R"(
#include <atomic>
#include <chrono>
#include <cstring>
#include <string>
#include <thread>
struct Program { std::string entry, cubin, ptx; };
static std::atomic<int> under_way{0}, most{0};
extern "C" {
int stub_most_at_once() { return most; }
const char* nvrtcGetErrorString(int) { return "the stub's words"; }
int nvrtcVersion(int* major, int* minor) { *major = MAJOR; *minor = MINOR; return 0; }
static const int known[] = {ARCHITECTURES};
int nvrtcGetNumSupportedArchs(int* count) { *count = sizeof known / sizeof *known; return 0; }
int nvrtcGetSupportedArchs(int* list) { std::memcpy(list, known, sizeof known); return 0; }
int nvrtcCreateProgram(Program** program, const char*, const char* name, int, const char* const*, const char* const*) {
  *program = new Program{std::string(name, std::strlen(name) - 3), "", ""};
  return 0;
}
int nvrtcDestroyProgram(Program** program) { delete *program; return 0; }
int nvrtcCompileProgram(Program* program, int count, const char* const* options) {
  ++under_way;
  for (int i = 0; i < 1000; ++i) {
    if (under_way > most) most = under_way.load();
    if (most >= MEET) break;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  int sm = 0;
  for (int i = 0; i < count; ++i)
    if (std::strncmp(options[i], "--gpu-architecture=", 19) == 0) sm = std::stoi(std::strchr(options[i], '_') + 1);
  program->cubin = std::string(64, '\0') + program->entry + '\0';
  std::memcpy(&program->cubin[0], "\x7f" "ELF", 4);
  program->cubin[18] = static_cast<char>(190);
  const bool is_12 = MAJOR == 12;
  program->cubin[8] = is_12 ? 7 : 8;
  program->cubin[is_12 ? 48 : 49] = static_cast<char>(sm);
  program->ptx = ".version 8.0\n.target sm_" + std::to_string(sm) + "\n.entry " + program->entry + "(\n";
  --under_way;
  return program->entry.find(REFUSED) != std::string::npos ? 6 : 0;
}
int nvrtcGetProgramLogSize(Program*, std::size_t* size) { *size = sizeof(LOG); return 0; }
int nvrtcGetProgramLog(Program*, char* log) { std::memcpy(log, LOG, sizeof(LOG)); return 0; }
int nvrtcGetCUBINSize(Program* program, std::size_t* size) { *size = program->cubin.size(); return 0; }
int nvrtcGetCUBIN(Program* program, char* to) { program->cubin.copy(to, program->cubin.size()); return 0; }
int nvrtcGetPTXSize(Program* program, std::size_t* size) { *size = program->ptx.size() + 1; return 0; }
int nvrtcGetPTX(Program* program, char* to) { std::memcpy(to, program->ptx.c_str(), program->ptx.size() + 1); return 0; }
}
)";

// Makes the library in `folder`, refusing every kernel whose name holds `refused`. Its path.
inline std::filesystem::path make_stub_nvrtc(const std::filesystem::path& folder, const StubNvrtc& stub,
                                             const std::string& refused = "nothing of this name") {
  write_all(folder / "stub.cpp", kStubNvrtcSource);
  const std::filesystem::path library = folder / ("libnvrtc.so." + stub.major + "." + stub.minor);
  const ProgramResult made =
      run_program({host_compiler().path.string(), "-std=c++17", "-shared", "-fPIC", "-pthread", "-DMAJOR=" + stub.major,
                   "-DMINOR=" + stub.minor, "-DARCHITECTURES=" + stub.architectures,
                   "-DMEET=" + std::to_string(stub.meet), "-DLOG=\"" + stub.log + "\"", "-DREFUSED=\"" + refused + "\"",
                   "-o", library.string(), (folder / "stub.cpp").string()});
  REQUIRE_MESSAGE(made.succeeded(), made.output);
  return library;
}

// How many compiles of it were under way at once, at the most.
inline int most_at_once(const std::filesystem::path& library) {
  return DynamicLibrary::open(library).function<int()>("stub_most_at_once")();
}

}  // namespace flash_attn_jit::testing
