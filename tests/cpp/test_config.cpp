#include <doctest/doctest.h>

#include <unistd.h>

#include <cstdlib>
#include <map>

#include "generator/render.h"
#include "runtime/launch/process.h"
#include "runtime/system/config.h"
#include "tests/cpp/containing.h"
#include "tests/cpp/processes.h"
#include "tests/cpp/temporary_folder.h"

using namespace flash_attn_jit;
using namespace flash_attn_jit::testing;

namespace {

Config read(std::map<std::string, std::string> variables) {
  variables.try_emplace("HOME", "/home/someone");
  return read_config([&](const std::string& name) -> std::optional<std::string> {
    const auto found = variables.find(name);
    if (found == variables.end()) return std::nullopt;
    return found->second;
  });
}

std::string refusal(const std::string& name, const std::string& value) {
  try {
    read({{name, value}});
  } catch (const ConfigError& error) {
    return error.what();
  }
  return "";
}

}  // namespace

TEST_CASE("configuration: defaults") {
  const Config config = read({});
  CHECK(config.cache_dir == "/home/someone/.cache/flash-attn-jit");
  CHECK(config.cache_max_bytes == 1024ull * 1024 * 1024);
  CHECK(config.target == TargetChoice::kNative);
  CHECK_FALSE(config.interpret);
  CHECK_FALSE(config.refuses_bfloat16);
  CHECK_FALSE(config.nvrtc);
  CHECK_FALSE(config.cxx);
  CHECK_FALSE(config.offline);
  CHECK_FALSE(config.prebuilt);
  CHECK_FALSE(config.templates);
}

TEST_CASE("configuration: an empty variable is none") {
  const Config config = read({{"FLASH_ATTN_JIT_CACHE_DIR", ""},
                              {"FLASH_ATTN_JIT_TARGET", ""},
                              {"FLASH_ATTN_JIT_INTERPRET", ""},
                              {"FLASH_ATTN_JIT_CACHE_MAX_BYTES", ""}});
  CHECK(config.cache_dir == read({}).cache_dir);
  CHECK(config.target == TargetChoice::kNative);
}

TEST_CASE("configuration: values") {
  const TemporaryFolder folder;
  const std::string dir = folder.path().string();
  const Config config = read({{"FLASH_ATTN_JIT_CACHE_DIR", "/somewhere/else"},
                              {"FLASH_ATTN_JIT_CACHE_MAX_BYTES", "5000"},
                              {"FLASH_ATTN_JIT_TARGET", "compute_75"},
                              {"FLASH_ATTN_JIT_INTERPRET", "1"},
                              {"FLASH_ATTN_JIT_BFLOAT16", "refuse"},
                              {"FLASH_ATTN_JIT_CXX", "clang++"},
                              {"FLASH_ATTN_JIT_NVRTC", dir},
                              {"FLASH_ATTN_JIT_OFFLINE", "1"},
                              {"FLASH_ATTN_JIT_PREBUILT", dir},
                              {"FLASH_ATTN_JIT_TEMPLATES", dir},
                              {"VIRTUAL_ENV", "/venv"},
                              {"LD_LIBRARY_PATH", "/a::/b:"}});
  CHECK(config.cache_dir == "/somewhere/else");
  CHECK(config.cache_max_bytes == 5000);
  CHECK(config.target == TargetChoice::kCompute75);
  CHECK(config.interpret);
  CHECK(config.refuses_bfloat16);
  CHECK(config.cxx == "clang++");
  CHECK(config.nvrtc == dir);
  CHECK(config.offline);
  CHECK(config.prebuilt == dir);
  write_all(folder / "pack.zip", "");
  CHECK(read({{"FLASH_ATTN_JIT_PREBUILT", (folder / "pack.zip").string()}}).prebuilt == folder / "pack.zip");
  CHECK(config.templates == dir);
  CHECK(config.virtual_env == "/venv");
  CHECK(config.library_path == std::vector<std::filesystem::path>{"/a", "/b"});
}

TEST_CASE("configuration: where the cache is") {
  CHECK(read({{"XDG_CACHE_HOME", "/xdg"}}).cache_dir == "/xdg/flash-attn-jit");
  CHECK(read({{"XDG_CACHE_HOME", "relative"}}).cache_dir == "/home/someone/.cache/flash-attn-jit");
  CHECK(read({{"XDG_CACHE_HOME", "/xdg"}, {"FLASH_ATTN_JIT_CACHE_DIR", "/own"}}).cache_dir == "/own");
  CHECK(read({{"FLASH_ATTN_JIT_CACHE_DIR", "here"}}).cache_dir == std::filesystem::current_path() / "here");
}

