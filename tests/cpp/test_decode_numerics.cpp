// The decode kernel and the one that puts its splits together, in the interpreter against float64.
#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <random>
#include <set>
#include <string>
#include <tuple>
#include <vector>

#include "case_grid.h"
#include "generator/families/families.h"
#include "generator/key_splits.h"
#include "generator/legality.h"
#include "generator/tile_chooser.h"
#include "generator/tile_layout.h"
#include "runtime/launch/forward_launch.h"

using namespace flash_attn_jit;
using namespace flash_attn_jit::testing;

namespace {

// One split, two, some, and more than there are iterations.
constexpr std::array<std::int64_t, 4> kSplits = {1, 2, 5, 1000};

KernelSpec decode_spec(const ForwardCase& c) {
  KernelSpec spec = spec_of(c);
  spec.kind = KernelKind::kDecode;
  spec.features.set(Feature::kDropout, false);  // the kernel has none
  return spec;
}

constexpr int kTurns = 4;

// Every default tile of every head dim with every mask and kind of access, and with fewer and more of v's head dims, as
// drawn; a quarter of its tile space, another for the next head dim; features, lengths, layouts and inputs pair by
// pair, splits in turn.
std::vector<ForwardCase> decode_cases() {
  std::vector<ForwardCase> cases;
  PairwiseChoices choices;
  const auto add = [&](const Choice& fixed, const TileConfig& tile) {
    ForwardCase c = make_case(choices.next(fixed));
    c.tile = tile;
    c.dropout = 0;
    c.splits = kSplits[cases.size() % kSplits.size()];
    cases.push_back(c);
  };
  for (int i = 0; i < static_cast<int>(head_dims().size()); ++i) {
    std::set<std::tuple<bool, bool, Mask, GlobalAccess, TileConfig>> seen;
    const auto add_default_tiles = [&](const Choice& fixed) {
      const KernelSpec spec = decode_spec(make_case(choices.draw(fixed)));
      const int dims = spec.head_dim, values = spec.value_head_dim();
      for (const TileConfig& tile : default_tiles(spec))
        if (seen.emplace(values<dims, values> dims, spec.mask, spec.access, tile).second) add(fixed, tile);
    };
    for (const Choice& fixed : choices_of_tiles(i)) add_default_tiles(fixed);
    const std::vector<TileConfig> space = tile_space(decode_spec(make_case(choices.draw(only(i)))), arch_limits(75));
    for (Choice values = only(i); values[kValues] < sizes()[kValues]; ++values[kValues]) add_default_tiles(values);
    for (std::size_t t = static_cast<std::size_t>(i % kTurns); t < space.size(); t += kTurns) add(only(i), space[t]);
  }
  return cases;
}

void check_all_decode(const std::vector<ForwardCase>& cases) {
  MESSAGE(cases.size() << " cases");
  CHECK(count_faults(cases, [](const ForwardCase& c) { return run_forward_case(c).fault; }) == 0);
}

KernelSpec some_spec(std::mt19937& random) {
  KernelSpec spec;
  spec.kind = KernelKind::kDecode;
  spec.head_dim = static_cast<int>(1 + random() % 256);
  spec.group_size = 1 << random() % 4;
  const std::vector<TileConfig> tiles = tile_space(spec, arch_limits(75));
  spec.tile = tiles[random() % tiles.size()];
  return spec;
}

}  // namespace

TEST_CASE("decode: every tile, head dim, mask and feature, with one split and more") {
  check_all_decode(pick(decode_cases(), share_of_grid()));
}

TEST_CASE("decode: of one query, where v has more head dims than q, no more is read than it has") {
  check_all_decode(listed<ForwardCase>({
      "hdim64 hdimv128 sq1 sk20 gqa4 splits2 m16n16w4q128l0b0k0",
      "hdim32 hdimv128 sq1 sk20 gqa4 splits1 m16n16w4q128l0b0k0",
      "hdim96 hdimv192 sq1 sk20 gqa4",
      "hdim64 hdimv192 sq8 sk20 gqa4",
  }));
}

