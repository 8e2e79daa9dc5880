// Compiling with NVIDIA's own NVRTC 12.x and 13.x, and what the cache makes of it.
#include <doctest/doctest.h>

#include <algorithm>
#include <atomic>
#include <thread>

#include "generator/kernel_selection.h"
#include "runtime/cache/cache_folder.h"
#include "runtime/compile/compiler.h"
#include "runtime/library/pack.h"
#include "runtime/library/templates_folder.h"
#include "runtime/system/errors.h"
#include "tests/cpp/captured_log.h"
#include "tests/cpp/containing.h"
#include "tests/cpp/stub_nvrtc.h"
#include "tests/cpp/tiny_templates.h"

using namespace flash_attn_jit;
using namespace flash_attn_jit::testing;
namespace fs = std::filesystem;

namespace {

constexpr CompileTarget kCubin{75, CodeKind::kCubin}, kPtx{75, CodeKind::kPtx};

NvrtcCandidate only_nvrtc(int major) {
  Config config;
  config.nvrtc = nvrtc_folder(major);
  const NvrtcSearch search = search_nvrtc(config, {});
  REQUIRE(search.candidates.size() == 1);
  return search.candidates.front();
}

bool is_elf(const std::string& image) {
  return image.starts_with(
      "\x7f"
      "ELF");
}

}  // namespace

TEST_CASE("ptxas's log tells registers, spills and static shared memory") {
  const KernelResources resources = parse_ptxas_log(
      "ptxas info    : 0 bytes gmem\nptxas info    : Compiling entry function 'k' for 'sm_75'\n"
      "ptxas         .     1704 bytes stack frame, 16 bytes spill stores, 24 bytes spill loads\n"
      "ptxas info    : Used 255 registers, used 1 barriers, 512 bytes smem, 360 bytes cmem[0]\n");
  CHECK(resources.registers == 255);
  CHECK(resources.spill_stores == 16);
  CHECK(resources.spill_loads == 24);
  CHECK(resources.static_smem == 512);
}

TEST_CASE("a log in other words tells no resources, and the kernel is used all the same") {
  for (const std::string log : {"", "used 99 register, no spill", "128 registers"}) {
    CAPTURE(log);
    const KernelResources resources = parse_ptxas_log(log);
    CHECK(resources.registers == (log.starts_with("128") ? std::optional(128) : std::nullopt));
    CHECK_FALSE(resources.spill_stores.has_value());
    CHECK_FALSE(resources.spill_loads.has_value());

    TinySetting setting;
    setting.config.nvrtc = make_stub_nvrtc(setting.folder / "nvrtc", {.log = log});
    const FoundKernel compiled = KernelLibrary(setting.settings(std::nullopt)).find_or_compile(tiny_spec(), kCubin);
    CHECK(is_elf(compiled.kernel.image));
    const FoundKernel found = KernelLibrary(setting.settings(std::nullopt)).find_or_compile(tiny_spec(), kCubin);
    CHECK(found.origin == KernelOrigin::kDiskCache);
    CHECK(found.kernel.resources.registers == resources.registers);
    CHECK_FALSE(found.kernel.resources.spill_loads.has_value());
  }
}

TEST_CASE("NVRTC's own cache is off where there is one; the key does not depend on that") {
  const auto has = [](const std::vector<std::string>& options) {
    return std::find(options.begin(), options.end(), "--no-cache") != options.end();
  };
  CHECK_FALSE(has(nvrtc_options(kCubin, {12, 8})));
  CHECK(has(nvrtc_options(kCubin, {12, 9})));
  CHECK(has(nvrtc_options(kPtx, {13, 0})));
  CHECK_FALSE(has(compile_options(kCubin)));
}

