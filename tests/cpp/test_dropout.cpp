// The bits of dropout: what makes them against published numbers, their statistics, and that kernels find the same on
// every layout of a warp's tile.
#include <doctest/doctest.h>

#include <array>
#include <cmath>
#include <string>
#include <vector>

#include "backward_case.h"
#include "case_grid.h"
#include "containing.h"
#include "generator/legality.h"
#include "runtime/tuner/dropout_bits.h"

using namespace flash_attn_jit;
using namespace flash_attn_jit::testing;

namespace {

DropoutBits bits_of(int seed, double p) {
  const std::array<int, 2> halves = {seed, 17};
  return {halves.data(), p};
}

// Of a binomial number of n, in standard deviations: 5 come by once in 2 million.
double deviation(double count, double n, double share) {
  return std::fabs(count - n * share) / std::sqrt(n * share * (1 - share));
}

}  // namespace

TEST_CASE("dropout: Philox of 7 rounds gives the numbers that Random123 publishes") {
  using Words = std::array<std::uint32_t, 4>;
  CHECK(philox({0, 0, 0, 0}, {0, 0}) == Words{0x5f6fb709, 0x0d893f64, 0x4f121f81, 0x4f730a48});
  constexpr std::uint32_t kOnes = 0xffffffff;
  CHECK(philox({kOnes, kOnes, kOnes, kOnes}, {kOnes, kOnes}) == Words{0x5207ddc2, 0x45165e59, 0x4d8ee751, 0x8c52f662});
  CHECK(philox({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}) ==
        Words{0x4dfccaba, 0x190a87f0, 0xc47362ba, 0xb6b5242a});
}

TEST_CASE("dropout: p counts in steps of 2^-16, one at least and one less than all") {
  CHECK(bits_of(1, 0.5).kept == 32768);
  CHECK(bits_of(1, 0.1).kept == 58982);
  CHECK(bits_of(1, 1e-9).kept == 65535);
  CHECK(bits_of(1, 1 - 1e-9).kept == 1);
  CHECK(bits_of(1, 0.75).scale() == 4);
}

TEST_CASE("dropout: as many are kept as p says, whatever the place") {
  constexpr int kSide = 256;
  for (const double p : {0.1, 0.5, 0.9, 0x1p-7}) {
    CAPTURE(p);
    const DropoutBits bits = bits_of(3, p);
    const double share = bits.kept / 65536.0;
    std::array<double, kSide> of_query{}, of_key{};
    double all = 0;
    for (int i = 0; i < kSide; ++i)
      for (int j = 0; j < kSide; ++j) {
        const bool keeps = bits.keep(5, i, j);
        of_query[static_cast<std::size_t>(i)] += keeps;
        of_key[static_cast<std::size_t>(j)] += keeps;
        all += keeps;
      }
    CHECK(deviation(all, kSide * kSide, share) < 5);
    for (int i = 0; i < kSide; ++i) {
      CHECK(deviation(of_query[static_cast<std::size_t>(i)], kSide, share) < 6);
      CHECK(deviation(of_key[static_cast<std::size_t>(i)], kSide, share) < 6);
    }
  }
}

TEST_CASE("dropout: neighbours, heads, cells and seeds have nothing to do with each other") {
  constexpr int kSide = 200;
  const DropoutBits bits = bits_of(3, 0.3), other_seed = bits_of(4, 0.3);
  const double share = bits.kept / 65536.0, alike = share * share + (1 - share) * (1 - share);
  struct Step {
    int head, query, key;
  };
  // Of one cell: the next key, the query that shares it; and what lies one cell on in every direction.
  for (const Step step : {Step{0, 0, 1}, Step{0, 8, 0}, Step{0, 1, 0}, Step{0, 16, 0}, Step{0, 0, 16}, Step{1, 0, 0},
                          Step{0, 0, 8}, Step{0, 8, 16}}) {
    CAPTURE(step.head);
    CAPTURE(step.query);
    CAPTURE(step.key);
    double equal = 0;
    for (int i = 0; i < kSide; ++i)
      for (int j = 0; j < kSide; ++j)
        equal += bits.keep(2, i, j) == bits.keep(2 + step.head, i + step.query, j + step.key);
    CHECK(deviation(equal, kSide * kSide, alike) < 5);
  }
  double equal = 0;
  for (int i = 0; i < kSide; ++i)
    for (int j = 0; j < kSide; ++j) equal += bits.keep(2, i, j) == other_seed.keep(2, i, j);
  CHECK(deviation(equal, kSide * kSide, alike) < 5);
}

