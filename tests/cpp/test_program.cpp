// The flash-attn-jit program, run as its users run it: its flags and exit codes. tests/python/test_program.py has its
// work on real kernels.
#include <doctest/doctest.h>

#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <memory>
#include <string>

#include <nlohmann/json.hpp>

#include "runtime/tuner/database.h"
#include "runtime/tuner/record_store.h"
#include "tests/cpp/cache_fixture.h"
#include "tests/cpp/tuning_fixture.h"

namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;

struct ProgramRun {
  int exit_code = -1;
  std::string out, err;
};

std::string content(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

bool holds(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

// A folder of its own, which is also the program's cache.
class Program {
 public:
  Program() {
    std::string pattern = (fs::temp_directory_path() / "flash-attn-jit-program-XXXXXX").string();
    REQUIRE(mkdtemp(pattern.data()) != nullptr);
    folder_ = pattern;
  }
  ~Program() { fs::remove_all(folder_); }

  // `variables` stand before the command, as a shell takes them.
  ProgramRun run(const std::string& arguments, const std::string& variables = "") const {
    const std::string command = "env FLASH_ATTN_JIT_CACHE_DIR='" + (folder_ / "cache").string() + "' " + variables +
                                " '" + FLASH_ATTN_JIT_PROGRAM + "' " + arguments + " >'" + (folder_ / "out").string() +
                                "' 2>'" + (folder_ / "err").string() + "' </dev/null";
    const int status = std::system(command.c_str());
    return {WIFEXITED(status) ? WEXITSTATUS(status) : -1, content(folder_ / "out"), content(folder_ / "err")};
  }

  const fs::path& folder() const { return folder_; }

 private:
  fs::path folder_;
};

std::string nvrtc_12() {
  const char* site_packages = std::getenv("FLASH_ATTN_JIT_TEST_SITE_PACKAGES");
  if (!site_packages) return "";
  return "FLASH_ATTN_JIT_NVRTC='" + (fs::path(site_packages) / "nvidia/cuda_nvrtc/lib").string() + "'";
}

}  // namespace

TEST_CASE("a wrong call names the flag, what came and what is accepted, and exits with 2") {
  const Program program;
  const auto refused = [&](const std::string& arguments, const std::string& flag, const std::string& came,
                           const std::string& accepted) {
    CAPTURE(arguments);
    const ProgramRun run = program.run(arguments);
    CAPTURE(run.err);
    CHECK(run.exit_code == 2);
    CHECK(run.out.empty());
    CHECK(holds(run.err, flag));
    CHECK(holds(run.err, came));
    CHECK(holds(run.err, accepted));
  };
  refused("", "subcommand", "", "devices, inspect, model, prebuild, pack, tune, report, cache");
  refused("inspect --emit spec", "--head-dim", "required", "--gqa");
  refused("inspect --head-dim 64 --emit elf", "--emit", "'elf'", "tiles, spec, source, ptx, cubin, resources");
  refused("inspect --head-dim 64 --tile m64n16w4q64l2b4k7 --emit tiles", "--tile", "--emit tiles", "leave it out");
  for (const char* emit : {"tiles", "spec", "source", "resources"})
    refused(std::string("inspect --head-dim 64 --resources r.json --emit ") + emit, "--resources", emit,
            "ptx or cubin");
  refused("inspect --head-dim 64x --emit spec", "--head-dim", "'64x'", "a whole number");
  refused("inspect --head-dim 600 --emit spec", "--head-dim", "600", "1 to 512");
  refused("inspect --head-dim 64 --gqa 0 --emit spec", "--gqa", "'0'", "from 1");
  refused("inspect --head-dim 64 --kind bwd --emit spec", "--kind", "'bwd'", "fwd");
  refused("inspect --head-dim 64 --causal --window --emit spec", "--window", "--causal", "one of them");
  refused("inspect --head-dim 64 --arch sm_70 --emit spec", "--arch", "sm_70", "sm_75");
  refused("inspect --head-dim 64 --arch turing --emit spec", "--arch", "turing", "sm_75");
  refused("inspect --head-dim 64 --tile huge --emit spec", "--tile", "'huge'", "auto");
  refused("inspect --head-dim 64 --emit spec --frobnicate", "--frobnicate", "", "--head-dim");
  refused("inspect --headdim 64 --emit spec", "--headdim", "is not a flag", "--head-dim");
  const std::string pack = "prebuild --arch sm_75 --out " + (program.folder() / "pack").string();
  refused(pack + " --kinds fwd --head-dims 64 --causal maybe --gqa 1", "--causal", "'maybe'", "both, yes, no");
  refused(pack + " --kinds fwd --head-dims 64 --causal no --gqa 1 --varlen 1", "--varlen", "'1'", "both, yes, no");
  refused(pack + " --kinds dq --head-dims 64 --causal no --gqa 1", "--kinds", "'dq'", "fwd, bwd");
  refused(pack + " --kinds fwd --head-dims 64,600 --causal no --gqa 1", "--head-dims", "600", "1 to 512");
  refused(pack + " --kinds fwd --head-dims 64 --causal no --gqa 1,x", "--gqa", "'x'", "a whole number");
  refused(pack + " --kinds fwd --head-dims 64 --causal no --gqa 1 --jobs 0", "--jobs", "'0'", "from 1");
  refused(pack + " --kinds fwd", "--head-dims", "required", "--pack");
  refused(pack + " --pack all", "--pack", "'all'", "default");
  refused(pack + " --pack default --gqa 1", "--gqa", "--pack", "one of them");
  for (const char* driver : {"11.8", "twelve", "12.", "12.4.1", "-12", "12.400"})
    refused(pack + " --pack default --driver=" + driver, "--driver", driver, "12.4");
  refused("pack", "subcommand", "", "show, verify");
  refused("pack show", "PACK", "required", "--json");
  refused("pack verify /no/such/pack", "PACK", "/no/such/pack", "folder or zip");
  refused("pack verify /tmp --nvrtc /tmp", "--nvrtc", "--rebuild", "both, or neither");
  refused(pack + " --kinds fwd --head-dims 64 --causal no", "--gqa", "required", "--tuned");
  refused(pack + " --head-dims 64 --causal no --gqa 1", "--kinds", "required", "--tuned");
  for (const char* flag : {"--kinds fwd", "--head-dims 64", "--causal no", "--gqa 1", "--window", "--softcap yes"})
    refused(pack + " --tuned db.json " + flag, std::string(flag).substr(0, std::string(flag).find(' ')), "--tuned",
            "one of them");
  refused("tune", "--export FILE", "nothing is asked for", "--import FILE");
  refused("tune --preset eliza", "--preset", "'eliza'", "llama-3-8b, ");
  refused("tune --preset gpt2 --head-dims 64", "--preset", "--head-dims", "one of them");
  refused("tune --preset gpt2 --export db.json", "--export", "problems to tune", "one of them");
  refused("tune --preset gpt2 --kinds all", "--kinds", "'all'", "fwd, bwd");
  refused("tune --preset gpt2 --seqlens 0", "--seqlens", "'0'", "from 1");
  refused("tune --preset gpt2 --budget soon", "--budget", "'soon'", "a whole number");
  refused("tune --head-dims 64", "--seqlens", "missing", "512,2048");
  refused("tune --head-dims 300 --seqlens 512", "--head-dims", "'300'", "to 256");
  refused("tune --head-dims 64 --seqlens 512 --heads 12 --gqa 5", "--gqa", "'5'", "divide --heads, 12");
  refused("tune --head-dims 64 --seqlens 512 --causal perhaps", "--causal", "'perhaps'", "both, yes, no");
  refused("tune --export a --import b", "--export", "--import", "one of them");
  refused("tune --any-device", "--any-device", "without --import", "both together");
  refused("report --json --csv", "--json", "--csv", "one of them");
  refused("report --device 'Tesla T4'", "--device", "'Tesla T4'", "there are no records");
  refused("cache prune --max-bytes lots", "--max-bytes", "'lots'", "a whole number");
  refused("cache list --max-bytes 5", "--max-bytes", "", "--json");
  refused("cache clear --built-by ''", "--built-by", "''", "nvrtc 12.9");
  CHECK_FALSE(fs::exists(program.folder() / "pack"));
}

TEST_CASE("a bad variable is named and exits with 2") {
  const ProgramRun run = Program().run("cache path", "FLASH_ATTN_JIT_CACHE_MAX_BYTES=1G");
  CHECK(run.exit_code == 2);
  CHECK(holds(run.err, "FLASH_ATTN_JIT_CACHE_MAX_BYTES"));
}

TEST_CASE("what compiles afresh does not run offline") {
  for (const char* command :
       {"tune --head-dims 64 --seqlens 64", "inspect --kind fwd --head-dim 64 --emit resources"}) {
    CAPTURE(command);
    const ProgramRun run = Program().run(command, "FLASH_ATTN_JIT_OFFLINE=1");
    CAPTURE(run.err);
    CHECK(run.exit_code == 2);
    CHECK(holds(run.err, "FLASH_ATTN_JIT_OFFLINE is '1', and"));
    CHECK(holds(run.err, "compiles"));
  }
}

TEST_CASE("inspect prints the spec and the source without a compiler") {
  const Program program;
  const ProgramRun spec = program.run("inspect --kind fwd --head-dim 128 --causal --gqa 4 --emit spec");
  CHECK(spec.exit_code == 0);
  CHECK(spec.out.starts_with("fwd hdim128 fp16 causal gqa4 vec16 m"));
  const auto starts = [&](const std::string& flags, const std::string& expected) {
    const std::string text = program.run("inspect --head-dim 64 --emit spec " + flags).out;
    CHECK_MESSAGE(text.starts_with(expected), text);
  };
  starts("--window --softcap", "fwd hdim64 fp16 window softcap gqa1 vec16 m");
  starts("--kind bwd_dq --alibi --varlen", "bwd_dq hdim64 fp16 full alibi varlen gqa1 vec16 m");
  starts("--kind bwd_dkdv --causal --gqa 2", "bwd_dkdv hdim64 fp16 causal gqa2 vec16 m");
  starts("--kind bwd_preprocess --causal --softcap", "bwd_preprocess hdim64 fp16 full gqa1 vec16 m");  // is one for all
  CHECK(program.run("inspect --head-dim 63 --emit spec").out.starts_with("fwd hdim63 fp16 full gqa1 elem2 m"));

  const fs::path file = program.folder() / "kernel.cu";
  const ProgramRun source = program.run("inspect --head-dim 64 --emit source -o " + file.string());
  CHECK(source.exit_code == 0);
  CHECK(source.out.empty());
  CHECK(holds(content(file), "flash_fwd_hdim64"));
  const ProgramRun nowhere =
      program.run("inspect --head-dim 64 --emit source -o " + (program.folder() / "a/b").string());
  CHECK(nowhere.exit_code == 1);
  CHECK(holds(nowhere.err, "a/b"));
}

TEST_CASE("prebuild names every kernel that fails and exits with 1") {
  if (nvrtc_12().empty()) {
    MESSAGE("left out: FLASH_ATTN_JIT_TEST_SITE_PACKAGES names no folder with NVRTC");
    return;
  }
  const Program program;
  const fs::path templates = program.folder() / "templates";
  fs::copy(fs::path(FLASH_ATTN_JIT_SOURCE_DIR) / "templates", templates);
  std::ofstream(templates / "mask.cuh", std::ios::app) << "\nthis is no C++\n";
  const ProgramRun run =
      program.run("prebuild --arch sm_75 --kinds fwd --head-dims 64 --causal no --gqa 1 --json --out " +
                      (program.folder() / "pack").string(),
                  nvrtc_12() + " FLASH_ATTN_JIT_TEMPLATES='" + templates.string() + "'");
  CHECK(run.exit_code == 1);
  const Json json = Json::parse(run.out);
  CHECK(json["built"] == 0);
  REQUIRE(json["failures"].size() >= 2);
  for (const Json& failure : json["failures"]) {
    CHECK(holds(run.err, failure["kernel"].get<std::string>() + " failed"));
    CHECK(holds(failure["reason"].get<std::string>(), "mask.cuh"));
  }
}

TEST_CASE("prebuild goes on with the threads that can be had") {
  const Program program;
  fs::create_directory(program.folder() / "no nvrtc");
  // Stacks larger than the address space. Without a compiler nothing can be built, which is told once.
  const ProgramRun run =
      program.run("prebuild --arch sm_75 --kinds fwd --head-dims 64 --causal both --gqa 1,2 --jobs 500 --json --out '" +
                      (program.folder() / "pack").string() + "'",
                  "FLASH_ATTN_JIT_NVRTC='" + (program.folder() / "no nvrtc").string() +
                      "' sh -c 'ulimit -s 140000000000 && exec \"$0\" \"$@\"'");
  CAPTURE(run.err);
  CHECK(run.exit_code == 1);
  CHECK(holds(Json::parse(run.out)["stopped_by"], "no NVRTC was found"));
  CHECK_FALSE(fs::exists(program.folder() / "pack/manifest.json"));  // nothing is no pack
  CHECK(holds(run.err, "threads"));
}

TEST_CASE("prebuild that cannot compile says so once and stops") {
  const Program program;
  fs::create_directory(program.folder() / "no nvrtc");
  const std::string nowhere = "FLASH_ATTN_JIT_NVRTC='" + (program.folder() / "no nvrtc").string() + "'";
  const std::string out = (program.folder() / "pack.zip").string();
  for (const auto& [variables, reason] : {std::pair{nowhere, "no NVRTC was found"},
                                          {std::string("FLASH_ATTN_JIT_OFFLINE=1"), "FLASH_ATTN_JIT_OFFLINE"}}) {
    const ProgramRun run = program.run("prebuild --arch sm_75 --pack default --jobs 4 --json --out " + out, variables);
    CAPTURE(run.err);
    CHECK(run.exit_code == 1);
    const std::size_t first = run.err.find(reason);
    CHECK(first != std::string::npos);
    CHECK(run.err.find(reason, first + 1) == std::string::npos);
    CHECK(Json::parse(run.out)["failures"].empty());
  }
}

TEST_CASE("pack show and verify, of a pack whose words are meant for a terminal") {
  using namespace flash_attn_jit;
  const Program program;
  const KernelId id{make_key({{"source", "text"}}), "x", "\x1b[2Jspec", "sm_75"};
  CompiledKernel kernel = testing::made_up_kernel(std::string(100, '\0').replace(0, 4,
                                                                                 "\x7f"
                                                                                 "ELF"));
  kernel.image[18] = static_cast<char>(190);
  kernel.built_by = "\x1b]0;title\a";
  const fs::path pack = program.folder() / "pack";
  fs::create_directory(pack);
  std::ofstream(pack / id.file_name(), std::ios::binary) << serialize({id, kernel});
  std::ofstream(pack / "a\x1b[31m.txt") << "";
  const ProgramRun shown = program.run("pack show " + pack.string()),
                   json = program.run("pack show --json " + pack.string());
  CHECK(shown.exit_code == 0);
  CHECK(holds(shown.out, "?[2Jspec"));
  CHECK_FALSE(holds(shown.out, "\x1b"));
  CHECK(Json::parse(json.out)["kernels"].size() == 1);
  CHECK(Json::parse(json.out)["faults"].size() == 2);
  const ProgramRun verified = program.run("pack verify " + pack.string());
  CHECK(verified.exit_code == 1);
  CHECK_FALSE(holds(verified.out, "\x1b"));
  CHECK(holds(verified.out, "manifest.json: it is missing"));
  CHECK(Json::parse(program.run("pack verify --json " + pack.string()).out)["faults"].size() == 3);
  CHECK(program.run("pack verify --rebuild " + pack.string(), "FLASH_ATTN_JIT_OFFLINE=1").exit_code == 2);
}

TEST_CASE("cache says what it cannot remove" * doctest::skip(::geteuid() != 0)) {
  const Program program;
  const fs::path cache = program.folder() / "cache";
  fs::create_directory(cache);
  std::ofstream(cache / ("x." + std::string(64, '0') + ".kernel")) << "not a kernel";
  fs::permissions(program.folder(), fs::perms::all);
  const ProgramRun run = program.run("cache clear", "setpriv --reuid 12345 --clear-groups");
  CAPTURE(run.err);
  CHECK(run.exit_code == 1);
  CHECK(holds(run.err, "cannot be removed"));
  CHECK_FALSE(fs::is_empty(cache));
}

TEST_CASE("cache without a folder says so" * doctest::skip(::geteuid() != 0)) {
  const Program program;
  for (const char* command : {"path", "list", "verify", "prune", "clear"}) {
    const ProgramRun run =
        program.run(std::string("cache ") + command,
                    "env -u HOME -u XDG_CACHE_HOME -u FLASH_ATTN_JIT_CACHE_DIR setpriv --reuid 54321 "
                    "--clear-groups");
    CAPTURE(run.err);
    CHECK(run.exit_code == 2);
    CHECK(holds(run.err, "HOME"));
    CHECK(holds(run.err, "FLASH_ATTN_JIT_CACHE_DIR"));
  }
}

TEST_CASE("cache shows, verifies and clears") {
  const Program program;
  const fs::path cache = program.folder() / "cache";
  CHECK(program.run("cache path").out == cache.string() + "\n");
  CHECK(Json::parse(program.run("cache list --json").out)["kernels"].empty());
  CHECK(program.run("cache verify").exit_code == 0);

  fs::create_directory(cache);
  fs::permissions(cache, fs::perms::owner_all);
  std::ofstream(cache / ("x." + std::string(64, '0') + ".kernel")) << "not a kernel";
  const ProgramRun verified = program.run("cache verify --json");
  CHECK(verified.exit_code == 1);
  CHECK(Json::parse(verified.out)["broken"].size() == 1);
  CHECK(program.run("cache clear").exit_code == 0);
  CHECK(Json::parse(program.run("cache list --json").out)["kernels"].empty());
}

TEST_CASE("cache clear --built-by removes what one compiler made") {
  using namespace flash_attn_jit;
  const Program program;
  const fs::path cache = program.folder() / "cache";
  fs::create_directory(cache);
  fs::permissions(cache, fs::perms::owner_all);
  for (const std::string by : {"nvrtc 12.9", "nvrtc 12.9, linked by driver 12.4", "nvrtc 12.90", "g++ 12.2.0"}) {
    const KernelId id = testing::made_up_id(std::to_string(std::hash<std::string>()(by)));
    CompiledKernel kernel = testing::made_up_kernel("image");
    kernel.built_by = by;
    std::ofstream(cache / id.file_name(), std::ios::binary) << serialize({id, kernel});
    fs::permissions(cache / id.file_name(), fs::perms::owner_read | fs::perms::owner_write);
  }
  const auto left = [&] { return Json::parse(program.run("cache list --json").out)["kernels"].size(); };
  REQUIRE(left() == 4);
  const ProgramRun nothing = program.run("cache clear --built-by 'nvrtc 12' --json");
  CHECK(Json::parse(nothing.out)["removed_files"] == 0);
  CHECK(nothing.exit_code == 1);
  CHECK(holds(nothing.err, "nothing there was made by 'nvrtc 12'"));
  const Json removed = Json::parse(program.run("cache clear --built-by 'nvrtc 12.9' --json").out);
  CHECK(removed["removed_files"] == 2);
  CHECK(removed["removed_bytes"] > 0);
  CHECK(left() == 2);
}

TEST_CASE("--json with paths that are no UTF-8") {
  const Program program;
  const std::string folder = (program.folder() / "not-\xff-utf8").string();
  const std::string shown = (program.folder() / "not-\uFFFD-utf8").string();
  fs::create_directories(folder);
  fs::permissions(folder, fs::perms::owner_all);
  std::ofstream(fs::path(folder) / ("x." + std::string(64, '0') + ".kernel")) << "not a kernel";
  const std::string variables = "FLASH_ATTN_JIT_CACHE_DIR='" + folder + "' CONDA_PREFIX='" + folder + "'";
  for (const std::string command : {"cache path", "cache list", "cache verify", "cache prune", "cache clear"}) {
    CAPTURE(command);
    const ProgramRun run = program.run(command + " --json", variables);
    CAPTURE(run.err);
    CHECK(run.err.empty());
    CHECK(Json::parse(run.out)["path"] == shown);
  }
  const ProgramRun devices = program.run("devices --json", variables);
  CHECK(devices.exit_code == 0);
  CHECK(Json::parse(devices.out)["cache"] == shown);
  CHECK(holds(devices.out, shown + "/lib"));
  const ProgramRun plain = program.run("devices", variables);
  CHECK(plain.exit_code == 0);
  CHECK(holds(plain.out, folder));
  if (nvrtc_12().empty()) return;
  const ProgramRun prebuild = program.run(
      "prebuild --arch sm_75 --kinds fwd --head-dims 8 --causal no --gqa 1 --json "
      "--out '" +
          folder + "/pack'",
      nvrtc_12());
  CHECK(prebuild.exit_code == 0);
  CHECK(Json::parse(prebuild.out)["out"] == shown + "/pack");
}

TEST_CASE("devices lists every place where NVRTC was looked for, with or without a GPU") {
  const ProgramRun run = Program().run("devices --json");
  CHECK(run.exit_code == 0);
  const Json json = Json::parse(run.out);
  CHECK(json["nvrtc"]["searched"].size() >= 1);
  CHECK(json["devices"].is_array());
  CHECK((json["driver"]["found"] || !json["driver"]["reason"].get<std::string>().empty()));
  CHECK(holds(Program().run("devices").out, "NVRTC"));
}

namespace {

using flash_attn_jit::FolderUse;
using flash_attn_jit::RecordStore;
using flash_attn_jit::TuningRecord;
using flash_attn_jit::testing::made_up_decode_record;
using flash_attn_jit::testing::made_up_record;

// As tuning leaves them in a program's cache.
void keep_records(const Program& program, const std::vector<TuningRecord>& records) {
  RecordStore store(program.folder() / "cache", FolderUse::kCache);
  for (const TuningRecord& record : records) store.publish(record);
}

}  // namespace

TEST_CASE("tune without a driver says so; the command that it starts is not for people") {
  const Program program;
  const std::string without_driver = "LD_LIBRARY_PATH='" + program.folder().string() + "'";
  std::ofstream(program.folder() / "libcuda.so.1") << "no library";
  const ProgramRun run = program.run("tune --preset gpt2 --budget 10", without_driver);
  CHECK(run.exit_code == 1);
  CHECK(holds(run.err, "no CUDA driver"));
  CHECK(run.out.empty());
  CHECK_FALSE(holds(program.run("--help").out, "tune-worker"));
  const ProgramRun worker = program.run("tune-worker");  // its stdin is empty
  CHECK(worker.exit_code == 0);
  CHECK(worker.out.empty());
}

TEST_CASE("tune --export and --import move records; --import takes another GPU's only where it is told to") {
  const Program here, there;
  const std::string file = "'" + (here.folder() / "db.json").string() + "'";
  const ProgramRun nothing = here.run("tune --export " + file);
  CHECK(nothing.exit_code == 1);
  CHECK(holds(nothing.err, "no records"));
  TuningRecord other_templates = made_up_record(128);
  other_templates.key.templates = std::string(64, '0');
  keep_records(here, {made_up_record(64), other_templates});
  const ProgramRun exported = here.run("tune --export " + file);
  CHECK(exported.exit_code == 0);
  CHECK(holds(exported.out, "2 records"));
  CHECK(holds(exported.out, "Tesla T4 (sm_75, 40 multiprocessors)"));
  CHECK(here.run("tune --export '" + (here.folder() / "no/db.json").string() + "'").exit_code == 1);

  const ProgramRun refused = there.run("tune --import " + file + " --json");
  CHECK(refused.exit_code == 1);
  CHECK(Json::parse(refused.out)["refused"].size() == 2);
  CHECK(holds(refused.err, "fwd hdim64 fp16 full gqa1 vec16 q1024 k1024 bh64 for Tesla T4"));
  CHECK(holds(refused.err, "this machine has"));
  CHECK(holds(refused.err, "--any-device"));
  const Json taken = Json::parse(there.run("tune --import " + file + " --any-device --json").out);
  CHECK(taken["taken"] == 2);
  CHECK(taken["other_templates"] == 1);
  const ProgramRun again = there.run("tune --any-device --import " + file);
  CHECK(again.exit_code == 0);
  CHECK(holds(again.out, "0 records taken, 2 there already, 0 older than what is there, 0 refused"));
  CHECK(there.run("tune --export '" + (there.folder() / "db.json").string() + "'").exit_code == 0);
  CHECK(content(there.folder() / "db.json") == content(here.folder() / "db.json"));

  std::ofstream(here.folder() / "db.json", std::ios::trunc) << "{\"format\": 1}";
  const ProgramRun bad = there.run("tune --any-device --import " + file);
  CHECK(bad.exit_code == 1);
  CHECK(holds(bad.err, "is no tuning database: format is 1"));
  const ProgramRun missing = there.run("tune --any-device --import nowhere.json");
  CHECK(missing.exit_code == 2);
  CHECK(holds(missing.err, "--import is 'nowhere.json', and there is no such file"));
  CHECK(holds(there.run("report --database " + here.folder().string()).err, ", a folder; accepted: a file"));
}

TEST_CASE("report: a table, JSON and CSV of the same records") {
  const Program program;
  CHECK(holds(program.run("report").out, "0 records"));
  TuningRecord other_templates = made_up_record(128);
  other_templates.key.templates = std::string(64, '0');
  other_templates.key.device.name = "Tesla T4, \"the other\"";
  keep_records(program, {made_up_record(64), flash_attn_jit::testing::predicted_record(80), other_templates});
  const ProgramRun table = program.run("report");
  CHECK(table.exit_code == 0);
  for (const char* part :
       {"== Tesla T4 (sm_75, 40 multiprocessors)\n", "fwd hdim64 fp16 full gqa1 vec16 q1024 k1024 bh64\n",
        "13.7 TFLOP/s", "27.3 % of the measured peak", "250 registers, no spills, 1 blocks a multiprocessor",
        "4.2 % slower: told apart", "loses 4.2 %", "chose the winner; predicted 1.05",
        "1 pruned: predicted 2.1 times the best", "sdpa_efficient, 2.5 ms, 2.08 times the winner's",
        "TFLOP/s as predicted", "NOT USED: made with other templates", "3 records"})
    CHECK_MESSAGE(holds(table.out, part), (std::string(part) + " in " + table.out));

  const Json json = Json::parse(program.run("report --json").out);
  REQUIRE(json["classes"].size() == 3);
  const Json& row = json["classes"][0];
  CHECK(row["class"] == "fwd hdim64 fp16 full gqa1 vec16 q1024 k1024 bh64");
  CHECK(row["winner"]["time"]["seconds"] == 1.2e-3);
  CHECK(row["runner_up"]["told_apart"] == true);
  CHECK(row["rejected"][0]["reasons"][0] == "predicted 2.1 times the best");
  CHECK(json["classes"][1]["policy"]["timer"] == "model");
  CHECK(json["classes"][1]["winner"]["time"]["seconds"] == json["classes"][1]["winner"]["time"]["low"]);
  CHECK(json["classes"][2]["in_use"] == false);

  const std::string csv = program.run("report --csv").out;
  CHECK(std::count(csv.begin(), csv.end(), '\n') == 4);
  CHECK(csv.starts_with("device.name,device.sm,"));
  CHECK(holds(csv, "\n\"Tesla T4, \"\"the other\"\"\",75,40,native,fwd hdim128 fp16 full gqa1 vec16,1024,1024,64,"));
  CHECK(Json::parse(program.run("report --json --device 'Tesla T4'").out)["classes"].size() == 2);
  CHECK(holds(program.run("report --device T4").err, "accepted: Tesla T4"));

  const std::string file = "'" + (program.folder() / "db.json").string() + "'";
  REQUIRE(program.run("tune --export " + file).exit_code == 0);
  CHECK(Json::parse(Program().run("report --json --database " + file).out)["classes"] == json["classes"]);
}

TEST_CASE("report --against: two databases side by side") {
  using flash_attn_jit::testing::measured_candidate;
  const Program program;
  TuningRecord faster = made_up_record(64);
  faster.candidates[0] = measured_candidate(faster.winner, 1.0e-3);
  keep_records(program, {faster, made_up_record(96)});
  flash_attn_jit::write_database(program.folder() / "before.json", {made_up_record(64), made_up_record(128)});
  const std::string command = "report --against '" + (program.folder() / "before.json").string() + "'";
  const ProgramRun table = program.run(command);
  CHECK(table.exit_code == 0);
  CHECK(holds(table.out, "faster, takes -16.7 %"));
  CHECK(holds(table.out, "1 faster, 1 only after, 1 only before"));
  const Json json = Json::parse(program.run(command + " --json").out);
  CHECK(json["classes"][0]["verdict"] == "faster");
  CHECK(json["classes"][0]["before"]["time"]["seconds"] == 1.2e-3);
  const std::string csv = program.run(command + " --csv").out;
  CHECK(std::count(csv.begin(), csv.end(), '\n') == 4);
}

TEST_CASE("prebuild --tuned builds the winners of a database, and the pack keeps their records") {
  const Program program;
  const fs::path pack = program.folder() / "pack", file = program.folder() / "db.json";
  const std::string command =
      "prebuild --arch sm_75 --json --tuned '" + file.string() + "' --out '" + pack.string() + "'";
  TuningRecord ampere = made_up_record(96), turing_code = made_up_record(96), other_templates = made_up_record(128),
               shares_a_kernel = made_up_record(64, 4096);
  ampere.key.device = {"NVIDIA A100", 80, 108, "native"};
  turing_code.key.device = {"NVIDIA H100", 90, 132, "compute_75"};
  other_templates.key.templates = std::string(64, '0');
  flash_attn_jit::write_database(file, {ampere, turing_code, other_templates});
  const ProgramRun nothing = program.run(command);
  CHECK(nothing.exit_code == 2);
  CHECK(holds(nothing.err, "no record for sm_75"));
  for (const char* part : {"--arch is sm_75", "of the Turing code", "other templates"}) CHECK(holds(nothing.err, part));
  CHECK_FALSE(fs::exists(pack));
  if (nvrtc_12().empty()) return;

  const std::vector<TuningRecord> used = {made_up_record(64), shares_a_kernel, made_up_record(80)};
  std::vector<TuningRecord> all = used;
  all.insert(all.end(), {ampere, turing_code, other_templates});
  flash_attn_jit::write_database(file, all);
  const ProgramRun run = program.run(command, nvrtc_12());
  CAPTURE(run.err);
  CHECK(run.exit_code == 0);
  CHECK(Json::parse(run.out)["built"] == 2);
  std::string specs, expected;
  const Json manifest = Json::parse(content(pack / "manifest.json"));
  for (const Json& kernel : manifest["kernels"]) specs += kernel["spec"].get<std::string>() + "\n";
  for (const TuningRecord& record : {used[0], used[2]}) {
    flash_attn_jit::KernelSpec spec = record.key.problem.spec;
    spec.tile = record.winner;
    expected += spec.text() + "\n";
  }
  CHECK(specs == expected);
  const auto kept = RecordStore(pack, FolderUse::kPack).read(used[0].key.device);
  REQUIRE(kept.size() == 3);
  for (const TuningRecord& record : kept) CHECK(record.key.device == used[0].key.device);
}

TEST_CASE("prebuild --tuned builds with a decode kernel what puts its splits together") {
  if (nvrtc_12().empty()) return;
  const Program program;
  const fs::path pack = program.folder() / "pack", file = program.folder() / "db.json";
  const TuningRecord record = made_up_decode_record();
  flash_attn_jit::write_database(file, {record});
  const ProgramRun run =
      program.run("prebuild --arch sm_75 --tuned '" + file.string() + "' --out '" + pack.string() + "'", nvrtc_12());
  CAPTURE(run.err);
  CHECK(run.exit_code == 0);
  const Json kernels = Json::parse(content(pack / "manifest.json"))["kernels"];
  REQUIRE(kernels.size() == 2);
  CHECK(kernels[1]["spec"] == record.key.problem.kernel() + " " + record.winner.text());
  CHECK(holds(kernels[0]["spec"], "decode_combine hdim64 fp16 full gqa1 vec16"));
}