TEST_CASE("both NVRTCs open, tell what they are and compile" * doctest::skip(!have_nvrtc())) {
  for (const int major : {12, 13}) {
    const NvrtcCandidate candidate = only_nvrtc(major);
    const Nvrtc nvrtc(candidate);
    CHECK(nvrtc.version().major == major);
    CHECK(nvrtc.version() == candidate.version);  // the file names told the truth
    const auto& known = nvrtc.supported_architectures();
    CHECK(std::find(known.begin(), known.end(), 75) != known.end());

    RenderedKernel rendered;
    rendered.entry = "k";
    rendered.source =
        "extern \"C\" __global__ void k(float* p) { __shared__ float s[64]; s[threadIdx.x] = p[0]; "
        "__syncthreads();"
        " p[threadIdx.x] = s[63 - threadIdx.x]; }";
    const CompiledKernel cubin = compile_with(nvrtc, rendered, kCubin);
    CHECK(is_elf(cubin.image));
    CHECK(cubin.resources.registers > 0);
    CHECK(cubin.resources.static_smem == 256);
    CHECK(cubin.resources.spill_stores == 0);
    CHECK(cubin.min_driver == major * 1000);
    CHECK(cubin.built_by == "nvrtc " + nvrtc.version().text());
    CHECK(compile_with(nvrtc, rendered, kCubin).image == cubin.image);

    const CompiledKernel ptx = compile_with(nvrtc, rendered, kPtx);
    CHECK(ptx.image == Containing{".target sm_75"});
    CHECK(ptx.min_driver == nvrtc.version().as_driver_version());
    CHECK_FALSE(ptx.resources.spill_stores.has_value());

    rendered.source = "this is no C++";
    CHECK_THROWS_AS(compile_with(nvrtc, rendered, kCubin), NvrtcFailure);
  }
}

TEST_CASE("a kernel is compiled once; a hit opens no NVRTC" * doctest::skip(!have_nvrtc())) {
  const TinySetting setting;
  KernelLibrary first(setting.settings(std::nullopt));
  const FoundKernel compiled = first.find_or_compile(tiny_spec(), kCubin);
  CHECK(compiled.origin == KernelOrigin::kCompiled);
  CHECK(compiled.kernel.entry == tiny_spec().name());
  CHECK(compiled.kernel.threads == tiny_spec().tile.threads());
  CHECK(compiled.kernel.dynamic_smem == render(tiny_spec(), embedded_templates()).dynamic_smem);
  CHECK(first.nvrtc_opened() == 1);

  KernelLibrary second(setting.settings(std::nullopt));
  const FoundKernel found = second.find_or_compile(tiny_spec(), kCubin);
  CHECK(found.origin == KernelOrigin::kDiskCache);
  CHECK(found.kernel.image == compiled.kernel.image);
  CHECK(found.kernel.resources.registers == compiled.kernel.resources.registers);
  CHECK(second.nvrtc_opened() == 0);
}

TEST_CASE("a kernel for one target is rendered, hashed and looked for once, found or not") {
  TinySetting setting;
  setting.config.nvrtc = make_stub_nvrtc(setting.folder / "nvrtc", {});
  for (const auto& [target, origin] : {std::pair{kCubin, KernelOrigin::kCompiled},
                                       {kCubin, KernelOrigin::kDiskCache},
                                       {CompileTarget{75, CodeKind::kPtx}, KernelOrigin::kCompiled}}) {
    CAPTURE(target.text());
    KernelLibrary library(setting.settings(std::nullopt));
    CHECK(library.find_or_compile(tiny_spec(), target).origin == origin);
    CHECK(library.rendered() == 1);
    CHECK(library.hashed() == 1);
    CHECK(library.cache().lookups() == 1);
  }
}

TEST_CASE("threads that ask for kernels compile each once" * doctest::skip(!have_nvrtc())) {
  const TinySetting setting;
  KernelLibrary library(setting.settings(std::nullopt));
  std::atomic<int> right = 0;
  std::vector<std::thread> threads;
  for (int i = 0; i < 8; ++i)
    threads.emplace_back([&, i] {
      const KernelSpec spec = tiny_spec(i % 2 == 0 ? 64 : 128);
      right += library.find_or_compile(spec, kCubin).kernel.entry == spec.name();
    });
  for (std::thread& thread : threads) thread.join();
  CHECK(right == 8);
  CHECK(list_cache(setting.config.cache_dir).size() == 2);
}

