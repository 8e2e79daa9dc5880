#include <doctest/doctest.h>

#include <map>

#include "runtime/config.h"
#include "tests/cpp/containing.h"
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
  CHECK_FALSE(config.nvrtc);
  CHECK_FALSE(config.cxx);
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
                              {"FLASH_ATTN_JIT_CXX", "clang++"},
                              {"FLASH_ATTN_JIT_NVRTC", dir},
                              {"FLASH_ATTN_JIT_PREBUILT", dir},
                              {"FLASH_ATTN_JIT_TEMPLATES", dir},
                              {"VIRTUAL_ENV", "/venv"},
                              {"LD_LIBRARY_PATH", "/a::/b:"}});
  CHECK(config.cache_dir == "/somewhere/else");
  CHECK(config.cache_max_bytes == 5000);
  CHECK(config.target == TargetChoice::kCompute75);
  CHECK(config.interpret);
  CHECK(config.cxx == "clang++");
  CHECK(config.nvrtc == dir);
  CHECK(config.prebuilt == dir);
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
      {"FLASH_ATTN_JIT_PREBUILT", {"/no/such/folder", "a folder"}},
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