TEST_CASE("configuration: a bad value names the variable, what came and what is accepted") {
  const std::map<std::string, std::pair<std::string, std::string>> cases = {
      {"FLASH_ATTN_JIT_TARGET", {"sm_75", "native, compute_75"}},
      {"FLASH_ATTN_JIT_INTERPRET", {"yes", "0, 1"}},
      {"FLASH_ATTN_JIT_CACHE_MAX_BYTES", {"1G", "a number of bytes"}},
      {"FLASH_ATTN_JIT_PREBUILT", {"/no/such/folder", "a pack's folder or zip file"}},
      {"FLASH_ATTN_JIT_OFFLINE", {"true", "0, 1"}},
      {"FLASH_ATTN_JIT_TEMPLATES", {"/no/such/folder", "a folder"}},
      {"FLASH_ATTN_JIT_NVRTC", {"/no/such/file", "a file or folder"}},
  };
  for (const auto& [name, value_and_accepted] : cases) {
    const std::string message = refusal(name, value_and_accepted.first);
    CHECK(message == Containing{name});
    CHECK(message == Containing{value_and_accepted.first});
    CHECK(message == Containing{"accepted: " + value_and_accepted.second});
  }
  for (const char* bytes : {"-1", "1.5", " 1", "0x10", "99999999999999999999999"})
    CHECK(refusal("FLASH_ATTN_JIT_CACHE_MAX_BYTES", bytes) == Containing{bytes});
}

TEST_CASE("configuration: ~ is the home folder in every path that is ours") {
  const TemporaryFolder home;
  std::filesystem::create_directories(home / "below");
  const std::string folder = home.path().string();
  for (const char* path : {"~", "~/", "~/below"}) {
    const std::filesystem::path expected = folder + std::string(path).substr(1);
    const Config config = read({{"HOME", folder},
                                {"FLASH_ATTN_JIT_CACHE_DIR", path},
                                {"FLASH_ATTN_JIT_NVRTC", path},
                                {"FLASH_ATTN_JIT_PREBUILT", path},
                                {"FLASH_ATTN_JIT_TEMPLATES", path},
                                {"FLASH_ATTN_JIT_CXX", path}});
    CHECK(config.cache_dir == expected);
    CHECK(config.nvrtc == expected);
    CHECK(config.prebuilt == expected);
    CHECK(config.templates == expected);
    CHECK(config.cxx == expected);
  }
  CHECK(read({{"FLASH_ATTN_JIT_CACHE_DIR", "~root/cache"}}).cache_dir == "/root/cache");
  CHECK(read({{"FLASH_ATTN_JIT_CACHE_DIR", "/data/~x"}}).cache_dir == "/data/~x");
  CHECK(refusal("FLASH_ATTN_JIT_CACHE_DIR", "~nobody-of-this-name/cache") ==
        Containing{"'~nobody-of-this-name/cache'"});
}

TEST_CASE("configuration: a home folder that is not a whole path is none") {
  const Config config = read({{"HOME", "relative"}});
  CHECK(config.cache_dir.is_absolute());
}

TEST_CASE("configuration: without a home folder there is no cache, which is no error; ~ is one" *
          doctest::skip(::geteuid() != 0)) {
  constexpr uid_t kNobodyKnown = 54321;  // no entry in /etc/passwd
  CHECK(code_as_user(kNobodyKnown, [] { return read({{"HOME", ""}}).cache_dir.empty() ? 0 : 1; }) == 0);
  CHECK(code_as_user(kNobodyKnown, [] {
          try {
            read({{"HOME", ""}, {"FLASH_ATTN_JIT_CACHE_DIR", "~/cache"}});
          } catch (const ConfigError& error) {
            return error.what() == Containing{"FLASH_ATTN_JIT_CACHE_DIR is '~/cache'"} ? 0 : 1;
          }
          return 2;
        }) == 0);
}

TEST_CASE("configuration and templates outlive what the process does at its end") {
  // Handlers run in the reverse order: this one after the objects made since.
  CHECK(code_of_process([]() -> int {
          ::setenv("FLASH_ATTN_JIT_CACHE_DIR", "/a/path/that/is/too/long/for/the/text/object/itself", 1);
          std::atexit([] {
            const bool right = config().cache_dir == "/a/path/that/is/too/long/for/the/text/object/itself" &&
                               embedded_templates().at("mask.cuh").find("#pragma once") != std::string::npos;
            ::_exit(right ? 0 : 1);
          });
          (void)config();
          (void)embedded_templates();
          std::exit(2);
        }) == 0);
}
