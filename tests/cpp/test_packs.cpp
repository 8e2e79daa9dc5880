// Packs as folders and as zip files: which are taken, in which order, by whose trust; how one of anybody's is checked.
#include <doctest/doctest.h>

#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <functional>
#include <random>

#include <nlohmann/json.hpp>

#include "generator/families/families.h"
#include "generator/kernel_selection.h"
#include "runtime/cache/stored_zip.h"
#include "runtime/library/pack.h"
#include "runtime/library/pack_check.h"
#include "runtime/library/pack_manifest.h"
#include "runtime/system/errors.h"
#include "tests/cpp/cache_fixture.h"
#include "tests/cpp/captured_log.h"
#include "tests/cpp/containing.h"
#include "tests/cpp/stub_nvrtc.h"
#include "tests/cpp/tiny_templates.h"

using namespace flash_attn_jit;
using namespace flash_attn_jit::testing;
namespace fs = std::filesystem;

namespace {

constexpr CompileTarget kCubin{75, CodeKind::kCubin};
const bool kIsRoot = ::geteuid() == 0;

void set_mode(const fs::path& path, mode_t mode) { REQUIRE(::chmod(path.c_str(), mode) == 0); }

void write_pack_zip(const fs::path& path, const KernelId& id, const std::string& image) {
  write_all(path, stored_zip({{id.file_name(), serialize({id, made_up_kernel(image)})}}));
  set_mode(path, 0644);
}

// What finds `id` with these settings; empty where nothing does.
std::string image_of(const KernelCacheSettings& settings, const KernelId& id) {
  const auto found = KernelCache(settings).find(id);
  return found ? found->kernel.image : "";
}

// Compiled once for all of these tests.
const fs::path& stub_nvrtc() {
  static const TemporaryFolder folder;
  static const fs::path library = make_stub_nvrtc(folder.path(), {});
  return library;
}

// Packs of kernels that a stub makes in a moment.
struct StubSetting {
  TinySetting tiny;
  fs::path folder = tiny.folder / "pack", zip = tiny.folder / "pack.zip";

  StubSetting() { tiny.config.nvrtc = stub_nvrtc(); }

  void make(const fs::path& out, const std::vector<int>& head_dims = {64, 128}) const {
    PackWriter pack(tiny.config, out, std::nullopt);
    for (const int head_dim : head_dims) pack.library().find_or_compile(tiny_spec(head_dim), kCubin);
    pack.finish();
  }

  PackVerdict verify(const fs::path& path, const std::optional<Config>& rebuild = std::nullopt) const {
    KernelLibrary library(tiny.settings(std::nullopt));
    return verify_pack(*PackFiles::open(path, Links::kRefused), library, rebuild);
  }

  // Of a check without and with compiling; every fault has its file's name before it.
  std::string faults(const fs::path& path) const {
    std::string faults;
    for (const PackFault& fault : verify(path).listing.faults) faults += fault.name + ": " + fault.fault + "\n";
    return faults;
  }

  fs::path kernel_file() const {
    for (const auto& entry : fs::directory_iterator(folder))
      if (entry.path().extension() == ".kernel") return entry.path();
    FAIL("no kernel");
    return {};
  }

  // The same file with other content under the same or its new name, and a manifest that agrees.
  void edit_kernel(const std::function<void(KernelFile&)>& edit) const {
    const fs::path path = kernel_file();
    KernelFile file = std::get<KernelFile>(parse_kernel_file(read_all(path)));
    edit(file);
    fs::remove(path);
    write_all(folder / file.id.file_name(), serialize(file));
    write_manifest(folder);
  }
};

}  // namespace

