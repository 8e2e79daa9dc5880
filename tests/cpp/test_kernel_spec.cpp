// The canonical text of specs and tiles, and what is legal.
#include <doctest/doctest.h>

#include <random>
#include <string>

#include "generator/errors.h"
#include "generator/kernel_spec.h"
#include "generator/legality.h"

using namespace flash_attn_jit;

namespace {

KernelSpec random_spec(std::mt19937& random) {
  const auto below = [&](int n) { return std::uniform_int_distribution<int>(0, n - 1)(random); };
  KernelSpec spec;
  spec.kind = kKernelKinds[static_cast<std::size_t>(below(static_cast<int>(kKernelKinds.size())))];
  spec.dtype = below(2) ? DType::kFloat16 : DType::kBFloat16;
  const int head_dim = below(1000);
  spec.set_head_dims(head_dim, below(2) ? head_dim : 1 + below(1000));
  spec.mask = kAllMasks[static_cast<std::size_t>(below(3))];
  for (const FeatureInfo& info : kFeatures) spec.features.set(info.feature, below(2) == 1);
  spec.group_size = below(200);
  spec.access = below(2) ? GlobalAccess::kVector16B : GlobalAccess::kElement2B;
  spec.tile = {below(600), below(200), below(40), below(300), {below(9), below(9), below(9)}};
  return spec;
}

KernelSpec legal_spec() { return KernelSpec::parse("fwd hdim128 fp16 causal gqa8 vec16 m256n16w8q80l2b4k7"); }

std::string reason(const KernelSpec& spec, int sm = 75) { return check(spec, arch_limits(sm)).value_or("legal"); }

bool contains(const std::string& text, const char* part) { return text.find(part) != std::string::npos; }

}  // namespace

TEST_CASE("a spec's text parses back to the spec, and is the only text that does") {
  std::mt19937 random(1);
  for (int i = 0; i < 2000; ++i) {
    const KernelSpec spec = random_spec(random);
    CAPTURE(spec.text());
    CHECK(KernelSpec::parse(spec.text()) == spec);
    CHECK(TileConfig::parse(spec.tile.text()) == spec.tile);
    std::string damaged = spec.text();
    damaged[static_cast<std::size_t>(random() % damaged.size())] = '?';
    CHECK_THROWS_AS(KernelSpec::parse(damaged), SpecError);
  }
}

TEST_CASE("a text that is no spec is refused, naming the field and what it accepts") {
  const auto refusal = [](const char* text) -> std::string {
    try {
      KernelSpec::parse(text);
    } catch (const SpecError& error) {
      return error.what();
    }
    return "accepted";
  };
  CHECK(contains(refusal(""), "seven words"));
  CHECK(contains(refusal("fwd hdim64 fp16 full gqa1 vec16"), "seven words"));
  CHECK(contains(refusal("fwd hdim64 fp16 diagonal gqa1 vec16 m64n16w4q64l2b4k7"),
                 "mask is 'diagonal'; accepted: full, causal, window"));
  CHECK(contains(refusal("fwd hdim64 fp16 full varlen alibi gqa1 vec16 m64n16w4q64l2b4k7"), "seven words"));
  CHECK(contains(refusal("fwd hdim64 fp16 full alibi alibi gqa1 vec16 m64n16w4q64l2b4k7"), "seven words"));
  CHECK(contains(refusal("fwd hdim64 fp32 full gqa1 vec16 m64n16w4q64l2b4k7"), "dtype is 'fp32'"));
  CHECK(contains(refusal("bwd hdim64 fp16 full gqa1 vec16 m64n16w4q64l2b4k7"), "kind is 'bwd'"));
  for (const char* number : {"hdim", "hdim064", "hdim-64", "hdim+64", "hdim64x", "hdim99999999999", "hdim64v",
                             "hdim64v64", "hdim64v0", "hdim64v032", "hdim64v32x"})
    CHECK(contains(refusal((std::string("fwd ") + number + " fp16 full gqa1 vec16 m64n16w4q64l2b4k7").c_str()),
                   "head_dim is '"));
  CHECK(contains(refusal("fwd hdim64 fp16 full gqa1 vec16 m64n16w4q64"), "tile is 'm64n16w4q64'"));
}

TEST_CASE("every field of a spec changes its text and its name") {
  const KernelSpec spec = legal_spec();
  const auto differs = [&](auto change) {
    KernelSpec other = spec;
    change(other);
    return other.text() != spec.text() && other.name() != spec.name();
  };
  CHECK(differs([](KernelSpec& s) { s.dtype = DType::kBFloat16; }));
  CHECK(differs([](KernelSpec& s) { s.head_dim = 120; }));
  CHECK(differs([](KernelSpec& s) { s.head_dim_v = 64; }));
  CHECK(differs([](KernelSpec& s) { s.mask = Mask::kNone; }));
  CHECK(differs([](KernelSpec& s) { s.mask = Mask::kWindow; }));
  for (const FeatureInfo& info : kFeatures) CHECK(differs([&](KernelSpec& s) { s.features.set(info.feature); }));
  CHECK(differs([](KernelSpec& s) { s.group_size = 1; }));
  CHECK(differs([](KernelSpec& s) { s.access = GlobalAccess::kElement2B; }));
  CHECK(differs([](KernelSpec& s) { s.tile.block_m = 128; }));
  CHECK(differs([](KernelSpec& s) { s.tile.block_n = 32; }));
  CHECK(differs([](KernelSpec& s) { s.tile.warps = 16; }));
  CHECK(differs([](KernelSpec& s) { s.tile.register_dims = 96; }));
  CHECK(differs([](KernelSpec& s) { s.tile.schedule.load = 1; }));
  CHECK(differs([](KernelSpec& s) { s.tile.schedule.barrier = 5; }));
  CHECK(differs([](KernelSpec& s) { s.tile.schedule.first_keys = 8; }));
}