TEST_CASE("the key: templates, spec and target change it, the folders do not" * doctest::skip(!have_nvrtc())) {
  const TinySetting setting;
  const auto origin = [&](const Config& config, const KernelSpec& spec, const CompileTarget& target) {
    KernelLibrary library({.config = config, .cache = cache_settings(setting.config), .driver_version = std::nullopt});
    return library.find_or_compile(spec, target).origin;
  };
  const Config& config = setting.config;
  CHECK(origin(config, tiny_spec(), kCubin) == KernelOrigin::kCompiled);
  CHECK(origin(config, tiny_spec(), kCubin) == KernelOrigin::kDiskCache);

  Config elsewhere = config;
  elsewhere.templates = setting.folder / "moved";
  write_tiny_templates(*elsewhere.templates);
  elsewhere.nvrtc = nvrtc_folder(13);
  CHECK(origin(elsewhere, tiny_spec(), kCubin) == KernelOrigin::kDiskCache);

  KernelSpec causal = tiny_spec();
  causal.mask = Mask::kCausal;
  CHECK(origin(config, causal, kCubin) == KernelOrigin::kCompiled);
  CHECK(origin(config, tiny_spec(), {80, CodeKind::kCubin}) == KernelOrigin::kCompiled);
  CHECK(origin(config, tiny_spec(), kPtx) == KernelOrigin::kCompiled);
  write_all(*elsewhere.templates / "flash_fwd_params.cuh",
            read_all(*elsewhere.templates / "flash_fwd_params.cuh") + "// a remark\n");
  CHECK(origin(elsewhere, tiny_spec(), kCubin) == KernelOrigin::kCompiled);
}

TEST_CASE("a refused source is kept, its error tells all, and nothing else is stored" * doctest::skip(!have_nvrtc())) {
  const TinySetting setting;
  write_tiny_templates(*setting.config.templates, "this_is_not_declared();");
  bool refused = false;
  try {
    KernelLibrary(setting.settings(std::nullopt)).find_or_compile(tiny_spec(), kCubin);
  } catch (const CompileError& error) {
    refused = true;
    CHECK(error.log == Containing{"this_is_not_declared"});
    CHECK(error.log == Containing{"flash_fwd.cuh("});
    CHECK(error.options == Containing{"--gpu-architecture=sm_75"});
    CHECK(read_all(error.source_path) == Containing{"this_is_not_declared"});
    CHECK(fs::path(error.source_path).parent_path() == setting.config.cache_dir);
    for (const std::string& part : {error.log, error.options, error.source_path})
      CHECK(std::string(error.what()) == Containing{part});
  }
  CHECK(refused);
  CHECK(list_cache(setting.config.cache_dir).empty());
  write_tiny_templates(*setting.config.templates);
  CHECK(KernelLibrary(setting.settings(std::nullopt)).find_or_compile(tiny_spec(), kCubin).origin ==
        KernelOrigin::kCompiled);
}

TEST_CASE("without a compiler and without the kernel, the error names the command that makes it") {
  TinySetting setting;
  fs::create_directories(setting.folder / "empty");
  setting.config.nvrtc = setting.folder / "empty";
  KernelSpec spec = tiny_spec(128);
  spec.mask = Mask::kCausal;
  spec.group_size = 4;
  spec.tile = default_tiles(spec).front();
  bool missing = false;
  try {
    KernelLibrary(setting.settings(12040)).find_or_compile(spec, kCubin);
  } catch (const MissingKernelError& error) {
    missing = true;
    CHECK(error.spec == spec);
    CHECK(error.prebuild_command ==
          "flash-attn-jit prebuild --arch sm_75 --kinds fwd --head-dims 128 --causal yes --gqa 4 --out DIR");
    const std::string message = error.what();
    CHECK(message == Containing{error.prebuild_command});
    CHECK(message == Containing{"pip install 'flash-attn-jit[cu12]'"});
    CHECK(message == Containing{"FLASH_ATTN_JIT_NVRTC: " + (setting.folder / "empty").string()});
  }
  CHECK(missing);

  spec.mask = Mask::kWindow;
  std::string features;
  for (const FeatureInfo& info : kFeatures) {
    spec.features.set(info.feature);
    if (!spec.features.go_together()) {
      spec.features.set(info.feature, false);
      continue;
    }
    features += " --" + std::string(info.word) + " yes";
  }
  CHECK(features == Containing{"--softcap yes --alibi yes"});
  spec.tile = default_tiles(spec).front();
  const std::string command = "--head-dims 128 --causal no --window" + features + " --gqa 4";
  CHECK_THROWS_WITH_AS(KernelLibrary(setting.settings(12040)).find_or_compile(spec, kCubin),
                       doctest::Contains(command.c_str()), MissingKernelError);

  spec.tile = tile_space(spec, arch_limits(75)).front();  // as a tuning record may choose
  CHECK(default_tiles(spec).front() != spec.tile);
  CHECK_THROWS_WITH_AS(
      KernelLibrary(setting.settings(12040)).find_or_compile(spec, kCubin),
      doctest::Contains("tune --export FILE && flash-attn-jit prebuild --arch sm_75 --tuned FILE --out DIR"),
      MissingKernelError);
}

