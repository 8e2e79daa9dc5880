#include "runtime/library/pack_check.h"

#include <charconv>
#include <map>
#include <utility>
#include <variant>

#include <nlohmann/json.hpp>

#include "generator/legality.h"
#include "runtime/compile/compiler.h"
#include "runtime/cuda/nvrtc_choice.h"
#include "runtime/library/pack_manifest.h"
#include "runtime/system/side_by_side.h"

namespace flash_attn_jit {
namespace {

using nlohmann::json;

constexpr std::uint64_t kMostPackBytes = std::uint64_t{4} << 30;  // as much as a zip file holds

// A manifest of so many kernels is not longer. JSON takes many times its length to read.
std::uint64_t most_manifest_bytes(std::size_t kernels) { return 65536 + 4096 * std::uint64_t{kernels}; }

// The kernel, its image left out; or why it is none.
std::variant<KernelFile, std::string> kernel_of(const std::string& name, const std::string& bytes) {
  auto parsed = parse_kernel_file(bytes);
  if (const auto* fault = std::get_if<KernelFileFault>(&parsed)) return fault->reason;
  KernelFile& file = std::get<KernelFile>(parsed);
  if (to_hex(file.id.key) != key_in_name(name)) return "it holds the kernel of another key";
  // ELF of CUDA's machine: a host object would be code for this process.
  constexpr std::size_t kMachineAt = 18, kHeaderBytes = 64;
  constexpr int kCudaMachine = 190;
  const std::string& image = file.kernel.image;
  const bool is_elf = image.size() > kHeaderBytes && image.starts_with(
                                                         "\x7f"
                                                         "ELF");
  if (!is_elf || static_cast<std::uint8_t>(image[kMachineAt]) != kCudaMachine || image[kMachineAt + 1] != 0)
    return "its code is not for a GPU: a pack holds no host code";
  file.kernel.image.clear();
  return std::move(file);
}

class Lister {
 public:
  explicit Lister(const PackFiles& pack) : pack_(pack) {}

  PackListing list() && {
    if (const auto reason = pack_.distrust()) fault("", "it would be passed over: " + *reason);
    for (const std::string& name : pack_.names())
      if (!read(name)) break;
    compare_manifest();
    return std::move(listing_);
  }

 private:
  void fault(const std::string& name, const std::string& text) { listing_.faults.push_back({name, text}); }

  // Whether to go on.
  bool read(const std::string& name) {
    const PackedFileKind kind = packed_file_kind(name);
    if (kind == PackedFileKind::kOther) {
      fault(name, "it is no part of a pack, which holds manifest.json, kernels and tuning/*.json");
      return true;
    }
    std::string bytes;
    try {
      bytes = pack_.read(name).value_or("");
    } catch (const FileError& error) {
      fault(name, error.what());
      return true;
    }
    listing_.bytes += bytes.size();
    if (listing_.bytes > kMostPackBytes) {
      fault("", "it is too large: its other files are not read");
      return false;
    }
    if (kind == PackedFileKind::kKernel) take_kernel(name, bytes);
    if (kind == PackedFileKind::kManifest) manifest_ = std::move(bytes);
    if (kind == PackedFileKind::kRecord) take_record(name, bytes);
    return true;
  }

  void take_kernel(const std::string& name, const std::string& bytes) {
    auto kernel = kernel_of(name, bytes);
    if (const auto* reason = std::get_if<std::string>(&kernel)) return fault(name, *reason);
    KernelFile& file = std::get<KernelFile>(kernel);
    entries_[name] = json::parse(manifest_entry(name, bytes, file).dump());
    listing_.kernels.push_back({name, bytes.size(), std::move(file)});
  }

  void take_record(const std::string& name, const std::string& bytes) {
    ++listing_.records;
    if (!json::accept(bytes)) fault(name, "it is no JSON");
  }

  void compare_manifest() {
    if (!manifest_) return fault(kManifestName, "it is missing");
    if (manifest_->size() > most_manifest_bytes(listing_.kernels.size()))
      return fault(kManifestName,
                   "it is longer than one of " + std::to_string(listing_.kernels.size()) + " kernels that verify");
    // What lies deeper than in ours is left out: it would only take memory.
    const auto keep = [](int depth, json::parse_event_t event, const json&) {
      const bool opens = event == json::parse_event_t::object_start || event == json::parse_event_t::array_start;
      return !opens || depth < 3;
    };
    const json manifest = json::parse(*manifest_, keep, false);
    if (!manifest.is_object() || !manifest.contains("kernels") || !manifest["kernels"].is_array())
      return fault(kManifestName, "it is no manifest");
    if (manifest.value("format", json()) != kPackFormat || manifest.value("version", json()) != kPackVersion)
      fault(kManifestName,
            std::string("its format is not '") + kPackFormat + "', version " + std::to_string(kPackVersion));
    if (const json library = manifest.value("library", json()); library.is_string())
      listing_.library = library.get<std::string>();
    for (const json& told : manifest["kernels"]) compare_entry(told);
    for (const auto& [name, entry] : entries_) fault(name, "the manifest does not name it");
  }

  // Takes what is compared out of entries_.
  void compare_entry(const json& told) {
    const json file = told.is_object() ? told.value("file", json()) : json();
    if (!file.is_string()) return fault(kManifestName, "one of its kernels has no file");
    const std::string name = file.get<std::string>();
    const auto entry = entries_.find(name);
    if (entry == entries_.end())
      return fault(name, "the manifest names it, and there is no such kernel that verifies, or it is named twice");
    if (entry->second != told) fault(name, "the manifest says something else of it than the file");
    entries_.erase(entry);
  }