TEST_CASE("what is not legal is refused with its reason") {
  CHECK(reason(legal_spec()) == "legal");
  const auto refused = [](auto change, const char* why, int sm = 75) {
    KernelSpec spec = legal_spec();
    change(spec);
    CAPTURE(reason(spec, sm));
    CHECK(contains(reason(spec, sm), why));
  };
  refused([](KernelSpec& s) { s.head_dim = 513; }, "head_dim is 513; accepted: 1 to 512");
  refused([](KernelSpec& s) { s.head_dim = 257; }, "head_dim is 257 with kind fwd; accepted: 1 to 256");
  refused([](KernelSpec& s) { s.head_dim = 0; }, "head_dim is 0; accepted: 1 to 512");
  refused([](KernelSpec& s) { s.head_dim_v = 257; }, "head_dim is 257 with kind fwd; accepted: 1 to 256");
  refused([](KernelSpec& s) { s.head_dim_v = 513; }, "v's head_dim is 513; accepted: 1 to 512");
  refused([](KernelSpec& s) { s.head_dim_v = 60; }, "head_dim 128 (v's 60); accepted: head dims that are multiples");
  refused([](KernelSpec& s) { s.group_size = 0; }, "group_size");
  refused([](KernelSpec& s) { s.head_dim = 124; }, "multiples of 8");
  refused([](KernelSpec& s) { s.tile.warps = 17; }, "17 warps");
  refused([](KernelSpec& s) { s.tile.block_m = 192; }, "16 or 32 rows a warp");
  refused([](KernelSpec& s) { s.tile.block_n = 24; }, "16, 32, 48 or 64");
  refused([](KernelSpec& s) { s.tile.register_dims = 144; }, "multiples of 16 below 128, or all 128");
  refused([](KernelSpec& s) { s.tile.register_dims = 40; }, "multiples of 16 below 128, or all 128");
  refused([](KernelSpec& s) { s.tile.schedule = {4, 4, 7}; }, "eighths");
  refused([](KernelSpec& s) { s.tile.schedule = {2, 5, 4}; }, "eighths");
  refused([](KernelSpec& s) { s.tile.schedule = {2, 8, 9}; }, "eighths");
  refused([](KernelSpec& s) { s.tile.block_n = 32; }, "bytes of shared memory; sm_75 has 65536");
  refused([](KernelSpec& s) { s.tile.register_dims = 128, s.tile.block_n = 32; }, "registers", 90);
  const auto of_one_warp = [](KernelKind kind, const char* tile) {
    KernelSpec spec{.kind = kind, .head_dim = 64, .tile = TileConfig::parse(tile)};
    return reason(spec);
  };
  CHECK(
      contains(of_one_warp(KernelKind::kBackwardDkDv, "m32n40w1q64l0b8k8"), "40 queries an iteration for 32 threads"));
  CHECK(of_one_warp(KernelKind::kBackwardDkDv, "m32n32w1q64l0b8k8") == "legal");
  CHECK(of_one_warp(KernelKind::kBackwardDq, "m32n40w1q64l0b8k8") == "legal");  // fetches no statistics
  for (const auto& [tile, is_legal] : {std::pair("m64n16w4q40l2b4k7", true),
                                       {"m64n16w4q32l2b4k7", true},
                                       {"m64n16w4q24l2b4k7", false},
                                       {"m64n16w4q48l2b4k7", false}}) {
    const KernelSpec spec{.head_dim = 33, .access = GlobalAccess::kElement2B, .tile = TileConfig::parse(tile)};
    CAPTURE(tile);
    CHECK((reason(spec) == "legal") == is_legal);
  }
}

TEST_CASE("architectures") {
  CHECK(parse_arch("sm_75") == 75);
  CHECK(parse_arch("90") == 90);
  for (const char* text : {"", "sm_", "sm_7x", "turing", "sm_75 ", "5"}) CHECK_THROWS_AS(parse_arch(text), SpecError);
  CHECK_THROWS_AS(arch_limits(70), UnsupportedError);
  CHECK(arch_limits(75).max_shared_bytes_per_block == 64 * 1024);
  CHECK(arch_limits(88).sm == 88);  // unknown: the limits of the nearest older
  CHECK(arch_limits(88).max_shared_bytes_per_block == arch_limits(87).max_shared_bytes_per_block);
}
