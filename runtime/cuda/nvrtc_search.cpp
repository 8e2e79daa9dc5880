#include "runtime/cuda/nvrtc_search.h"

#include <algorithm>
#include <charconv>
#include <fstream>
#include <mutex>
#include <set>

#include "runtime/system/fork.h"

namespace flash_attn_jit {
namespace {

namespace fs = std::filesystem;

constexpr int kOldestMajor = 12;
constexpr std::string_view kLibrary = "libnvrtc";
constexpr std::string_view kBuiltins = "libnvrtc-builtins.so.";

std::vector<fs::path> sorted_entries(const fs::path& folder) {
  std::vector<fs::path> entries;
  std::error_code error;
  for (fs::directory_iterator entry(folder, error), end; !error && entry != end; entry.increment(error))
    entries.push_back(entry->path());
  std::sort(entries.begin(), entries.end());
  return entries;
}

// "libnvrtc.so.12.9.86" and "libnvrtc-builtins.so.12.9" -> {12, 9, 86} and {12, 9}; empty where no number
// follows.
std::vector<int> numbers_of(const fs::path& file) {
  const std::string name = file.filename().string();
  const std::size_t so = name.find(".so.");
  std::vector<int> numbers;
  for (std::size_t at = so == std::string::npos ? name.size() : so + 4; at < name.size();) {
    int number = 0;
    const auto [end, error] = std::from_chars(name.data() + at, name.data() + name.size(), number);
    if (error != std::errc()) break;
    numbers.push_back(number);
    at = static_cast<std::size_t>(end - name.data()) + 1;
  }
  return numbers;
}

// libnvrtc.so, libnvrtc.so.12, libnvrtc-672ee683.so.12: not the builtins, not the build with another
// allocator.
bool is_library(const fs::path& file) {
  const std::string name = file.filename().string();
  return name.starts_with(kLibrary) && !name.starts_with("libnvrtc-builtins") &&
         name.find(".alt.") == std::string::npos && (name.ends_with(".so") || name.find(".so.") != std::string::npos);
}

bool is_digit(char c) { return c >= '0' && c <= '9'; }

// The folders below `targets` of a toolkit that is laid out for several machines, as conda's is, that are this one's.
#if defined(__aarch64__)
constexpr const char* kTargets[] = {"sbsa-linux", "aarch64-linux"};
#else
constexpr const char* kTargets[] = {"x86_64-linux"};
#endif

std::vector<fs::path> builtins_beside(const fs::path& library, int major) {
  std::vector<fs::path> found;
  for (const fs::path& file : sorted_entries(library.parent_path())) {
    const std::vector<int> numbers = numbers_of(file);
    if (file.filename().string().starts_with(kBuiltins) && numbers.size() >= 2 && numbers[0] == major)
      found.push_back(file);
  }
  return found;
}

NvrtcCandidate describe(const fs::path& library, const std::string& place) {
  NvrtcCandidate candidate{library, {}, place, std::nullopt};
  std::error_code error;
  const fs::path real = fs::canonical(library, error);
  std::vector<int> numbers = numbers_of(error ? library : real);
  if (numbers.empty()) numbers = numbers_of(library);
  if (numbers.empty()) return candidate;
  for (const fs::path& builtins : builtins_beside(error ? library : real, numbers[0])) {
    const std::vector<int> theirs = numbers_of(builtins);
    if (numbers.size() >= 2 && theirs[1] != numbers[1]) continue;
    if (candidate.version && *candidate.version != NvrtcVersion{theirs[0], theirs[1]}) {
      candidate.version.reset();  // several, and nothing tells which is this library's
      candidate.builtins.clear();
      break;
    }
    candidate.version = NvrtcVersion{theirs[0], theirs[1]};
    candidate.builtins = builtins;
  }
  if (numbers.size() >= 2) candidate.version = NvrtcVersion{numbers[0], numbers[1]};
  return candidate;
}

std::string found_text(const NvrtcCandidate& candidate) {
  return candidate.library.filename().string() + (candidate.version ? " (" + candidate.version->text() + ")" : "");
}

class Search {
 public:
  // Every libnvrtc of one folder.
  void folder(const std::string& place, const fs::path& folder) {
    std::error_code error;
    if (!fs::is_directory(folder, error)) return note(place, folder, "no such folder");
    if (!folders_.insert(fs::canonical(folder, error)).second) return;
    std::string outcome;
    for (const fs::path& file : sorted_entries(folder))
      if (is_library(file)) append(outcome, take(file, place));
    note(place, folder, outcome.empty() ? "no libnvrtc" : outcome);
  }

