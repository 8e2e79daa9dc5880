#include "runtime/system/config.h"

#include <pwd.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <cstdlib>
#include <string_view>

namespace flash_attn_jit {
namespace {

namespace fs = std::filesystem;

constexpr std::string_view kPrefix = "FLASH_ATTN_JIT_";

// The home folder that the system's list of users has for a user; nothing where it has none.
std::optional<fs::path> home_in_list(const std::optional<std::string>& name) {
  passwd entry{};
  passwd* found = nullptr;
  std::vector<char> room(16384);
  if (name)
    getpwnam_r(name->c_str(), &entry, room.data(), room.size(), &found);
  else
    getpwuid_r(geteuid(), &entry, room.data(), room.size(), &found);
  if (found == nullptr || found->pw_dir == nullptr) return std::nullopt;
  const fs::path home = found->pw_dir;
  return home.is_absolute() ? std::optional(home) : std::nullopt;
}

// Reads variables; an empty value is no value.
class VariableReader {
 public:
  explicit VariableReader(const EnvironmentLookup& environment) : environment_(environment) {}

  std::optional<std::string> text(const std::string& name) const {
    std::optional<std::string> value = environment_(name);
    if (value && value->empty()) value.reset();
    return value;
  }

  std::optional<fs::path> path(const std::string& name) const {
    if (auto value = text(name)) return fs::path(*value);
    return std::nullopt;
  }

  std::optional<std::string> own(const std::string& name) const { return text(std::string(kPrefix) + name); }

  // One of ours, made absolute now: the process may change its folder later.
  std::optional<fs::path> own_path(const std::string& name) const {
    if (auto value = with_home(name)) return fs::absolute(*value);
    return std::nullopt;
  }

  // One of ours, with ~ or ~user at its begin replaced, as a shell would where it stands in no quotes.
  std::optional<std::string> with_home(const std::string& name) const {
    const auto value = own(name);
    if (!value || value->front() != '~') return value;
    const std::size_t end = std::min(value->find('/'), value->size());
    const auto home = end == 1 ? home_folder() : home_in_list(value->substr(1, end - 1));
    if (!home) refuse(name, *value, "a path; whose home folder ~ stands for is not known here");
    return home->string() + value->substr(end);
  }

  std::optional<fs::path> home_folder() const {
    if (auto home = path("HOME"); home && home->is_absolute()) return home;
    return home_in_list(std::nullopt);
  }

  [[noreturn]] static void refuse(const std::string& name, const std::string& value, const std::string& accepted) {
    throw ConfigError("environment variable " + std::string(kPrefix) + name + " is '" + value +
                      "'; accepted: " + accepted);
  }

 private:
  const EnvironmentLookup& environment_;
};

// Empty where there is none.
fs::path cache_folder(const VariableReader& reader) {
  if (auto dir = reader.own_path("CACHE_DIR")) return *dir;
  // The XDG base directory specification tells to ignore a relative path.
  if (auto xdg = reader.path("XDG_CACHE_HOME"); xdg && xdg->is_absolute()) return *xdg / "flash-attn-jit";
  if (auto home = reader.home_folder()) return *home / ".cache" / "flash-attn-jit";
  return {};
}

std::uint64_t byte_count(const VariableReader& reader, const std::string& name, std::uint64_t otherwise) {
  const auto value = reader.own(name);
  if (!value) return otherwise;
  std::uint64_t bytes = 0;
  const char* end = value->data() + value->size();
  const auto [stop, error] = std::from_chars(value->data(), end, bytes);
  if (error != std::errc() || stop != end)
    VariableReader::refuse(name, *value, "a number of bytes, such as 1073741824");
  return bytes;
}

bool flag(const VariableReader& reader, const std::string& name) {
  const auto value = reader.own(name);
  if (!value || *value == "0") return false;
  if (*value == "1") return true;
  VariableReader::refuse(name, *value, "0, 1");
}

TargetChoice target_choice(const VariableReader& reader) {
  const auto value = reader.own("TARGET");
  if (!value || *value == "native") return TargetChoice::kNative;
  if (*value == "compute_75") return TargetChoice::kCompute75;
  VariableReader::refuse("TARGET", *value, "native, compute_75");
}

bool refuses_bfloat16(const VariableReader& reader) {
  const auto value = reader.own("BFLOAT16");
  if (!value || *value == "convert") return false;
  if (*value == "refuse") return true;
  VariableReader::refuse("BFLOAT16", *value, "convert, refuse");
}

std::optional<fs::path> existing_folder(const VariableReader& reader, const std::string& name) {
  const auto path = reader.own_path(name);
  std::error_code ignored;
  if (path && !fs::is_directory(*path, ignored))
    VariableReader::refuse(name, path->string(), "a folder; there is none at that path");
  return path;
}

std::optional<fs::path> existing(const VariableReader& reader, const std::string& name, const std::string& what) {
  const auto path = reader.own_path(name);
  std::error_code ignored;
  if (path && !fs::exists(*path, ignored))
    VariableReader::refuse(name, path->string(), what + "; there is none at that path");
  return path;
}

std::vector<fs::path> path_list(const std::optional<std::string>& value) {
  std::vector<fs::path> paths;
  std::string_view rest = value ? std::string_view(*value) : std::string_view();
  while (!rest.empty()) {
    const std::size_t end = std::min(rest.find(':'), rest.size());
    if (end > 0) paths.emplace_back(rest.substr(0, end));
    rest.remove_prefix(std::min(end + 1, rest.size()));
  }
  return paths;
}

std::optional<std::string> from_process(const std::string& name) {
  const char* value = std::getenv(name.c_str());
  if (value == nullptr) return std::nullopt;
  return std::string(value);
}

}  // namespace

Config read_config(const EnvironmentLookup& environment) {
  const VariableReader reader(environment);
  Config config;
  config.cache_dir = cache_folder(reader);
  config.cache_max_bytes = byte_count(reader, "CACHE_MAX_BYTES", config.cache_max_bytes);
  config.target = target_choice(reader);
  config.interpret = flag(reader, "INTERPRET");
  config.nvrtc = existing(reader, "NVRTC", "a file or folder");
  config.refuses_bfloat16 = refuses_bfloat16(reader);
  config.cxx = reader.with_home("CXX");
  config.offline = flag(reader, "OFFLINE");
  config.prebuilt = existing(reader, "PREBUILT", "a pack's folder or zip file");
  config.templates = existing_folder(reader, "TEMPLATES");
  config.virtual_env = reader.path("VIRTUAL_ENV");
  config.conda_prefix = reader.path("CONDA_PREFIX");
  config.cuda_home = reader.path("CUDA_HOME");
  config.library_path = path_list(reader.text("LD_LIBRARY_PATH"));
  return config;
}

Config read_config() { return read_config(from_process); }

}  // namespace flash_attn_jit
