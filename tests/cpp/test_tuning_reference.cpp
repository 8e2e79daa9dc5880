// The reference that candidates are checked against, beside the tests' own, which shares nothing with it.
#include <doctest/doctest.h>

#include <cmath>
#include <set>

#include "generator/families/families.h"
#include "generator/key_splits.h"
#include "generator/legality.h"
#include "runtime/tuner/half.h"
#include "runtime/tuner/presets.h"
#include "runtime/tuner/reference.h"
#include "tests/cpp/attention_reference.h"
#include "tests/cpp/fp16.h"

using namespace flash_attn_jit;
using namespace flash_attn_jit::testing;

namespace {

void fill(WatchedTensor& tensor, CaseTensor which, const CaseNumbers& numbers) {
  const auto [batch, seqlen, heads, dims] = tensor.shape();
  std::int64_t index = 0;
  for (std::int64_t b = 0; b < batch; ++b)
    for (std::int64_t s = 0; s < seqlen; ++s)
      for (std::int64_t h = 0; h < heads; ++h)
        for (std::int64_t d = 0; d < dims; ++d) tensor.at(b, s, h, d) = numbers.bits(which, index++);
}

}  // namespace

TEST_CASE("the tuner's half is the tests' half") {
  for (int bits = 0; bits < 65536; ++bits) {
    const double theirs = from_fp16(static_cast<std::uint16_t>(bits)),
                 ours = half_to_double(static_cast<std::uint16_t>(bits));
    if (std::isnan(theirs) ? !std::isnan(ours) : ours != theirs) FAIL_CHECK(bits << ": " << ours << ", " << theirs);
    if (!std::isnan(theirs) && double_to_half(theirs) != to_fp16(theirs)) FAIL_CHECK(bits);
  }
  for (const double value : {1e-9, 3.1e-5, 0.1, 1.00048828125, 2049.0, 65519.0, 65520.0, -1e9})
    CHECK(double_to_half(value) == to_fp16(value));
}

TEST_CASE("numbers of a case are normal, of one seed always the same, and tensors differ") {
  const CaseNumbers numbers(3), same(3), other(4);
  double sum = 0, squares = 0;
  constexpr int kCount = 200000;
  int equal = 0;
  for (int i = 0; i < kCount; ++i) {
    const double value = numbers.value(CaseTensor::kQ, i);
    CHECK(value == half_to_double(numbers.bits(CaseTensor::kQ, i)));
    sum += value;
    squares += value * value;
    equal += numbers.bits(CaseTensor::kQ, i) == numbers.bits(CaseTensor::kK, i);
    if (numbers.bits(CaseTensor::kV, i) != same.bits(CaseTensor::kV, i)) FAIL("not the same");
  }
  CHECK(std::fabs(sum / kCount) < 0.01);
  CHECK(squares / kCount == doctest::Approx(1).epsilon(0.02));
  CHECK(equal < kCount / 100);
  CHECK(other.bits(CaseTensor::kQ, 0) != numbers.bits(CaseTensor::kQ, 0));
  std::int64_t count = 5000000;
  const std::uint16_t* const run = numbers.run(CaseTensor::kDout, 12345678901, count);
  REQUIRE(count > 0);
  CHECK(run[count - 1] == numbers.bits(CaseTensor::kDout, 12345678901 + count - 1));
}