  // A library that was named, whatever its file is called.
  void file(const std::string& place, const fs::path& file) { note(place, file, take(file, place)); }

  // A site-packages folder: NVIDIA's wheels (12.x: nvidia/cuda_nvrtc, later: nvidia/cu13, ...), then torch's
  // own.
  void site_packages(const std::string& place, const fs::path& site) {
    if (!sites_.insert(site.lexically_normal()).second) return;
    std::error_code error;
    if (!fs::is_directory(site, error)) return note(place, site, "no such folder");
    bool anything = false;
    for (const fs::path& package : sorted_entries(site / "nvidia")) {
      const std::string name = package.filename().string();
      if (name != "cuda_nvrtc" && !(name.starts_with("cu") && name.size() > 2 && is_digit(name[2]))) continue;
      folder("nvidia-cuda-nvrtc package", package / "lib");
      anything = true;
    }
    if (fs::is_directory(site / "torch" / "lib", error)) folder("torch", site / "torch" / "lib"), anything = true;
    if (!anything) note(place, site, "neither an nvidia-cuda-nvrtc package nor torch");
  }

  // The site-packages of an installation prefix, whatever its Python's version.
  void prefix(const std::string& place, const fs::path& prefix) {
    bool anything = false;
    for (const fs::path& lib : {prefix / "lib", prefix / "local" / "lib"})
      for (const fs::path& python : sorted_entries(lib)) {
        if (!python.filename().string().starts_with("python3")) continue;
        std::error_code error;
        for (const char* name : {"site-packages", "dist-packages"})
          if (fs::is_directory(python / name, error)) site_packages(place, python / name), anything = true;
      }
    if (!anything) note(place, prefix / "lib", "no Python packages");
  }

  // A prefix with a toolkit in it, as conda's packages make one: lib holds links to what is below targets.
  void toolkit_prefix(const std::string& place, const fs::path& prefix) {
    folder(place, prefix / "lib");
    std::error_code error;
    for (const char* target : kTargets)
      if (const fs::path lib = prefix / "targets" / target / "lib"; fs::is_directory(lib, error)) folder(place, lib);
  }

  NvrtcSearch result() && { return std::move(search_); }

 private:
  void note(const std::string& place, const fs::path& path, const std::string& outcome) {
    search_.places.push_back({place, path, outcome});
  }

  static void append(std::string& list, const std::string& item) {
    if (!item.empty()) list += (list.empty() ? "" : ", ") + item;
  }

  // What to say of it.
  std::string take(const fs::path& library, const std::string& place) {
    std::error_code error;
    if (!fs::exists(library, error)) return "no such file";
    if (!real_paths_.insert(fs::canonical(library, error)).second)
      return library.filename().string() + ", listed already";
    const NvrtcCandidate candidate = describe(library, place);
    const std::vector<int> numbers = numbers_of(library);
    const int major = candidate.version ? candidate.version->major : numbers.empty() ? kOldestMajor : numbers[0];
    if (major < kOldestMajor) return found_text(candidate) + ": too old, 12.0 or newer is needed";
    search_.candidates.push_back(candidate);
    return found_text(candidate);
  }