TEST_CASE("decode: a sink counts once, however many splits there are and whatever they see") {
  std::vector<std::string> texts;
  for (const std::string problem : {
           "hdim64 causal sq70 sk30 gqa2 headsk2 sink-1",  // rows that see no key
           "hdim128 causal sq7 sk300 gqa2 headsk2 sink2 rising3",
           "hdim64 sq2 sk500 gqa8 sink1e30",
       })
    for (const std::int64_t splits : kSplits) texts.push_back(problem + " splits" + std::to_string(splits));
  check_all_decode(listed<ForwardCase>(texts));
}

TEST_CASE("decode: the same bits every time") {
  for (const char* text : {"hdim64 sq1 sk900 gqa4 splits5", "hdim128 causal sq7 sk300 gqa2 splits2 rising3"}) {
    ForwardTensors first(ForwardCase::parse(text)), second(ForwardCase::parse(text));
    forward_in_interpreter(first.request());
    forward_in_interpreter(second.request());
    CHECK(first.out.memory() == second.out.memory());
    CHECK(first.lse == second.lse);
  }
}

TEST_CASE("splits: every key once, in whole steps of a block's warps, as many as asked for at the most") {
  std::mt19937 random(1);
  for (int i = 0; i < 20'000; ++i) {
    const KernelSpec spec = some_spec(random);
    const auto size = [&](int most) { return std::int64_t{1} << random() % most; };
    const std::int64_t seqlen_k = (random() % 8 == 0 ? 0 : size(30)) + static_cast<std::int64_t>(random() % 3);
    const Problem problem{size(6), seqlen_k, size(10) * spec.group_size, static_cast<int>(1 + random() % 200), 0};
    const std::int64_t asked = random() % 2 == 0 ? 0 : static_cast<std::int64_t>(random() % 300);
    const KeySplits splits = split_keys(spec, problem, asked);
    CAPTURE(spec.text());
    CAPTURE(seqlen_k);
    CAPTURE(asked);
    CAPTURE(splits.count);
    CAPTURE(splits.keys);
    REQUIRE(splits.count >= 1);
    REQUIRE(splits.count <= kMostKeySplits);
    REQUIRE(splits.keys % columns_of_iteration(spec) == 0);
    REQUIRE(std::int64_t{splits.count} * splits.keys >= problem.seqlen_k);
    REQUIRE(std::int64_t{splits.count - 1} * splits.keys <= std::max<std::int64_t>(0, problem.seqlen_k - 1));
    if (asked > 0) REQUIRE(splits.count <= asked);
  }
}

TEST_CASE("splits: one sequence fills a T4, a full card is not split") {
  KernelSpec spec;
  spec.kind = KernelKind::kDecode;
  spec.head_dim = 128;
  spec.group_size = 4;
  spec.tile = default_tiles(spec).front();
  const auto blocks = [&](std::int64_t batch, std::int64_t seqlen_k) {
    const Problem problem{1, seqlen_k, batch * 32, 40, 0};
    return decode_row_blocks(spec, problem) * split_keys(spec, problem).count;
  };
  CHECK(blocks(1, 8192) >= 72);  // of 80 at once
  CHECK(blocks(1, 8192) <= 80);
  CHECK(blocks(64, 8192) == 64 * 8);
  CHECK(blocks(1, 64) == 8);  // one iteration
}

TEST_CASE("which kernel: few rows take the decode kernel, many the forward kernel") {
  const auto decodes = [](int head_dim, int group, std::int64_t seqlen_q, std::int64_t seqlen_k, std::int64_t batch) {
    KernelSpec spec;
    spec.head_dim = head_dim;
    spec.group_size = group;
    return default_tile_chooser().takes_decode(spec, {seqlen_q, seqlen_k, batch * 32, 40, 0});
  };
  for (const int head_dim : {64, 128, 256})
    for (const int group : {1, 4, 8})
      for (const std::int64_t seqlen_k : {1024, 8192, 65536})
        for (const std::int64_t batch : {1, 8}) {
          CAPTURE(head_dim);
          CAPTURE(group);
          CAPTURE(seqlen_k);
          CAPTURE(batch);
          CHECK(decodes(head_dim, group, 1, seqlen_k, batch));
          CHECK_FALSE(decodes(head_dim, group, 512, seqlen_k, batch));
        }
}