  const PackFiles& pack_;
  PackListing listing_;
  std::optional<std::string> manifest_;
  std::map<std::string, json> entries_;  // what the manifest should say
};

// "12.9" of "nvrtc 12.9".
std::optional<NvrtcVersion> nvrtc_version(std::string_view built_by) {
  constexpr std::string_view kPrefix = "nvrtc ";
  if (!built_by.starts_with(kPrefix)) return std::nullopt;
  const char *at = built_by.data() + kPrefix.size(), *end = built_by.data() + built_by.size();
  NvrtcVersion version;
  const auto major = std::from_chars(at, end, version.major);
  if (major.ec != std::errc() || major.ptr == end || *major.ptr != '.') return std::nullopt;
  const auto minor = std::from_chars(major.ptr + 1, end, version.minor);
  if (minor.ec != std::errc() || minor.ptr != end) return std::nullopt;
  return "nvrtc " + version.text() == built_by ? std::optional(version) : std::nullopt;
}

// A kernel as this library would make it.
struct Expected {
  KernelRequest kernel;
  CompileTarget target;
  NvrtcVersion nvrtc;
};

// What the library would make of a kernel's spec, or why this kernel is not that.
std::variant<Expected, std::string> expected_of(const PackedKernel& packed, KernelLibrary& library) {
  const KernelFile& file = packed.file;
  Expected expected;
  try {
    expected.target = {parse_arch(file.id.target), CodeKind::kCubin};
    if (expected.target.text() != file.id.target) return "its target is not written as 'sm_75' is";
    const KernelSpec spec = KernelSpec::parse(file.id.spec);
    if (spec.text() != file.id.spec) return "its spec is not written as specs are";
    if (const auto reason = check(spec, arch_limits(expected.target.sm))) return "its spec is none: " + *reason;
    expected.kernel = library.request(spec);
  } catch (const Error& error) {
    return std::string("its spec or target is none: ") + error.what();
  }
  const KernelId id = library.request(expected.kernel, expected.target).id;
  if (id.key != file.id.key)
    return "its key is not that of its spec here: it was made of other templates or with other options, and this "
           "library will not find it";
  if (id.file_name() != packed.name || id.name != file.id.name) return "it should be named " + id.file_name();
  const RenderedKernel& rendered = expected.kernel.rendered;
  if (file.kernel.entry != rendered.entry || file.kernel.threads != rendered.threads ||
      file.kernel.dynamic_smem != rendered.dynamic_smem)
    return "its entry, threads or shared memory are not those of its spec";
  const auto nvrtc = nvrtc_version(file.kernel.built_by);
  if (!nvrtc) return "it does not name the NVRTC that built it";
  if (file.kernel.min_driver != nvrtc->major * 1000)
    return "it names another driver than what NVRTC " + nvrtc->text() + " makes needs";
  expected.nvrtc = *nvrtc;
  return expected;
}

// Nothing where compiling makes the same bytes.
std::optional<std::string> fault_of_rebuilding(const PackFiles& pack, const PackedKernel& packed,
                                               const Expected& expected, NvrtcChoice& nvrtcs) {
  std::string reason;
  const Nvrtc* nvrtc = nvrtcs.of_version(expected.nvrtc, reason);
  if (nvrtc == nullptr) return "it cannot be compared: " + reason;
  try {
    const CompiledKernel made = compile_with(*nvrtc, expected.kernel.rendered, expected.target);
    const auto parsed = parse_kernel_file(pack.read(packed.name).value_or(""));
    const auto* file = std::get_if<KernelFile>(&parsed);
    if (file != nullptr && file->kernel.image == made.image) return std::nullopt;
    return "NVRTC " + nvrtc->version().text() + " (" + nvrtc->path().string() +
           ") makes other code of its spec: it was built by something else, or changed";
  } catch (const Error& error) {
    return std::string("it cannot be compared: ") + error.what();
  }
}

}  // namespace

PackListing list_pack(const PackFiles& pack) { return Lister(pack).list(); }

PackVerdict verify_pack(const PackFiles& pack, KernelLibrary& library, const std::optional<Config>& rebuild) {
  PackVerdict verdict{list_pack(pack)};
  std::vector<PackFault>& faults = verdict.listing.faults;
  std::vector<std::pair<const PackedKernel*, Expected>> to_rebuild;
  for (const PackedKernel& packed : verdict.listing.kernels) {
    auto expected = expected_of(packed, library);
    if (const auto* reason = std::get_if<std::string>(&expected))
      faults.push_back({packed.name, *reason});
    else if (rebuild)
      to_rebuild.emplace_back(&packed, std::get<Expected>(std::move(expected)));
  }
  if (!rebuild) return verdict;
  NvrtcChoice nvrtcs(*rebuild, std::nullopt);
  std::vector<std::optional<std::string>> reasons(to_rebuild.size());
  run_side_by_side(to_rebuild.size(), [&](std::size_t i) {
    const auto& [packed, expected] = to_rebuild[i];
    reasons[i] = fault_of_rebuilding(pack, *packed, expected, nvrtcs);
  });
  for (std::size_t i = 0; i < reasons.size(); ++i)
    if (reasons[i])
      faults.push_back({to_rebuild[i].first->name, *reasons[i]});
    else
      ++verdict.rebuilt;
  return verdict;
}

}  // namespace flash_attn_jit