TEST_CASE("a pack is a folder or a zip file of it, with records in it") {
  const StubSetting setting;
  setting.make(setting.folder);
  for (const fs::path& out : {setting.folder, setting.zip}) {
    PackWriter pack(setting.tiny.config, out, std::nullopt);
    write_all(pack.folder() / "tuning/tesla_t4/x.json", "{}");
    pack.library().find_or_compile(tiny_spec(64), kCubin);
    pack.library().find_or_compile(tiny_spec(128), kCubin);
    pack.finish();
  }
  const auto folder = PackFiles::open(setting.folder), zip = PackFiles::open(setting.zip);
  CHECK_FALSE(folder->is_zip());
  CHECK(zip->is_zip());
  CHECK(folder->names() == zip->names());
  CHECK(folder->names().size() == 4);
  CHECK(zip->read("tuning/tesla_t4/x.json") == "{}");
  CHECK(folder->read("tuning/tesla_t4/x.json") == "{}");
  for (const PackFiles* pack : {folder.get(), zip.get()}) {
    CHECK_FALSE(pack->read("tuning/tesla_t4/y.json"));
    CHECK_FALSE(pack->read("tuning/rtx/x.json"));
    CHECK_FALSE(pack->read("another.kernel"));
  }
  for (const fs::path& path : {setting.folder, setting.zip}) {
    CHECK(setting.faults(path) == "");
    const PackListing listing = list_pack(*PackFiles::open(path));
    CHECK(listing.kernels.size() == 2);
    CHECK(listing.records == 1);
    CHECK(listing.library == FLASH_ATTN_JIT_VERSION);
  }
  CHECK(PackFiles::open(setting.tiny.folder / "none") == nullptr);
}

TEST_CASE("a zip is added to, leaves nothing beside it, and is taken up where its making ended early") {
  const StubSetting setting;
  setting.make(setting.zip, {64});
  setting.make(setting.zip, {128});
  CHECK(list_pack(*PackFiles::open(setting.zip)).kernels.size() == 2);
  for (const auto& entry : fs::directory_iterator(setting.tiny.folder.path()))
    CHECK(entry.path().string().find("pack.zip.") == std::string::npos);
  {
    PackWriter pack(setting.tiny.config, setting.zip, std::nullopt);
    CHECK(pack.library().find_or_compile(tiny_spec(64), kCubin).origin == KernelOrigin::kPrebuilt);
    CHECK(pack.library().find_or_compile(tiny_spec(96), kCubin).origin == KernelOrigin::kCompiled);
  }  // no finish()
  PackWriter pack(setting.tiny.config, setting.zip, std::nullopt);
  CHECK(pack.library().find_or_compile(tiny_spec(96), kCubin).origin == KernelOrigin::kDiskCache);
  pack.finish();
  CHECK(list_pack(*PackFiles::open(setting.zip)).kernels.size() == 3);
  CHECK(setting.faults(setting.zip) == "");
}

TEST_CASE("a zip that others may write or that is none is not added to") {
  const StubSetting setting;
  setting.make(setting.zip);
  set_mode(setting.zip, 0664);
  CHECK_THROWS_WITH_AS(setting.make(setting.zip), doctest::Contains("may write"), FileError);
  write_all(setting.zip, "something of somebody");
  set_mode(setting.zip, 0644);
  CHECK_THROWS_WITH_AS(setting.make(setting.zip), doctest::Contains("no zip file"), FileError);
  CHECK(read_all(setting.zip) == "something of somebody");
}

TEST_CASE("a source that is refused while a pack is made lies in the cache, which bounds it") {
  StubSetting setting;
  setting.tiny.config.nvrtc = make_stub_nvrtc(setting.tiny.folder / "refusing", {}, "hdim64");
  for (const fs::path& out : {setting.folder, setting.zip}) {
    PackWriter pack(setting.tiny.config, out, std::nullopt);
    try {
      pack.library().find_or_compile(tiny_spec(64), kCubin);
      FAIL("it was compiled");
    } catch (const CompileError& error) {
      CHECK(fs::path(error.source_path).parent_path() == setting.tiny.config.cache_dir);
      CHECK(fs::exists(error.source_path));
    }
    pack.finish();
  }
  CHECK(setting.faults(setting.folder) == "");

  setting.tiny.config.cache_max_bytes = 3 * read_all(*fs::directory_iterator(setting.tiny.config.cache_dir)).size();
  KernelLibrary library(setting.tiny.settings(std::nullopt));
  for (int group = 1; group < 12; ++group) {
    KernelSpec spec = tiny_spec(64);
    spec.group_size = group;
    const KernelRequest kernel = library.request(spec);
    CHECK_THROWS_AS(library.compile_afresh(library.request(kernel, kCubin)), CompileError);
  }
  const auto left = std::distance(fs::directory_iterator(setting.tiny.config.cache_dir), fs::directory_iterator());
  CHECK(left >= 1);
  CHECK(left <= 4);
}

