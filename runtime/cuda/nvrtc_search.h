// Where NVRTC may lie and which one is taken. Reads folders and file names; opens no library.
#pragma once

#include <compare>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "runtime/cuda/compile_target.h"
#include "runtime/system/config.h"

namespace flash_attn_jit {

struct NvrtcVersion {
  int major = 0;
  int minor = 0;
  int as_driver_version() const { return major * 1000 + minor * 10; }  // as cuDriverGetVersion counts
  std::string text() const;                                            // "12.9"
  friend auto operator<=>(const NvrtcVersion&, const NvrtcVersion&) = default;
};

struct NvrtcCandidate {
  std::filesystem::path library;
  std::filesystem::path builtins;       // the sibling that NVRTC itself opens by bare name; empty where there is none
  std::string place;                    // "nvidia-cuda-nvrtc of /usr/lib/python3/dist-packages"
  std::optional<NvrtcVersion> version;  // what the file names tell, without opening anything
};

struct SearchedPlace {
  std::string place;
  std::filesystem::path path;
  std::string outcome;  // "libnvrtc.so.12 (12.9)", "no such folder"
};

struct NvrtcSearch {
  std::vector<NvrtcCandidate> candidates;  // the first places first
  std::vector<SearchedPlace> places;       // every one tried
  std::string text() const;                // the places, one a line
};

// Folders that Python searches for packages (sys.path). Set by the Python module before the first compile.
void set_python_search_path(std::vector<std::filesystem::path> folders);
std::vector<std::filesystem::path> python_search_path();

// Looks everywhere, opens nothing.
NvrtcSearch search_nvrtc(const Config& config, const std::vector<std::filesystem::path>& python_search_path);

// What the result must load on. Without a driver version: anywhere, which means the newest 12.x.
struct NvrtcNeed {
  CodeKind code = CodeKind::kCubin;
  std::optional<int> driver_version;  // as cuDriverGetVersion counts
};

// The newest candidate that the driver can load the result of, or nothing. Those without a version are not
// considered.
std::optional<NvrtcCandidate> choose_nvrtc(const std::vector<NvrtcCandidate>& candidates, const NvrtcNeed& need);

}  // namespace flash_attn_jit
