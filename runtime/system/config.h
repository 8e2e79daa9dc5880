// The configuration: the one place that reads the project's environment variables, once and strictly.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "generator/errors.h"

namespace flash_attn_jit {

enum class TargetChoice {
  kNative,     // machine code for the device at hand
  kCompute75,  // the Turing code, as PTX that the device's driver translates
};

// A variable that is set to the empty string counts as not set. In paths of ours a leading ~ is the home folder.
struct Config {
  // FLASH_ATTN_JIT_CACHE_DIR; else under XDG_CACHE_HOME or ~/.cache; empty where there is no home folder either.
  std::filesystem::path cache_dir;
  std::uint64_t cache_max_bytes = std::uint64_t{1} << 30;  // FLASH_ATTN_JIT_CACHE_MAX_BYTES: a number of bytes
  TargetChoice target = TargetChoice::kNative;             // FLASH_ATTN_JIT_TARGET: native or compute_75
  bool interpret = false;                                  // FLASH_ATTN_JIT_INTERPRET: 0 or 1
  std::optional<std::filesystem::path> nvrtc;     // FLASH_ATTN_JIT_NVRTC: libnvrtc itself, or the folder that has it
  std::optional<std::string> cxx;                 // FLASH_ATTN_JIT_CXX: the interpreter's compiler
  std::optional<std::filesystem::path> prebuilt;  // FLASH_ATTN_JIT_PREBUILT: a pack, the first place looked in
  bool refuses_bfloat16 = false;                  // FLASH_ATTN_JIT_BFLOAT16: convert or refuse
  bool offline = false;  // FLASH_ATTN_JIT_OFFLINE: 0 or 1; 1 forbids to compile kernels for GPUs
  std::optional<std::filesystem::path> templates;  // FLASH_ATTN_JIT_TEMPLATES: read instead of the embedded ones

  // Where NVRTC may lie, as the environment tells.
  std::optional<std::filesystem::path> virtual_env, conda_prefix, cuda_home;
  std::vector<std::filesystem::path> library_path;  // LD_LIBRARY_PATH
};

// The value of a variable, nothing where it is not set.
using EnvironmentLookup = std::function<std::optional<std::string>(const std::string& name)>;

// Reads a configuration. Throws ConfigError, which names the variable and what it accepts.
Config read_config(const EnvironmentLookup& environment);

// As this process's environment is now. Throws ConfigError.
Config read_config();

}  // namespace flash_attn_jit