TEST_CASE("compile_afresh() looks nowhere and stores nothing") {
  const StubSetting setting;
  KernelLibrary library(setting.tiny.settings(std::nullopt));
  library.find_or_compile(tiny_spec(), kCubin);
  const int lookups = library.cache().lookups();
  const KernelRequest kernel = library.request(tiny_spec(128));
  CHECK(library.compile_afresh(library.request(kernel, kCubin)).image != "");
  CHECK(library.cache().lookups() == lookups);
  CHECK_FALSE(library.find(library.request(kernel, kCubin)));
}

TEST_CASE("kernels are looked for in the pack that is named, then in the bundled one, then in the cache") {
  const TemporaryFolder folder;
  const KernelId id = made_up_id("a");
  KernelCacheSettings settings = settings_for(folder / "cache");
  settings.prebuilt = folder / "named.zip";
  settings.bundled = BundledPack{folder / "bundled.zip", folder / "module.so"};
  write_all(folder / "module.so", "code");
  set_mode(folder / "module.so", 0644);
  const CapturedLog log;
  CHECK(image_of(settings, id) == "");
  CountedBuild build;
  KernelCache(settings).get_or_build(id, build.function());
  CHECK(image_of(settings, id) == "image");
  write_pack_zip(folder / "bundled.zip", id, "bundled");
  CHECK(image_of(settings, id) == "bundled");
  write_pack_zip(folder / "named.zip", id, "named");
  CHECK(image_of(settings, id) == "named");
  KernelId host = id;
  host.is_host_code = true;
  CHECK(image_of(settings, host) == "image");
  CHECK(log.warnings().empty());
}

TEST_CASE("a zip that is damaged, or that others may write, is passed over with one warning") {
  const TemporaryFolder folder;
  const KernelId id = made_up_id("a");
  KernelCacheSettings settings = settings_for(folder / "cache");
  settings.prebuilt = folder / "pack.zip";
  write_pack_zip(*settings.prebuilt, id, "packed");
  REQUIRE(image_of(settings, id) == "packed");
  const std::string good = read_all(*settings.prebuilt);
  const auto told = [&] {
    const CapturedLog log;
    CHECK(image_of(settings, id) == "");
    CHECK(image_of(settings, id) == "");
    REQUIRE(log.warnings().size() == 1);
    return log.warnings()[0];
  };
  set_mode(*settings.prebuilt, 0666);
  CHECK(told() == Containing{"other users may write the file"});
  set_mode(*settings.prebuilt, 0644);
  write_all(*settings.prebuilt, good.substr(0, good.size() - 1));
  CHECK(told() == Containing{"is passed over"});
  std::string flipped = good;
  flipped[good.find("packed")] ^= 1;
  write_all(*settings.prebuilt, flipped);
  CHECK(told() == Containing{"checksum"});
}

