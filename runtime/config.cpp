#include "runtime/config.h"

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

// Reads variables; an empty value is no value.
class Reader {
 public:
  explicit Reader(const EnvironmentLookup& environment) : environment_(environment) {}

  std::optional<std::string> text(const std::string& name) const {
    std::optional<std::string> value = environment_(name);
    if (value && value->empty()) value.reset();
    return value;
  }

  std::optional<fs::path> path(const std::string& name) const {
    if (auto value = text(name)) return fs::path(*value);
    return std::nullopt;
  }

  // One of ours, made absolute now: the process may change its folder later.
  std::optional<fs::path> own_path(const std::string& name) const {
    if (auto value = own(name)) return fs::absolute(*value);
    return std::nullopt;
  }

  std::optional<std::string> own(const std::string& name) const { return text(std::string(kPrefix) + name); }

  [[noreturn]] static void refuse(const std::string& name, const std::string& value,
                                  const std::string& accepted) {
    throw ConfigError("environment variable " + std::string(kPrefix) + name + " is '" + value +
                      "'; accepted: " + accepted);
  }

 private:
  const EnvironmentLookup& environment_;
};

fs::path home_folder(const Reader& reader) {
  if (auto home = reader.path("HOME")) return *home;
  if (const passwd* user = getpwuid(geteuid()); user != nullptr && user->pw_dir != nullptr)
    return user->pw_dir;
  throw ConfigError("no folder for the cache: HOME is not set; set FLASH_ATTN_JIT_CACHE_DIR to a folder");
}

fs::path cache_folder(const Reader& reader) {
  if (auto dir = reader.own_path("CACHE_DIR")) return *dir;
  // The XDG base directory specification tells to ignore a relative path.
  if (auto xdg = reader.path("XDG_CACHE_HOME"); xdg && xdg->is_absolute()) return *xdg / "flash-attn-jit";
  return home_folder(reader) / ".cache" / "flash-attn-jit";
}

std::uint64_t byte_count(const Reader& reader, const std::string& name, std::uint64_t otherwise) {
  const auto value = reader.own(name);
  if (!value) return otherwise;
  std::uint64_t bytes = 0;
  const char* end = value->data() + value->size();
  const auto [stop, error] = std::from_chars(value->data(), end, bytes);
  if (error != std::errc() || stop != end)
    Reader::refuse(name, *value, "a number of bytes, such as 1073741824");
  return bytes;
}

bool flag(const Reader& reader, const std::string& name) {
  const auto value = reader.own(name);
  if (!value || *value == "0") return false;
  if (*value == "1") return true;
  Reader::refuse(name, *value, "0, 1");
}

TargetChoice target_choice(const Reader& reader) {
  const auto value = reader.own("TARGET");
  if (!value || *value == "native") return TargetChoice::kNative;
  if (*value == "compute_75") return TargetChoice::kCompute75;
  Reader::refuse("TARGET", *value, "native, compute_75");
}

std::optional<fs::path> existing(const Reader& reader, const std::string& name, bool folder) {
  const auto path = reader.own_path(name);
  std::error_code ignored;
  if (path && folder && !fs::is_directory(*path, ignored))
    Reader::refuse(name, path->string(), "a folder; there is none at that path");
  if (path && !fs::exists(*path, ignored))
    Reader::refuse(name, path->string(), "a file or folder; there is none at that path");
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
  const Reader reader(environment);
  Config config;
  config.cache_dir = cache_folder(reader);
  config.cache_max_bytes = byte_count(reader, "CACHE_MAX_BYTES", config.cache_max_bytes);
  config.target = target_choice(reader);
  config.interpret = flag(reader, "INTERPRET");
  config.nvrtc = existing(reader, "NVRTC", false);
  config.cxx = reader.own("CXX");
  config.prebuilt = existing(reader, "PREBUILT", true);
  config.templates = existing(reader, "TEMPLATES", true);
  config.virtual_env = reader.path("VIRTUAL_ENV");
  config.conda_prefix = reader.path("CONDA_PREFIX");
  config.cuda_home = reader.path("CUDA_HOME");
  config.library_path = path_list(reader.text("LD_LIBRARY_PATH"));
  return config;
}

const Config& config() {
  static const Config process_config = read_config(from_process);
  return process_config;
}

}  // namespace flash_attn_jit
