// A library over templates that compile in a moment, and the NVRTCs of the tests.
#pragma once

#include <cstdlib>
#include <filesystem>
#include <optional>
#include <string>

#include "generator/render.h"
#include "runtime/cuda/nvrtc_search.h"
#include "runtime/library/kernel_library.h"
#include "runtime/library/templates_folder.h"
#include "tests/cpp/temporary_folder.h"

namespace flash_attn_jit::testing {

// A forward kernel that does next to nothing. `body` is its body.
inline void write_tiny_templates(const std::filesystem::path& folder, const std::string& body = "") {
  for (const auto& [name, text] : embedded_templates())
    if (is_shared_with_host(name)) write_all(folder / name, text);
  write_all(folder / "flash_fwd.cuh", R"(
#include "flash_fwd_params.cuh"
struct Fp16 {};
struct RegisterStagedCopy {};
struct AnySize { __device__ constexpr bool operator==(int) const { return true; } };
template <typename Traits> struct FlashFwdTile { static constexpr AnySize kSharedBytes{}; };
template <typename Traits> __device__ void flash_fwd(const FlashFwdParams& params) {
  params.softmax_lse[threadIdx.x] = Traits::kHeadDim;
  )" + body + "\n}\n");
}

// The folder that holds NVIDIA's wheels of NVRTC 12.x and 13.x; empty where there is none.
inline std::filesystem::path nvrtc_site_packages() {
  const char* folder = std::getenv("FLASH_ATTN_JIT_TEST_SITE_PACKAGES");
  return folder != nullptr ? folder : "";
}

inline bool have_nvrtc() { return !nvrtc_site_packages().empty(); }

inline std::filesystem::path nvrtc_folder(int major) {
  return nvrtc_site_packages() / "nvidia" / (major == 12 ? "cuda_nvrtc" : "cu13") / "lib";
}

// Templates, cache and configuration of one test.
struct TinySetting {
  TemporaryFolder folder;
  Config config;

  TinySetting() {
    write_tiny_templates(folder / "templates");
    config.templates = folder / "templates";
    config.cache_dir = folder / "cache";
    set_python_search_path({nvrtc_site_packages()});
  }

  KernelLibrary::Settings settings(std::optional<int> driver_version) const {
    return {.config = config, .cache = cache_settings(config), .driver_version = driver_version};
  }
};

inline KernelSpec tiny_spec(int head_dim = 64) {
  KernelSpec spec;
  spec.head_dim = head_dim;
  spec.tile = default_tiles(spec).front();
  return spec;
}

}  // namespace flash_attn_jit::testing
