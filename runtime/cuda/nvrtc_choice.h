// The NVRTCs of one library: looked for at the first need, opened only when chosen.
#pragma once

#include <map>
#include <memory>
#include <optional>
#include <string>

#include "runtime/cuda/nvrtc.h"
#include "runtime/system/fork.h"

namespace flash_attn_jit {

// "12.4" of 12040.
std::string driver_version_text(int version);

class NvrtcChoice {
 public:
  NvrtcChoice(const Config& config, std::optional<int> driver_version)
      : config_(config), driver_version_(driver_version) {}

  // The NVRTC for `code` that suits the driver, null where there is none; then `reason` says what was found,
  // where was looked, and what to do. Thread-safe.
  const Nvrtc* best(CodeKind code, std::string& reason);

  // An NVRTC of exactly this version, null where none is found; then `reason` says which are. Thread-safe.
  const Nvrtc* of_version(const NvrtcVersion& version, std::string& reason);

  // The version that best() would take, as file names tell, so that none is opened; nothing where there is none, or
  // where they do not tell. Thread-safe.
  std::optional<NvrtcVersion> foresee(CodeKind code);

  int opened() const;

 private:
  const Nvrtc* open_best(NvrtcSearch& search, const NvrtcNeed& need);
  const Nvrtc* open(const NvrtcCandidate& candidate, NvrtcSearch& search);
  void learn_versions(NvrtcSearch& search);
  void warn_about_old_drivers(const Nvrtc& chosen) const;
  std::string why_none(const NvrtcSearch& search, CodeKind code) const;

  Config config_;
  std::optional<int> driver_version_;
  mutable ForkSafeMutex mutex_;  // guards what is below; never held while searching or opening
  std::map<std::filesystem::path, std::unique_ptr<Nvrtc>> open_;
  std::map<CodeKind, const Nvrtc*> chosen_;
  std::map<CodeKind, NvrtcVersion> foreseen_;
};

}  // namespace flash_attn_jit
