// NVRTC itself, opened at run time.
#pragma once

#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "runtime/cuda/compile_target.h"
#include "runtime/cuda/nvrtc_search.h"

namespace flash_attn_jit {

// What one compile gave.
struct NvrtcResult {
  bool succeeded = false;
  std::string status;  // NVRTC's own words
  std::string image;   // empty unless it succeeded
  std::string log;
};

class Nvrtc {
 public:
  // Opens the builtins, then the library. Throws Error.
  explicit Nvrtc(const NvrtcCandidate& candidate);

  NvrtcVersion version() const { return version_; }
  const std::filesystem::path& path() const { return path_; }

  // Compute capabilities x 10 that it compiles for.
  const std::vector<int>& supported_architectures() const { return architectures_; }

  // Thread-safe. A refused source is a result, not an exception; throws Error where NVRTC itself fails.
  NvrtcResult compile(const std::string& source, const std::string& name, const std::vector<std::string>& options,
                      CodeKind code) const;

 private:
  struct Api;
  static std::shared_ptr<const Api> open(const NvrtcCandidate& candidate);

  std::filesystem::path path_;
  NvrtcVersion version_;
  std::vector<int> architectures_;
  std::shared_ptr<const Api> api_;
};

}  // namespace flash_attn_jit
