// Where NVRTC is looked for and which one is taken: file names alone, no library is opened.
#include <doctest/doctest.h>

#include <algorithm>

#include "runtime/cuda/nvrtc_search.h"
#include "tests/cpp/containing.h"
#include "tests/cpp/temporary_folder.h"

using namespace flash_attn_jit;
using namespace flash_attn_jit::testing;
namespace fs = std::filesystem;

namespace {

// NVIDIA's wheels of `site`.
void add_wheel(const fs::path& site, const std::string& package, const std::string& major, const std::string& minor) {
  const fs::path lib = site / "nvidia" / package / "lib";
  write_all(lib / ("libnvrtc.so." + major), "library " + site.string() + major);
  write_all(lib / ("libnvrtc.alt.so." + major), "with another allocator");
  write_all(lib / ("libnvrtc-builtins.so." + major + "." + minor), "builtins");
  write_all(lib / ("libnvrtc-builtins.alt.so." + major + "." + minor), "builtins of that");
}

// A toolkit's folder: the full name and its symbolic links.
void add_toolkit(const fs::path& lib, const std::string& major, const std::string& minor) {
  const std::string full = "libnvrtc.so." + major + "." + minor + ".86";
  write_all(lib / full, "library " + lib.string());
  write_all(lib / ("libnvrtc-builtins.so." + major + "." + minor + ".86"), "builtins");
  fs::create_symlink(full, lib / ("libnvrtc.so." + major));
  fs::create_symlink(full, lib / "libnvrtc.so");
  fs::create_symlink("libnvrtc-builtins.so." + major + "." + minor + ".86",
                     lib / ("libnvrtc-builtins.so." + major + "." + minor));
}

// The candidates below `root`: the machine may have others.
std::vector<NvrtcCandidate> candidates_below(const NvrtcSearch& search, const fs::path& root) {
  std::vector<NvrtcCandidate> found;
  for (const NvrtcCandidate& candidate : search.candidates)
    if (candidate.library.string().starts_with(root.string())) found.push_back(candidate);
  return found;
}

std::vector<std::string> versions(const std::vector<NvrtcCandidate>& candidates) {
  std::vector<std::string> texts;
  for (const NvrtcCandidate& candidate : candidates)
    texts.push_back(candidate.version ? candidate.version->text() : "unknown");
  return texts;
}

NvrtcCandidate candidate(int major, int minor, const std::string& library = "x") {
  return {library, {}, "somewhere", NvrtcVersion{major, minor}};
}

std::string chosen(const std::vector<NvrtcCandidate>& candidates, CodeKind code, std::optional<int> driver_version) {
  const auto choice = choose_nvrtc(candidates, {code, driver_version});
  return choice ? choice->version->text() : "none";
}

using Texts = std::vector<std::string>;

}  // namespace

TEST_CASE("NVRTC search: wheels of both layouts, on Python's path and in prefixes") {
  const TemporaryFolder root;
  add_wheel(root / "site", "cuda_nvrtc", "12", "9");
  add_wheel(root / "site", "cu13", "13", "5");
  add_wheel(root.path() / "venv" / "lib" / "python3.11" / "site-packages", "cuda_nvrtc", "12", "4");
  add_wheel(root.path() / "conda" / "lib" / "python3.12" / "site-packages", "cu14", "14", "0");
  Config config;
  config.virtual_env = root / "venv";
  config.conda_prefix = root / "conda";
  const auto found = candidates_below(search_nvrtc(config, {root / "site"}), root.path());
  CHECK(versions(found) == Texts{"13.5", "12.9", "12.4", "14.0"});
  CHECK(found[0].library == root.path() / "site/nvidia/cu13/lib/libnvrtc.so.13");
  CHECK(found[0].builtins == root.path() / "site/nvidia/cu13/lib/libnvrtc-builtins.so.13.5");
  CHECK(found[1].builtins == root.path() / "site/nvidia/cuda_nvrtc/lib/libnvrtc-builtins.so.12.9");
}

TEST_CASE("NVRTC search: torch/lib, CUDA_HOME, LD_LIBRARY_PATH, in this order") {
  const TemporaryFolder root;
  write_all(root.path() / "site/torch/lib/libnvrtc-672ee683.so.12", "library");
  write_all(root.path() / "site/torch/lib/libnvrtc-builtins.so.12.6", "builtins");
  add_toolkit(root.path() / "cuda" / "lib64", "12", "8");
  add_toolkit(root / "ld", "13", "0");
  Config config;
  config.cuda_home = root / "cuda";
  config.library_path = {root / "missing", root / "ld"};
  const NvrtcSearch search = search_nvrtc(config, {root / "site"});
  const auto found = candidates_below(search, root.path());
  CHECK(versions(found) == Texts{"12.6", "12.8", "13.0"});
  CHECK(found[0].place == "torch");
  CHECK(found[1].place == "CUDA_HOME");
  CHECK(found[2].place == "LD_LIBRARY_PATH");
  CHECK(search.text() == Containing{"LD_LIBRARY_PATH: " + (root / "missing").string() + ": no such folder"});
  CHECK(search.text() == Containing{(root.path() / "cuda" / "lib").string() + ": no such folder"});
}