TEST_CASE("an illegal spec is refused with check()'s reason") {
  const TinySetting setting;
  KernelSpec spec = tiny_spec();
  spec.tile.block_n = 17;
  CHECK_THROWS_AS(KernelLibrary(setting.settings(std::nullopt)).find_or_compile(spec, kCubin), UnsupportedError);
}

TEST_CASE("the driver decides between NVRTC 12 and 13" * doctest::skip(!have_nvrtc())) {
  const auto built_by = [](std::optional<int> driver_version, const CompileTarget& target) {
    const TinySetting setting;
    return KernelLibrary(setting.settings(driver_version)).find_or_compile(tiny_spec(), target).kernel.built_by;
  };
  CHECK(built_by(12040, kCubin) == Containing{"nvrtc 12."});
  CHECK(built_by(13000, kCubin) == Containing{"nvrtc 13."});
  CHECK(built_by(std::nullopt, kCubin) == Containing{"nvrtc 12."});
  CHECK(built_by(12090, kPtx) == Containing{"nvrtc 12."});
  CHECK(built_by(99000, kPtx) == Containing{"nvrtc 13."});
}

TEST_CASE("a kernel of NVRTC 13 is built anew for a CUDA 12 driver, and that one serves both" *
          doctest::skip(!have_nvrtc())) {
  const TinySetting setting;
  KernelLibrary(setting.settings(13000)).find_or_compile(tiny_spec(), kCubin);
  const CapturedLog log;
  const FoundKernel rebuilt = KernelLibrary(setting.settings(12040)).find_or_compile(tiny_spec(), kCubin);
  CHECK(rebuilt.origin == KernelOrigin::kCompiled);
  CHECK(rebuilt.kernel.built_by == Containing{"nvrtc 12."});
  REQUIRE(log.warnings().size() == 1);
  CHECK(log.warnings()[0] == Containing{tiny_spec().name()});
  CHECK(log.warnings()[0] == Containing{"needs a CUDA 13.0 driver or newer; this one is 12.4"});
  CHECK(KernelLibrary(setting.settings(13000)).find_or_compile(tiny_spec(), kCubin).origin == KernelOrigin::kDiskCache);
}

TEST_CASE("an NVRTC that is named but makes what the driver cannot load is an error" * doctest::skip(!have_nvrtc())) {
  TinySetting setting;
  setting.config.nvrtc = nvrtc_folder(13);
  std::string message;
  try {
    KernelLibrary(setting.settings(12040)).find_or_compile(tiny_spec(), kCubin);
  } catch (const MissingKernelError& error) {
    message = error.what();
  }
  CHECK(message == Containing{"a driver for CUDA 12.4 cannot load the machine code of the NVRTC found: 13."});
}