TEST_CASE("dropout: on every layout of a warp's tile, of lanes whose keys are neighbours and of others") {
  std::vector<BackwardCase> cases;
  for (const BiasCase bias : {BiasCase::kOff, BiasCase::kHalf, BiasCase::kFloatUnpaired})
    for (const int row_tiles : {1, 2})
      for (int columns = 8; columns <= 64; columns += 8) {
        BackwardCase c;
        c.forward = ForwardCase::parse("hdim16 headsk2 sq136 sk152 dropout0.3");
        c.forward.bias = bias;
        const TileConfig tile{
            .block_m = 32 * row_tiles, .block_n = columns, .warps = 2, .register_dims = 16, .schedule = {0, 8, 8}};
        KernelSpec spec = spec_of(c.forward);
        spec.tile = tile;
        if (!check(spec, arch_limits(75))) c.forward.tile = tile;
        for (const auto& [kind, of_case] :
             {std::pair{KernelKind::kBackwardDkDv, &c.dkdv_tile}, std::pair{KernelKind::kBackwardDq, &c.dq_tile}}) {
          spec.kind = kind;
          if (!check(spec, arch_limits(75))) *of_case = tile;
        }
        if (c.dkdv_tile || c.dq_tile) cases.push_back(c);
      }
  REQUIRE(cases.size() > 20);
  const Share share = runs_whole_grids() ? Share{0, 1} : Share{1, 3};
  CHECK(count_faults(pick(cases, share), [](const BackwardCase& c) {
          return run_forward_case(c.forward).fault + run_backward_case(c);
        }) == 0);
}

TEST_CASE("dropout: one kernel that has all keys, groups, sequences, shares near 0 and 1") {
  for (const char* text :
       {"hdim64 full sq70 sk60 headsk2 dropout0.2 allkeys:m64n16w4q64l0b8k8",
        "hdim64 causal gqa2 sq130 sk100 dropout0.1 varlen3 dlse", "hdim128 full gqa4 sq70 sk150 dropout0.9 sink0.5",
        "hdim33 causal headsk2 sq90 sk60 dropout0.00001", "hdim64 window20,5 headsk2 sq300 sk300 dropout0.5",
        "hdim64 full headsk2 sq70 sk60 dropout0.99999", "hdim256 causal sq65 sk129 dropout0.25"}) {
    const BackwardCase c = BackwardCase::parse(text);
    CHECK(run_forward_case(c.forward).fault + run_backward_case(c) == "");
  }
}

TEST_CASE("dropout: the decode kernel has none, and few queries take the forward kernel") {
  KernelSpec spec;
  spec.kind = KernelKind::kDecode;
  spec.head_dim = 64;
  spec.features = {Feature::kDropout};
  spec.tile = {.block_m = 16, .block_n = 16, .warps = 4, .register_dims = 64, .schedule = {0, 0, 0}};
  CHECK(check(spec, arch_limits(75)).value_or("") == Containing{"kind decode comes with dropout; accepted: kind fwd"});
  const ForwardCase c = ForwardCase::parse("hdim64 gqa4 sq1 sk500 dropout0.1");
  CHECK(run_forward_case(c).fault == "");
}

TEST_CASE("dropout: a p that is no share is named") {
  for (const double p : {-0.1, 1.0, 1.5, std::nan("")}) {
    ForwardCase c = ForwardCase::parse("hdim64 sq5 sk5");
    c.dropout = 0.5;
    ForwardTensors t(c);
    t.options.dropout->p = p;
    CHECK_THROWS_WITH_AS(plan_forward(t.request(), {arch_limits(75), 40, default_tile_chooser()}),
                         doctest::Contains("dropout_p is "), Error);
  }
}