TEST_CASE("trust: a bundled pack is trusted as the module that it came with") {
  const TemporaryFolder folder;
  const KernelId id = made_up_id("a");
  const fs::path pack = folder / "bundled.zip", module = folder / "module.so";
  KernelCacheSettings settings = settings_for(folder / "cache");
  settings.bundled = BundledPack{pack, module};
  write_pack_zip(pack, id, "bundled");
  write_all(module, "code");
  const CapturedLog log;
  for (const auto& [of_pack, of_module, served] : {std::tuple<mode_t, mode_t, bool>{0644, 0644, true},
                                                   {0664, 0775, true},  // a umask of 002
                                                   {0664, 0755, false},
                                                   {0666, 0775, false},
                                                   {0666, 0777, true}}) {
    CAPTURE(of_pack);
    set_mode(pack, of_pack);
    set_mode(module, of_module);
    CHECK((image_of(settings, id) == "bundled") == served);
  }
  if (kIsRoot) {
    set_mode(pack, 0664);
    set_mode(module, 0664);
    const auto owned = [&](uid_t pack_user, gid_t pack_group, uid_t module_user, gid_t module_group) {
      REQUIRE(::chown(pack.c_str(), pack_user, pack_group) == 0);
      REQUIRE(::chown(module.c_str(), module_user, module_group) == 0);
      return image_of(settings, id) == "bundled";
    };
    CHECK(owned(12345, 12345, 12345, 12345));
    CHECK(owned(0, 12345, 12345, 12345));
    CHECK_FALSE(owned(12345, 0, 0, 0));
    CHECK_FALSE(owned(0, 12345, 0, 0));
  }
  CHECK(log.warnings().size() >= 1);
  CHECK(log.warnings()[0] == Containing{module.string()});
}

TEST_CASE("offline: packs and the cache serve, nothing is compiled, and the error names the command") {
  StubSetting setting;
  setting.make(setting.zip, {64});
  setting.tiny.config.offline = true;
  setting.tiny.config.prebuilt = setting.zip;
  KernelLibrary library(setting.tiny.settings(99000));
  CHECK(library.find_or_compile(tiny_spec(64), kCubin).origin == KernelOrigin::kPrebuilt);
  const auto refusal = [&](const CompileTarget& target) {
    try {
      library.find_or_compile(tiny_spec(128), target);
    } catch (const MissingKernelError& error) {
      CHECK(error.no_compiler == Containing{"FLASH_ATTN_JIT_OFFLINE is 1"});
      CHECK((error.prebuild_command == "") == (target.code == CodeKind::kPtx));
      CHECK(std::string(error.what()) == Containing{error.prebuild_command});
      return std::string(error.what());
    }
    return std::string();
  };
  CHECK(refusal(kCubin) == Containing{"flash-attn-jit prebuild --arch sm_75 --kinds fwd --head-dims 128"});
  CHECK(refusal(kCubin) == Containing{setting.zip.string()});
  CHECK(refusal({75, CodeKind::kPtx}) == Containing{"No pack holds"});
  CHECK_FALSE(library.compiler_lacks(250));
  CHECK(library.nvrtc_opened() == 0);
}