TEST_CASE("NVRTC search: conda's own package, in lib and in the folder of targets that lib links to") {
#if defined(__aarch64__)
  const std::string target = "sbsa-linux";
#else
  const std::string target = "x86_64-linux";
#endif
  const TemporaryFolder root;
  const fs::path lib = root.path() / "conda" / "lib", below = root.path() / "conda" / "targets" / target / "lib";
  fs::create_directories(lib);
  Config config;
  config.conda_prefix = root / "conda";
  const auto found = [&] { return candidates_below(search_nvrtc(config, {}), root.path()); };
  CHECK(found().empty());
  add_toolkit(root.path() / "conda" / "targets" / "riscv-linux" / "lib", "12", "9");
  CHECK(found().empty());
  add_toolkit(below, "12", "9");
  CHECK(versions(found()) == Texts{"12.9"});
  for (const char* name : {"libnvrtc.so.12", "libnvrtc-builtins.so.12.9"}) fs::create_symlink(below / name, lib / name);
  REQUIRE(versions(found()) == Texts{"12.9"});
  CHECK(found()[0].library == lib / "libnvrtc.so.12");
  CHECK(found()[0].place == "CONDA_PREFIX");
  CHECK(found()[0].builtins.parent_path() == below);
  config.nvrtc = root / "nowhere";
  CHECK(found().empty());
}

TEST_CASE("NVRTC search: folders of Python packages that only look like NVIDIA's") {
  const TemporaryFolder root;
  add_wheel(root / "site",
            "cu\xff"
            "13",
            "13", "5");
  add_wheel(root / "site", "cudnn", "13", "5");
  CHECK(candidates_below(search_nvrtc({}, {root / "site"}), root.path()).empty());
}

TEST_CASE("NVRTC search: FLASH_ATTN_JIT_NVRTC names the only place") {
  const TemporaryFolder root;
  add_wheel(root / "site", "cu13", "13", "5");
  add_wheel(root / "named", "cuda_nvrtc", "12", "9");
  const fs::path lib = root.path() / "named/nvidia/cuda_nvrtc/lib";
  Config config;
  for (const fs::path& named : {lib, lib / "libnvrtc.so.12"}) {
    config.nvrtc = named;
    CHECK(versions(search_nvrtc(config, {root / "site"}).candidates) == Texts{"12.9"});
  }
  config.nvrtc = root / "nowhere";
  const NvrtcSearch search = search_nvrtc(config, {root / "site"});
  CHECK(search.candidates.empty());
  CHECK(search.text() == Containing{"FLASH_ATTN_JIT_NVRTC: " + (root / "nowhere").string() + ": no such file"});
}

TEST_CASE("NVRTC search: a version that the names do not tell stays unknown, one too old is passed over") {
  const TemporaryFolder root;
  write_all(root.path() / "a/libnvrtc.so", "library a");
  write_all(root.path() / "b/libnvrtc.so.12", "library b");
  write_all(root.path() / "b/libnvrtc-builtins.so.12.4", "builtins");
  write_all(root.path() / "b/libnvrtc-builtins.so.12.6", "builtins");
  write_all(root.path() / "c/libnvrtc.so.11.2", "library c");
  Config config;
  config.library_path = {root / "a", root / "b", root / "c"};
  const NvrtcSearch search = search_nvrtc(config, {});
  CHECK(versions(candidates_below(search, root.path())) == Texts{"unknown", "unknown"});
  CHECK(search.text() == Containing{"libnvrtc.so.11.2 (11.2): too old"});
}

TEST_CASE("NVRTC choice: machine code loads on every driver of its major and above, the newest wins") {
  const std::vector both = {candidate(12, 4), candidate(13, 5), candidate(12, 9), candidate(13, 0)};
  CHECK(chosen(both, CodeKind::kCubin, 12000) == "12.9");
  CHECK(chosen(both, CodeKind::kCubin, 12040) == "12.9");
  CHECK(chosen(both, CodeKind::kCubin, 13000) == "13.5");
  CHECK(chosen(both, CodeKind::kCubin, 14000) == "13.5");
  CHECK(chosen({candidate(13, 0)}, CodeKind::kCubin, 12080) == "none");
}

TEST_CASE("NVRTC choice: PTX needs a driver at least as new") {
  const std::vector both = {candidate(12, 4), candidate(13, 5), candidate(12, 9), candidate(13, 0)};
  CHECK(chosen(both, CodeKind::kPtx, 12040) == "12.4");
  CHECK(chosen(both, CodeKind::kPtx, 12080) == "12.4");
  CHECK(chosen(both, CodeKind::kPtx, 13000) == "13.0");
  CHECK(chosen(both, CodeKind::kPtx, 13050) == "13.5");
  CHECK(chosen(both, CodeKind::kPtx, 12030) == "none");
}

TEST_CASE("NVRTC choice: without a driver the newest 12.x, else the newest") {
  CHECK(chosen({candidate(13, 5), candidate(12, 4), candidate(12, 9)}, CodeKind::kCubin, std::nullopt) == "12.9");
  CHECK(chosen({candidate(13, 0), candidate(13, 5)}, CodeKind::kCubin, std::nullopt) == "13.5");
  CHECK(chosen({}, CodeKind::kCubin, std::nullopt) == "none");
}

TEST_CASE("NVRTC choice: of equals the first found, of unknown ones none") {
  const std::vector equals = {candidate(12, 9, "first"), candidate(12, 9, "second")};
  CHECK(choose_nvrtc(equals, {CodeKind::kCubin, 12040})->library == "first");
  CHECK(chosen({NvrtcCandidate{"x", {}, "somewhere", std::nullopt}}, CodeKind::kCubin, 12040) == "none");
}
