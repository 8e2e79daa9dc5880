#include "runtime/cuda/nvrtc_choice.h"

#include <algorithm>

#include "runtime/system/log.h"

namespace flash_attn_jit {
namespace {

std::string how_to_get_one(std::optional<int> driver_version) {
  const bool only_12 = driver_version.value_or(13000) < 13000;
  return std::string("Install one: pip install 'flash-attn-jit[cu12]'") +
         (only_12 ? "" : " (for CUDA 12 drivers and newer) or 'flash-attn-jit[cu13]'") +
         ", or set FLASH_ATTN_JIT_NVRTC to a libnvrtc.";
}

}  // namespace

std::string driver_version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

const Nvrtc* NvrtcChoice::best(CodeKind code, std::string& reason) {
  {
    const std::lock_guard lock(mutex_);
    if (const auto known = chosen_.find(code); known != chosen_.end()) return known->second;
  }
  // Not remembered where it fails: an NVRTC may be installed while the process lives.
  NvrtcSearch search = search_nvrtc(config_, python_search_path());
  const NvrtcNeed need{code, driver_version_};
  const Nvrtc* nvrtc = open_best(search, need);
  if (nvrtc == nullptr) {
    learn_versions(search);
    nvrtc = open_best(search, need);
  }
  if (nvrtc == nullptr) {
    reason = why_none(search, code);
    return nullptr;
  }
  warn_about_old_drivers(*nvrtc);
  const std::lock_guard lock(mutex_);
  return chosen_.try_emplace(code, nvrtc).first->second;
}

std::optional<NvrtcVersion> NvrtcChoice::foresee(CodeKind code) {
  {
    const std::lock_guard lock(mutex_);
    if (const auto known = chosen_.find(code); known != chosen_.end()) return known->second->version();
    if (const auto known = foreseen_.find(code); known != foreseen_.end()) return known->second;
  }
  const auto candidate = choose_nvrtc(search_nvrtc(config_, python_search_path()).candidates, {code, driver_version_});
  if (!candidate) return std::nullopt;
  const std::lock_guard lock(mutex_);
  return foreseen_[code] = *candidate->version;
}

const Nvrtc* NvrtcChoice::open_best(NvrtcSearch& search, const NvrtcNeed& need) {
  while (const auto candidate = choose_nvrtc(search.candidates, need))
    if (const Nvrtc* nvrtc = open(*candidate, search)) return nvrtc;
  return nullptr;
}

const Nvrtc* NvrtcChoice::of_version(const NvrtcVersion& version, std::string& reason) {
  NvrtcSearch search = search_nvrtc(config_, python_search_path());
  learn_versions(search);
  std::string found;
  const std::vector<NvrtcCandidate> candidates = search.candidates;
  for (const NvrtcCandidate& candidate : candidates) {
    if (candidate.version == version)
      if (const Nvrtc* nvrtc = open(candidate, search); nvrtc != nullptr && nvrtc->version() == version) return nvrtc;
    if (candidate.version) found += (found.empty() ? "" : ", ") + candidate.version->text();
  }
  reason = "NVRTC " + version.text() + " is not here; found: " + (found.empty() ? "none" : found);
  return nullptr;
}

int NvrtcChoice::opened() const {
  const std::lock_guard lock(mutex_);
  return static_cast<int>(open_.size());
}

// Null where it cannot be opened; then `search` no longer has it. Of several threads that open one, the first keeps it.
const Nvrtc* NvrtcChoice::open(const NvrtcCandidate& candidate, NvrtcSearch& search) {
  {
    const std::lock_guard lock(mutex_);
    if (const auto known = open_.find(candidate.library); known != open_.end()) return known->second.get();
  }
  try {
    auto nvrtc = std::make_unique<Nvrtc>(candidate);
    const std::lock_guard lock(mutex_);
    return open_.try_emplace(candidate.library, std::move(nvrtc)).first->second.get();
  } catch (const Error& error) {
    search.places.push_back({candidate.place, candidate.library, error.what()});
    std::erase_if(search.candidates, [&](const NvrtcCandidate& c) { return c.library == candidate.library; });
    warn_once("NVRTC is passed over: " + std::string(error.what()));
    return nullptr;
  }
}

// Asks the libraries whose file names do not tell.
void NvrtcChoice::learn_versions(NvrtcSearch& search) {
  const std::vector<NvrtcCandidate> candidates = search.candidates;
  for (const NvrtcCandidate& candidate : candidates) {
    if (candidate.version) continue;
    const Nvrtc* nvrtc = open(candidate, search);
    if (nvrtc == nullptr) continue;
    for (NvrtcCandidate& known : search.candidates)
      if (known.library == candidate.library) known.version = nvrtc->version();
  }
}

void NvrtcChoice::warn_about_old_drivers(const Nvrtc& chosen) const {
  if (driver_version_ || config_.nvrtc || chosen.version().major <= 12) return;
  warn_once("only NVRTC " + chosen.version().text() +
            " was found: CUDA 12 drivers will not load what it makes. pip install 'flash-attn-jit[cu12]' "
            "brings NVRTC 12");
}

std::string NvrtcChoice::why_none(const NvrtcSearch& search, CodeKind code) const {
  const std::string looked = "\nLooked for NVRTC in:\n" + search.text();
  if (search.candidates.empty()) return "no NVRTC was found. " + how_to_get_one(driver_version_) + looked;
  std::string found;
  for (const NvrtcCandidate& candidate : search.candidates)
    found += (found.empty() ? "" : ", ") + candidate.version->text() + " (" + candidate.library.string() + ")";
  return "a driver for CUDA " + driver_version_text(driver_version_.value_or(0)) + " cannot load the " +
         (code == CodeKind::kPtx ? "PTX" : "machine code") + " of the NVRTC found: " + found + ". " +
         how_to_get_one(driver_version_) + looked;
}

}  // namespace flash_attn_jit