  NvrtcSearch search_;
  std::set<fs::path> real_paths_, sites_, folders_;
};

// The folders that the loader searches, as /etc/ld.so.conf tells (ldconfig(8)); `include` takes a glob of one
// folder.
std::vector<fs::path> loader_folders(const fs::path& conf, int depth = 0) {
  std::vector<fs::path> folders;
  std::ifstream file(conf);
  for (std::string line; std::getline(file, line);) {
    line.erase(std::min(line.find('#'), line.size()));
    line.erase(0, line.find_first_not_of(" \t"));
    line.erase(line.find_last_not_of(" \t") + 1);
    if (line.starts_with("/")) folders.emplace_back(line);
    if (!line.starts_with("include ") || depth > 4) continue;
    const fs::path pattern = conf.parent_path() / line.substr(line.find_last_of(" \t") + 1);
    for (const fs::path& entry : sorted_entries(pattern.parent_path()))
      if (entry.extension() == pattern.extension())
        for (const fs::path& folder : loader_folders(entry, depth + 1)) folders.push_back(folder);
  }
  return folders;
}

fs::path program_prefix() {
  std::error_code error;
  const fs::path program = fs::read_symlink("/proc/self/exe", error);
  return program.parent_path().parent_path();
}

void search_named(Search& search, const fs::path& named) {
  const std::string place = "FLASH_ATTN_JIT_NVRTC";
  std::error_code error;
  if (!fs::is_directory(named, error)) return search.file(place, named);
  for (const fs::path& folder : {named, named / "lib64", named / "lib"}) search.folder(place, folder);
}

// Never destroyed: threads may still compile while the process ends.
struct PythonPath {
  ForkSafeMutex mutex;
  std::vector<fs::path> folders;
};

PythonPath& python_path() {
  static PythonPath& path = *new PythonPath;
  return path;
}

}  // namespace

std::string NvrtcVersion::text() const { return std::to_string(major) + "." + std::to_string(minor); }

std::string NvrtcSearch::text() const {
  std::string text;
  for (const SearchedPlace& place : places)
    text += (text.empty() ? "  " : "\n  ") + place.place + ": " + place.path.string() + ": " + place.outcome;
  return text;
}

void set_python_search_path(std::vector<fs::path> folders) {
  const std::lock_guard lock(python_path().mutex);
  python_path().folders = std::move(folders);
}

std::vector<fs::path> python_search_path() {
  const std::lock_guard lock(python_path().mutex);
  return python_path().folders;
}

NvrtcSearch search_nvrtc(const Config& config, const std::vector<fs::path>& python_search_path) {
  Search search;
  if (config.nvrtc) {
    search_named(search, *config.nvrtc);
    return std::move(search).result();
  }
  for (const fs::path& folder : python_search_path) search.site_packages("Python's search path", folder);
  search.prefix("this program's prefix", program_prefix());
  search.toolkit_prefix("this program's prefix", program_prefix());
  if (config.virtual_env) search.prefix("VIRTUAL_ENV", *config.virtual_env);
  if (config.conda_prefix) {
    search.prefix("CONDA_PREFIX", *config.conda_prefix);
    search.toolkit_prefix("CONDA_PREFIX", *config.conda_prefix);
  }
  if (config.cuda_home)
    for (const char* lib : {"lib64", "lib"}) search.folder("CUDA_HOME", *config.cuda_home / lib);
  for (const fs::path& folder : config.library_path) search.folder("LD_LIBRARY_PATH", folder);
  for (const fs::path& folder : loader_folders("/etc/ld.so.conf")) search.folder("the loader's path", folder);
  for (const char* folder : {"/lib64", "/usr/lib64", "/lib", "/usr/lib"}) search.folder("the loader's path", folder);
  return std::move(search).result();
}

std::optional<NvrtcCandidate> choose_nvrtc(const std::vector<NvrtcCandidate>& candidates, const NvrtcNeed& need) {
  const auto loads = [&](const NvrtcVersion& version) {
    if (!need.driver_version) return true;
    if (need.code == CodeKind::kPtx) return version.as_driver_version() <= *need.driver_version;
    return version.major <= *need.driver_version / 1000;
  };
  // Without a driver to suit, 12.x suits the most drivers.
  const auto rank = [&](const NvrtcVersion& version) {
    return std::pair(!need.driver_version && version.major == kOldestMajor, version);
  };
  const NvrtcCandidate* best = nullptr;
  for (const NvrtcCandidate& candidate : candidates)
    if (candidate.version && loads(*candidate.version) && (!best || rank(*best->version) < rank(*candidate.version)))
      best = &candidate;
  return best ? std::optional(*best) : std::nullopt;
}

}  // namespace flash_attn_jit
