// Rendering: one self-contained source, specialised by the spec and by nothing else.
#include <doctest/doctest.h>

#include <regex>
#include <set>
#include <string>

#include "generator/errors.h"
#include "generator/families/families.h"
#include "generator/render.h"
#include "generator/tile_chooser.h"
#include "generator/tile_layout.h"

using namespace flash_attn_jit;

namespace {

KernelSpec spec_of(const char* text) { return KernelSpec::parse(text); }

const KernelSpec kSpec = spec_of("fwd hdim72 fp16 causal gqa7 vec16 m128n16w8q64l2b4k7");

int count(const std::string& text, const std::string& part) {
  int n = 0;
  for (std::size_t at = text.find(part); at != std::string::npos; at = text.find(part, at + 1)) ++n;
  return n;
}

// The value of `name` in the rendered traits.
std::string constant(const std::string& source, const char* name) {
  std::smatch match;
  REQUIRE(std::regex_search(source, match, std::regex(std::string(" ") + name + " = (\\w+);\n\\S*")));
  return match[1];
}

}  // namespace

TEST_CASE("the source is self-contained and has a template once, and every template is some kernel's") {
  std::set<std::string> used;
  for (const KernelKind kind : kKernelKinds) {
    KernelSpec spec;
    spec.kind = kind;
    spec.head_dim = family_of(kind).most_head_dim;
    spec.tile = default_tiles(spec).front();
    CAPTURE(spec.text());
    const RenderedKernel kernel = render(spec, embedded_templates());
    CHECK(count(kernel.source, "#include") == 0);
    CHECK(count(kernel.source, "#pragma once") == 0);
    for (const auto& [file, text] : embedded_templates()) {
      const int times = count(kernel.source, "#line 1 \"" + file + "\"\n");
      CHECK(times <= 1);
      if (times == 1) used.insert(file);
    }
    CHECK(count(kernel.source, "extern \"C\" __global__") == 1);
    const std::string params(family_of(kind).params);
    CHECK(count(kernel.source, kernel.entry + "(const " + params + " params)") == 1);
  }
  KernelSpec users;
  users.features.set(Feature::kUserScore);
  users.functions = 1;
  users.head_dim = 64;
  users.tile = default_tiles(users).front();
  const std::string of_user = render(users, embedded_templates(), "#include \"user_reads.cuh\"\n").source;
  const std::string peak = render_tensor_peak(embedded_templates()).source;
  for (const auto& [file, text] : embedded_templates()) {
    if (count(of_user, "#line 1 \"" + file + "\"\n") == 1) used.insert(file);
    if (count(peak, "#line 1 \"" + file + "\"\n") == 1) used.insert(file);
    CHECK_MESSAGE(used.contains(file), file);
  }
}

TEST_CASE("the traits are the spec's") {
  const std::string source = render(kSpec, embedded_templates()).source;
  const std::string traits = source.substr(source.find("struct Traits"));
  CHECK(constant(traits, "kHeadDim") == "72");
  CHECK(constant(traits, "kGroupSize") == "7");
  CHECK(constant(traits, "kIsCausal") == "true");
  CHECK(constant(traits, "kVectorAccess") == "true");
  CHECK(constant(traits, "kBlockM") == "128");
  CHECK(constant(traits, "kBlockN") == "16");
  CHECK(constant(traits, "kNWarps") == "8");
  CHECK(constant(traits, "kRegisterDims") == "64");
  CHECK(constant(traits, "kLoadEighth") == "2");
  CHECK(constant(traits, "kBarrierEighth") == "4");
  CHECK(constant(traits, "kFirstKeysEighth") == "7");
}

TEST_CASE("what is compiled in is what the spec has on") {
  const auto traits = [](const char* text) { return render(spec_of(text), embedded_templates()).source; };
  const std::string off = traits("fwd hdim64 fp16 full gqa1 vec16 m64n16w4q64l2b4k7");
  const std::string on = traits("fwd hdim64 fp16 window softcap alibi varlen gqa1 vec16 m64n16w4q64l2b4k7");
  for (const char* name : {"kIsLocal", "kIsSoftcap", "kHasAlibi", "kIsVarlen"}) {
    CHECK(constant(off, name) == "false");
    CHECK(constant(on, name) == "true");
  }
  CHECK(constant(on, "kIsCausal") == "false");
}

TEST_CASE("rendering is a function of its arguments, and every edit of a template shows") {
  TemplateSet templates = embedded_templates();
  CHECK(render(kSpec, templates).source == render(kSpec, templates).source);
  const std::string source = render(kSpec, templates).source;
  for (auto& each : templates) {
    const std::string& file = each.first;
    CAPTURE(file);
    if (source.find("\"" + file + "\"") == std::string::npos) continue;  // of another kernel family
    const std::string before = render(kSpec, templates).source;
    each.second += "// edited\n";
    CHECK(render(kSpec, templates).source != before);
  }
}

TEST_CASE("line directives name the template's own lines") {
  const TemplateSet templates = {{"flash_fwd.cuh", "#pragma once\n#include \"part.cuh\"\nthird\n"},
                                 {"part.cuh", "#pragma once\nsecond\n"}};
  const std::string source = render(kSpec, templates).source;
  CHECK(source.starts_with(
      "#line 1 \"flash_fwd.cuh\"\n\n#line 1 \"part.cuh\"\n\nsecond\n#line 3 \"flash_fwd.cuh\"\nthird\n"));
}

TEST_CASE("a template that is not there is named") {
  const TemplateSet templates = {{"flash_fwd.cuh", "#include \"gone.cuh\"\n"}};
  CHECK_THROWS_WITH_AS(render(kSpec, templates),
                       "there is no template 'gone.cuh', which flash_fwd.cuh:1 includes; a folder in "
                       "FLASH_ATTN_JIT_TEMPLATES has to hold all of them",
                       Error);
}

TEST_CASE("what a launch needs comes with the source") {
  const RenderedKernel kernel =
      render(spec_of("fwd hdim128 fp16 full gqa1 vec16 m256n16w8q80l2b4k7"), embedded_templates());
  CHECK(kernel.entry == "flash_fwd_hdim128_fp16_full_gqa1_vec16_m256n16w8q80l2b4k7");
  CHECK(kernel.threads == 256);
  // Two tiles of K and three of V, 16 rows of 272 bytes each, and 256 rows of 48 dims of Q, 112 bytes each.
  CHECK(kernel.dynamic_smem == 5 * 16 * 272 + 256 * 112);
  // 2 products x 2 row tiles x 2 key tiles x 16 steps of 8 dims.
  CHECK(kernel.useful_mma == 128);
  // The true head dim counts, not the padded one: 72 is 9 steps of 8 and is padded to 10.
  CHECK(render(kSpec, embedded_templates()).useful_mma == 2 * 1 * 2 * 9);
  // dK and dV above 128: two blocks compute S and dP both and half of the gradients each, 96 instructions in place of
  // 64.
  const auto useful_of = [](const char* text) { return render(spec_of(text), embedded_templates()).useful_mma; };
  CHECK(useful_of("bwd_dkdv hdim256 fp16 full gqa1 vec16 m64n8w4q112l0b8k8") == 4 * 32 / 2);
  CHECK(useful_of("bwd_dkdv hdim128 fp16 full gqa1 vec16 m128n16w8q128l1b8k8") == 4 * 2 * 16);
  CHECK(useful_of("bwd_dq hdim256 fp16 full gqa1 vec16 m64n8w4q112l0b8k8") == 3 * 32);
}