TEST_CASE("verify: every fault of a pack is named") {
  const StubSetting setting;
  const auto after = [&](const std::function<void()>& harm) {
    fs::remove_all(setting.folder);
    setting.make(setting.folder);
    harm();
    return setting.faults(setting.folder);
  };
  const auto edited = [&](const std::function<void(KernelFile&)>& edit) {
    return after([&] { setting.edit_kernel(edit); });
  };
  CHECK(after([] {}) == "");
  CHECK(after([&] { set_mode(setting.folder, 0777); }) == Containing{"would be passed over"});
  CHECK(after([&] { set_mode(setting.kernel_file(), 0666); }) == Containing{"others may write"});
  CHECK(after([&] { fs::remove(setting.folder / "manifest.json"); }) == Containing{"manifest.json: it is missing"});
  CHECK(after([&] { write_all(setting.folder / "manifest.json", "[]"); }) == Containing{"it is no manifest"});
  CHECK(after([&] { write_all(setting.folder / "manifest.json", "{\"kernels\": [{}, 1]}"); }) ==
        Containing{"has no file"});
  CHECK(after([&] { write_all(setting.folder / "manifest.json", std::string(1 << 20, '[')); }) ==
        Containing{"it is longer than"});
  CHECK(after([&] { fs::remove(setting.kernel_file()); }) == Containing{"there is no such kernel"});
  CHECK(after([&] {
          const std::string manifest = read_all(setting.folder / "manifest.json");
          setting.make(setting.folder, {96});
          write_all(setting.folder / "manifest.json", manifest);
        }) == Containing{"the manifest does not name it"});
  CHECK(after([&] {
          nlohmann::ordered_json manifest = nlohmann::ordered_json::parse(read_all(setting.folder / "manifest.json"));
          manifest["kernels"][0]["registers"] = 1;
          write_all(setting.folder / "manifest.json", manifest.dump());
        }) == Containing{"the manifest says something else"});
  CHECK(after([&] {
          std::string bytes = read_all(setting.kernel_file());
          bytes.back() ^= 1;
          write_all(setting.kernel_file(), bytes);
        }) == Containing{"payload's checksum"});
  CHECK(after([&] { write_all(setting.folder / "run.sh", "rm -rf"); }) ==
        Containing{"run.sh: it is no part of a pack"});
  CHECK(after([&] { fs::create_directories(setting.folder / "more"); }) == Containing{"more/: it is no part"});
  CHECK(after([&] { write_all(setting.folder / "tuning" / "x.json", "{"); }) ==
        Containing{"tuning/x.json: it is no JSON"});
  CHECK(after([&] {
          fs::rename(setting.kernel_file(), setting.tiny.folder / "elsewhere.kernel");
          const std::string name = list_pack(*PackFiles::open(setting.folder)).faults.at(0).name;
          fs::create_symlink(setting.tiny.folder / "elsewhere.kernel", setting.folder / name);
        }) == Containing{"it is a link"});
  CHECK(after([&] { fs::create_directory_symlink(setting.tiny.folder.path(), setting.folder / "tuning"); }) ==
        Containing{"tuning: it is no part of a pack"});

  CHECK(edited([](KernelFile& file) { file.kernel.image[18] = 62; }) == Containing{"no host code"});
  CHECK(edited([](KernelFile& file) { file.kernel.image = "MZ"; }) == Containing{"no host code"});
  CHECK(edited([](KernelFile& file) { file.id.target = "host_x86_64"; }) == Containing{"spec or target is none"});
  CHECK(edited([](KernelFile& file) { file.id.target = "75"; }) == Containing{"not written as 'sm_75'"});
  CHECK(edited([](KernelFile& file) { file.id.target = "sm_80"; }) == Containing{"this library will not find it"});
  CHECK(edited([](KernelFile& file) { file.id.spec += " "; }) == Containing{"spec"});
  CHECK(edited([](KernelFile& file) { file.id.spec = tiny_spec(72).text(); }) == Containing{"will not find it"});
  CHECK(edited([](KernelFile& file) { file.id.name = "flash_fwd_other_sm75"; }) == Containing{"should be named"});
  CHECK(edited([](KernelFile& file) { file.id.key[0] ^= 1; }) == Containing{"made of other templates"});
  CHECK(edited([](KernelFile& file) { file.kernel.entry = "main"; }) == Containing{"entry"});
  CHECK(edited([](KernelFile& file) { file.kernel.dynamic_smem += 1; }) == Containing{"shared memory"});
  CHECK(edited([](KernelFile& file) { file.kernel.built_by = "nvrtc 12.9 or so"; }) == Containing{"does not name the"});
  CHECK(edited([](KernelFile& file) { file.kernel.min_driver = 12000; }) == Containing{"names another driver"});
}

TEST_CASE("verify: a kernel of other templates is told as such") {
  StubSetting setting;
  setting.make(setting.zip);
  write_tiny_templates(*setting.tiny.config.templates, "params.softmax_lse[0] = 1;");
  CHECK(setting.faults(setting.zip) == Containing{"made of other templates or with other options"});
}

TEST_CASE("verify --rebuild: the bytes are compared, and what cannot be is a fault") {
  const StubSetting setting;
  setting.make(setting.folder);
  const PackVerdict good = setting.verify(setting.folder, setting.tiny.config);
  CHECK(good.listing.faults.empty());
  CHECK(good.rebuilt == 2);

  setting.edit_kernel([](KernelFile& file) { file.kernel.image.back() ^= 1; });
  CHECK(setting.faults(setting.folder) == "");  // a key is no signature
  const PackVerdict changed = setting.verify(setting.folder, setting.tiny.config);
  REQUIRE(changed.listing.faults.size() == 1);
  CHECK(changed.listing.faults[0].fault == Containing{"makes other code of its spec"});
  CHECK(changed.rebuilt == 1);

  Config other = setting.tiny.config;
  other.nvrtc = make_stub_nvrtc(setting.tiny.folder / "other", {.major = "97"});
  const PackVerdict without = setting.verify(setting.folder, other);
  CHECK(without.listing.faults.size() == 2);
  CHECK(without.listing.faults.at(0).fault == Containing{"NVRTC 98.0 is not here; found: 97.0"});
  CHECK(without.rebuilt == 0);
}