TEST_CASE("with only NVRTC 13, a pack comes with a warning" * doctest::skip(!have_nvrtc())) {
  TinySetting setting;
  set_python_search_path({});
  setting.config.library_path = {nvrtc_folder(13)};
  const CapturedLog log;
  const auto pack = open_pack_for_writing(setting.config, setting.folder / "pack");
  if (pack->find_or_compile(tiny_spec(), kCubin).kernel.built_by.find("nvrtc 13.") == std::string::npos)
    return;  // this machine has a 12.x on its loader's path
  REQUIRE(log.warnings().size() == 1);
  CHECK(log.warnings()[0] == Containing{"CUDA 12 drivers will not load"});
}

TEST_CASE("a pack holds what the JIT makes, serves without NVRTC, and is made once" * doctest::skip(!have_nvrtc())) {
  TinySetting setting;
  setting.config.nvrtc = nvrtc_folder(12);
  KernelSelection selection;
  selection.head_dims = {64, 68};
  selection.masks = {Mask::kNone, Mask::kCausal};
  selection.group_sizes = {1, 4};
  const std::vector<KernelSpec> specs = select_kernels(selection, arch_limits(75));
  const fs::path folder = setting.folder / "pack";
  {
    const auto pack = open_pack_for_writing(setting.config, folder);
    for (const KernelSpec& spec : specs) CHECK(pack->find_or_compile(spec, kCubin).origin == KernelOrigin::kCompiled);
  }
  const auto again = open_pack_for_writing(setting.config, folder);
  for (const KernelSpec& spec : specs) CHECK(again->find_or_compile(spec, kCubin).origin == KernelOrigin::kDiskCache);
  CHECK(again->nvrtc_opened() == 0);
  write_manifest(folder);
  const std::string manifest = read_all(folder / "manifest.json");
  for (const KernelSpec& spec : specs) CHECK(manifest == Containing{spec.text()});

  KernelLibrary jit(setting.settings(12040));
  Config packed = setting.config;
  packed.prebuilt = folder;
  packed.cache_dir = setting.folder / "other cache";
  fs::create_directories(setting.folder / "no nvrtc");
  packed.nvrtc = setting.folder / "no nvrtc";
  KernelLibrary without_nvrtc({.config = packed, .cache = cache_settings(packed), .driver_version = 12040});
  for (const KernelSpec& spec : specs) {
    const FoundKernel found = without_nvrtc.find_or_compile(spec, kCubin);
    CHECK(found.origin == KernelOrigin::kPrebuilt);
    CHECK(found.kernel.image == jit.find_or_compile(spec, kCubin).kernel.image);
  }
  CHECK(without_nvrtc.nvrtc_opened() == 0);
  CHECK_FALSE(fs::exists(packed.cache_dir));
}

TEST_CASE("the selection of a pack: every default tile, 16-byte and element-wise loads") {
  KernelSelection selection;
  selection.head_dims = {64, 68};
  selection.masks = {Mask::kCausal};
  selection.group_sizes = {2};
  const ArchLimits arch = arch_limits(75);
  const std::vector<KernelSpec> specs = select_kernels(selection, arch);
  std::size_t expected = 0;
  for (const auto& [head_dim, access] :
       {std::pair{64, GlobalAccess::kVector16B}, {64, GlobalAccess::kElement2B}, {68, GlobalAccess::kElement2B}}) {
    KernelSpec spec;
    spec.head_dim = head_dim;
    spec.mask = Mask::kCausal;
    spec.group_size = 2;
    spec.access = access;
    for (const TileConfig& tile : default_tiles(spec)) {
      spec.tile = tile;
      CHECK(std::find(specs.begin(), specs.end(), spec) != specs.end());
      ++expected;
    }
  }
  CHECK(specs.size() == expected);
  selection.head_dims = {300};
  CHECK_THROWS_AS(select_kernels(selection, arch), UnsupportedError);  // of kForward alone
  selection.kinds = {KernelKind::kForward, KernelKind::kForwardWide};
  for (const KernelSpec& spec : select_kernels(selection, arch)) CHECK(spec.kind == KernelKind::kForwardWide);
  selection.kinds.push_back(KernelKind::kBackwardDq);
  CHECK_THROWS_AS(select_kernels(selection, arch), UnsupportedError);
}