TEST_CASE("forward rows of a case are those of the tests' reference, with every option") {
  const CaseNumbers numbers(5);
  for (const char* kernel :
       {"fwd hdim24 fp16 full gqa1 vec16", "fwd hdim17 fp16 causal gqa3 elem2", "fwd hdim16 fp16 window gqa1 vec16",
        "fwd hdim16 fp16 causal dropout gqa2 vec16", "fwd hdim16 fp16 causal sink gqa2 vec16",
        "fwd hdim16 fp16 causal softcap alibi gqa2 vec16", "fwd hdim16 fp16 full bias16 gqa2 vec16",
        "fwd hdim16 fp16 full softcap bias32 onerow gqa1 vec16",
        "fwd hdim16 fp16 causal boolmask unpaired gqa1 vec16"}) {
    CAPTURE(kernel);
    AttentionCase attention;
    attention.spec = parse_kernel_without_tile(kernel);
    attention.batch = 2;
    attention.num_heads_k = 2;
    attention.num_heads = 2 * attention.spec.group_size;
    attention.seqlen_q = 21;
    attention.seqlen_k = 30;
    const std::int64_t dims = attention.spec.head_dim;
    WatchedTensor q({2, 21, attention.num_heads, dims}, Layout::kContiguous), k({2, 30, 2, dims}, Layout::kContiguous),
        v({2, 30, 2, dims}, Layout::kContiguous);
    fill(q, CaseTensor::kQ, numbers);
    fill(k, CaseTensor::kK, numbers);
    fill(v, CaseTensor::kV, numbers);
    AttentionProblem problem{&q, &k, &v, {}};
    const std::vector<float> head_numbers = attention.head_numbers();
    const std::vector<std::uint8_t> pairs = attention.pair_bytes();
    problem.options = attention.options(head_numbers.data(), pairs.data());
    const AttentionResult expected = attention_float64(problem);
    const AttentionResult emulated = attention_emulated(problem, 0);
    const CaseReference reference(attention, numbers);
    for (std::int64_t b = 0; b < 2; ++b)
      for (std::int64_t h = 0; h < attention.num_heads; ++h)
        for (std::int64_t i = 0; i < 21; ++i) {
          const ForwardRow row = reference.forward(b, h, i);
          const auto at = static_cast<std::size_t>(((b * 21 + i) * attention.num_heads + h) * dims);
          for (std::size_t d = 0; d < static_cast<std::size_t>(dims); ++d) {
            CHECK(row.out.value[d] == doctest::Approx(expected.out[at + d]).epsilon(1e-9));
            // What fp16 has to do is within the bound, by which a missing key would not be hidden.
            CHECK(std::fabs(emulated.out[at + d] - row.out.value[d]) <= row.out.bound[d]);
            CHECK(row.out.bound[d] < 0.02);
          }
          CHECK(row.lse == doctest::Approx(expected.lse[static_cast<std::size_t>(attention.statistic_at(b, h, i))]));
        }
  }
}

TEST_CASE("gradient rows of a case are the differences of the forward pass") {
  // d(sum dout x out) / dx by central differences would need other numbers: the chain rule is checked through
  // identities instead. Rows of dV sum to those of dout; dS sums to 0 along keys, so that equal keys leave no dQ.
  const CaseNumbers numbers(6);
  AttentionCase attention;
  attention.spec = parse_kernel_without_tile("bwd_dkdv hdim16 fp16 causal gqa2 vec16");
  attention.batch = 1;
  attention.num_heads = 2;
  attention.num_heads_k = 1;
  attention.seqlen_q = attention.seqlen_k = 13;
  const CaseReference reference(attention, numbers);
  std::vector<float> lse, delta;
  for (std::int64_t h = 0; h < 2; ++h)
    for (std::int64_t i = 0; i < 13; ++i) {
      const ForwardRow row = reference.forward(0, h, i);
      lse.push_back(static_cast<float>(row.lse));
      delta.push_back(static_cast<float>(reference.delta(0, h, i, row.out.value)));
    }
  const GivenStatistics given{lse.data(), delta.data()};
  std::vector<double> dv(16, 0), dout(16, 0), q_side(2, 0);
  double k_side = 0;
  for (std::int64_t j = 0; j < 13; ++j) {
    const KeyGradientRow row = reference.dkdv(0, 0, j, given);
    for (std::size_t d = 0; d < 16; ++d) {
      dv[d] += row.dv.value[d];
      k_side += row.dk.value[d] * numbers.value(CaseTensor::kK, j * 16 + static_cast<std::int64_t>(d));
    }
  }
  for (std::int64_t i = 0; i < 13; ++i)
    for (std::int64_t h = 0; h < 2; ++h) {
      const ReferenceRow dq = reference.dq(0, h, i, given);
      for (std::size_t d = 0; d < 16; ++d) {
        const std::int64_t at = (i * 2 + h) * 16 + static_cast<std::int64_t>(d);
        dout[d] += numbers.value(CaseTensor::kDout, at);
        q_side[0] += dq.value[d] * numbers.value(CaseTensor::kQ, at);
      }
    }
  for (std::size_t d = 0; d < 16; ++d) CHECK(dv[d] == doctest::Approx(dout[d]).epsilon(1e-5));
  // A score is a product: what it gains by a longer q it gains by a longer k.
  CHECK(q_side[0] == doctest::Approx(k_side).epsilon(1e-5));
  CHECK(std::fabs(k_side) > 0.1);
}