TEST_CASE("verify: kernels of strange specs are faults, with fixed seeds") {
  const StubSetting setting;
  setting.make(setting.folder, {64});
  KernelFile file = std::get<KernelFile>(parse_kernel_file(read_all(setting.kernel_file())));
  const std::string spec = file.id.spec, letters = "0123456789 mnwqlbkfpgqa-";
  for (unsigned seed = 0; seed < 300; ++seed) {
    std::mt19937 random(seed);
    file.id.spec = spec;
    for (unsigned edits = 1 + random() % 3; edits > 0; --edits)
      file.id.spec[random() % spec.size()] = letters[random() % letters.size()];
    if (file.id.spec == spec) continue;
    CAPTURE(file.id.spec);
    write_all(setting.zip, stored_zip({{file.id.file_name(), serialize(file)}}));
    set_mode(setting.zip, 0644);
    CHECK(setting.faults(setting.zip) == Containing{".kernel: its "});
  }
}

TEST_CASE("numbers of a kernel file that no int holds are a fault") {
  KernelFile file{made_up_id("a"), made_up_kernel("image")};
  const std::string good = serialize(file);
  for (const char* number : {"1e300", "-1e300", "2147483648", "-2147483649", "1.5", "\"7\"", "true", "null", "[]"}) {
    CAPTURE(number);
    // As somebody writes it who keeps the checksums right: the description is rebuilt as a whole.
    const std::size_t begin = good.find('{');
    std::string description = good.substr(begin, good.rfind('}') + 1 - begin);
    const std::string from = "\"threads\": 0";
    REQUIRE(description.find(from) != std::string::npos);
    description.replace(description.find(from), from.size(), "\"threads\": " + std::string(number));
    std::string header = good.substr(0, 88);
    for (std::size_t i = 0; i < 4; ++i) header[12 + i] = static_cast<char>(description.size() >> 8 * i & 0xff);
    const Sha256Digest digest = sha256(header + description);
    const std::string bytes = header + std::string(digest.begin(), digest.end()) + description + file.kernel.image;
    const auto parsed = parse_kernel_file(bytes);
    REQUIRE(std::holds_alternative<KernelFileFault>(parsed));
    CHECK(std::get<KernelFileFault>(parsed).reason == Containing{"whole number"});
  }
}

TEST_CASE("kernels of attn_bias's gradient come with the kernels of an attn_bias of numbers") {
  KernelSelection selection;
  selection.kinds = {KernelKind::kBackwardBias};
  selection.head_dims = {64};
  selection.masks = {Mask::kNone};
  selection.group_sizes = {1};
  CHECK(select_kernels(selection, arch_limits(75)).empty());
  for (const auto& [feature, count] :
       {std::pair{Feature::kBias16, 2}, {Feature::kBias32, 2}, {Feature::kBoolMask, 0}}) {
    selection.features = {};
    selection.features[static_cast<std::size_t>(feature)].on = true;
    CHECK(select_kernels(selection, arch_limits(75)).size() == count);  // with either access
  }
}

TEST_CASE("the default pack: kinds, head dims, masks and groups, all legal on a T4") {
  const std::vector<KernelSpec> specs = select_kernels(default_pack(), arch_limits(75));
  CHECK(specs.size() > 150);
  CHECK(specs.size() < 400);  // a wheel that is small enough for a notebook
  for (const KernelKind kind : kKernelKinds)
    for (const int head_dim : {64, 128})
      CHECK((family_of(kind).has_head_dim(head_dim) && !family_of(kind).results.dbias) ==
            std::any_of(specs.begin(), specs.end(),
                        [&](const KernelSpec& spec) { return spec.kind == kind && spec.head_dim == head_dim; }));
}