TEST_CASE("selection: whatever a cache's calls have, what appends to it is among their kernels") {
  for (const Feature feature : {Feature::kKeyLengths, Feature::kPaged, Feature::kVarlen}) {
    KernelSelection selection;
    selection.kinds = {KernelKind::kDecode, KernelKind::kDecodeCombine, KernelKind::kAppend};
    selection.head_dims = {64};
    selection.masks = {Mask::kCausal};
    selection.group_sizes = {4};
    for (std::size_t i = 0; i < kFeatures.size(); ++i)
      if (kFeatures[i].feature == feature) selection.features[i] = {.off = false, .on = true};
    const std::vector<KernelSpec> specs = select_kernels(selection, arch_limits(75));
    CHECK(std::ranges::count(specs, KernelKind::kAppend, &KernelSpec::kind) == 2);  // one for each kind of access
    CHECK(std::ranges::count(specs, KernelKind::kDecode, &KernelSpec::kind) > 0);
  }
}

TEST_CASE("templates from a folder that has none") {
  const TemporaryFolder folder;
  Config config;
  config.templates = folder.path();
  CHECK_THROWS_AS(load_templates(config), ConfigError);
  CHECK(load_templates(Config{}) == embedded_templates());
}

namespace {

// What load_templates() says of the built-in templates, written into a folder with one text replaced.
std::string refusal_of_edit(const std::string& file, const std::string& from, const std::string& to) {
  const TemporaryFolder folder;
  for (const auto& [name, text] : embedded_templates()) write_all(folder / name, text);
  std::string text = embedded_templates().at(file);
  REQUIRE(text.find(from) != std::string::npos);
  write_all(folder / file, text.replace(text.find(from), from.size(), to));
  Config config;
  config.templates = folder.path();
  try {
    load_templates(config);
  } catch (const ConfigError& error) {
    CHECK(error.what() == Containing{file});
    return error.what();
  }
  return "";
}

}  // namespace

TEST_CASE("templates that lay out what the host shares in another way are refused") {
  const std::string params = embedded_templates().at("attention_params.cuh"), heads = "int num_heads, num_heads_k;";
  const auto line = 1 + std::count(params.begin(), params.begin() + params.find(heads), '\n');
  CHECK(refusal_of_edit("attention_params.cuh", heads, "int num_heads, num_heads_k, one_more;") ==
        Containing{"differs at line " + std::to_string(line) + " "});
  CHECK(refusal_of_edit("attention_params.cuh", "int seqlen_q, seqlen_k;", "int seqlen_k, seqlen_q;") != "");
  CHECK(refusal_of_edit("attention_params.cuh", "unsigned sign;", "float sign;") != "");  // of the same size
  CHECK(refusal_of_edit("flash_fwd_params.cuh", "int num_m_blocks;", "int num_m_blocks; int more;") != "");
  CHECK(refusal_of_edit("flash_bwd_params.cuh", "float softmax_scale;", "") != "");
  CHECK(refusal_of_edit("host_engine.cuh", "int (*thread_in_block)();", "int (*more)(); int (*thread_in_block)();") !=
        "");
  CHECK(refusal_of_edit("host_engine.cuh", "kLoadGlobal16B,", "kMore, kLoadGlobal16B,") != "");

  // All else may be edited, and these files' comments and lines.
  CHECK(refusal_of_edit("attention_params.cuh", "#pragma once", "// A remark.\n/* Another. */\n\n#pragma once") == "");
  CHECK(refusal_of_edit("attention_params.cuh", "int num_heads, num_heads_k;", "int num_heads,\n      num_heads_k;") ==
        "");
  for (const auto& [file, text] : embedded_templates())
    if (!is_shared_with_host(file)) CHECK(refusal_of_edit(file, "#pragma once", "#pragma once\nint of_mine;") == "");
}

TEST_CASE("a folder that lacks a template that the host shares is refused") {
  const TemporaryFolder folder;
  write_tiny_templates(folder.path());
  Config config;
  config.templates = folder.path();
  CHECK_NOTHROW(load_templates(config));
  fs::remove(folder / "host_engine.cuh");
  CHECK_THROWS_WITH_AS(load_templates(config), doctest::Contains("host_engine.cuh is missing"), ConfigError);
}