TEST_CASE("every preset has kernels, and names itself") {
  std::set<std::string> names;
  for (const PresetLayer& layer : preset_layers()) {
    names.insert(std::string(layer.preset));
    for (const KernelKind kind : kKernelKinds) {
      const AttentionCase attention = case_of(layer, kind);
      CHECK(default_tiles(attention.spec).empty() != family_of(kind).has_head_dim(layer.head_dim));
      CHECK(attention.num_heads == attention.num_heads_k * attention.spec.group_size);
      CHECK(attention.seqlen_q == layer.seqlen_q);
    }
  }
  CHECK(names.size() >= 8);
  for (const std::string& name : names) CHECK(preset_words().find(name) != std::string::npos);
}

TEST_CASE("decode problems: 1 and 16 queries against a layer's keys, in calls that take the decode kernel") {
  const auto name = [](std::string_view word) { return std::string(word); };
  ProblemChoice choice;
  for (const PresetLayer& layer : preset_layers()) {
    choice.preset = layer.preset;
    choice.kinds = {"decode"};
    for (const AttentionCase& attention : problems_of(choice, name)) {
      CAPTURE(attention.spec.text());
      CHECK(attention.spec.kind == KernelKind::kDecode);
      CHECK((attention.seqlen_q == 1 || attention.seqlen_q == 16));
      CHECK(default_tile_chooser().takes_decode(attention.spec, problem_of(attention, 40)));
    }
    const std::size_t of_decode = problems_of(choice, name).size();
    choice.kinds = {"fwd"};
    const std::vector<AttentionCase> forward = problems_of(choice, name);
    CHECK(of_decode == 2 * forward.size());
    for (const AttentionCase& attention : forward) CHECK(attention.spec.kind == KernelKind::kForward);
  }
  choice.preset = "";
  choice.head_dims = {64};
  choice.group_sizes = {1, 4};
  choice.seqlens = {512, 2048};
  choice.kinds = {"decode"};
  std::multiset<std::int64_t> queries, keys;
  for (const AttentionCase& attention : problems_of(choice, name)) {
    queries.insert(attention.seqlen_q);
    keys.insert(attention.seqlen_k);
  }
  CHECK(queries == std::multiset<std::int64_t>{1, 1, 1, 1, 16, 16, 16, 16});
  CHECK(keys == std::multiset<std::int64_t>{512, 512, 512, 512, 2048, 2048, 2048, 2048});
}

TEST_CASE("the small problem of a decode kernel has more rows than a block, and splits, with every tile") {
  for (const int group : {1, 4, 7, 32}) {
    AttentionCase attention;
    attention.spec = parse_kernel_without_tile("decode hdim128 fp16 causal gqa" + std::to_string(group) + " vec16");
    attention.batch = 1;
    attention.num_heads = 2 * group;
    attention.num_heads_k = 2;
    attention.seqlen_q = 1;
    attention.seqlen_k = 4096;
    const AttentionCase small = small_case(attention);
    CHECK(small.num_heads == group);
    attention.spec.features.set(Feature::kPaged);
    CHECK(small_case(attention).page_size() == 16);
    for (const TileConfig& tile : tile_space(attention.spec, arch_limits(75)))
      for (const int multiprocessors : {14, 40, 68, 132}) {
        KernelSpec spec = attention.spec;
        spec.tile = tile;
        CAPTURE(spec.text());
        CAPTURE(multiprocessors);
        CHECK(small.seqlen_q * group > tile.block_m);
        CHECK(split_keys(spec, problem_of(small, multiprocessors)).count > 1);
      }
  }
}
