// The backward kernels in the interpreter, against float64.
#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "backward_case.h"
#include "case_grid.h"
#include "generator/legality.h"
#include "generator/tile_chooser.h"

using namespace flash_attn_jit;
using namespace flash_attn_jit::testing;

namespace {

const std::vector<std::string> kEdges = {
    "hdim64 full sq64 sk64",
    "hdim64 full gqa2 headsk2 batch2 sq129 sk127",
    "hdim64 causal sq257 sk257",
    "hdim64 causal gqa4 sq65 sk257",
    "hdim64 causal gqa7 sq257 sk65 rowgaps",
    "hdim64 full sq1 sk1",
    "hdim64 full headsk2 sq8 sk8",
    "hdim64 causal headsk2 sq5 sk70",
    "hdim64 causal headsk2 sq70 sk5",
    "hdim64 causal sq1 sk129 transposed",
    "hdim32 full sq63 sk300 scale-0.3",
    "hdim32 causal sq300 sk300 rising4",
    "hdim96 full gqa2 sq70 sk140",
    "hdim80 causal sq140 sk70",
    "hdim128 full sq130 sk260",
    "hdim128 causal gqa2 sq260 sk130",
    "hdim128 full sq64 sk64 thousand",
    "hdim72 full sq50 sk90",
    "hdim33 causal sq70 sk70",
    "hdim64 full sq64 sk64 oddstrides",
    "hdim64 causal sq65 sk129 misaligned gqa2",
    "hdim160 full sq40 sk70",
    "hdim192 causal sq70 sk70",
    "hdim256 full sq70 sk40",
    "hdim256 causal gqa2 sq33 sk65",
    "hdim136 full sq20 sk20",
    "hdim1 causal sq65 sk65",
    "hdim8 full sq65 sk65",
    "hdim64 full sq64 sk64 scale0",
    "hdim64 full sq64 sk64 dout1024",
    "hdim64 window20,0 sq300 sk300",
    "hdim64 window5,7 gqa2 sq150 sk230",
    "hdim32 window-1,9 sq200 sk150",
    "hdim64 window40,-1 sq150 sk200",
    "hdim64 full softcap5 sq70 sk130",
    "hdim64 full softcap1e6 sq70 sk130",
    "hdim64 causal softcap1e-3 sq70 sk130",
    "hdim64 causal alibi gqa2 batch2 sq70 sk130",
    "hdim128 window30,3 alibibatch softcap5 varlen4 sq170 sk190",
    "hdim64 causal varlen5 gqa2 sq150 sk230",
    "hdim64 full gqa2 sq70 sk70 doutapart",
    "hdim128 causal sq70 sk90 doutexpanded",
    "hdim33 full varlen3 sq40 sk50 doutapart",
};

std::vector<TileConfig> backward_tiles(KernelKind kind, const ForwardCase& c) {
  KernelSpec spec;
  spec.kind = kind;
  spec.set_head_dims(c.head_dim, c.value_head_dim());
  spec.mask = c.mask;
  return tile_space(spec, arch_limits(75));
}

// The i-th tiles of the case's tile spaces.
BackwardCase with_tiles(const ForwardCase& c, std::size_t i) {
  const auto dkdv = backward_tiles(KernelKind::kBackwardDkDv, c), dq = backward_tiles(KernelKind::kBackwardDq, c);
  return {.forward = c, .dkdv_tile = dkdv[i % dkdv.size()], .dq_tile = dq[i % dq.size()]};
}

std::size_t most_tiles(const ForwardCase& c) {
  return std::max(backward_tiles(KernelKind::kBackwardDkDv, c).size(),
                  backward_tiles(KernelKind::kBackwardDq, c).size());
}

// The default tiles of dK/dV and of dQ for a case's problem, large problems' first.
std::vector<BackwardCase> with_default_tiles(const ForwardCase& c) {
  KernelSpec spec = spec_of(c);
  spec.kind = KernelKind::kBackwardDkDv;
  const auto dkdv = default_tiles(spec);
  spec.kind = KernelKind::kBackwardDq;
  const auto dq = default_tiles(spec);
  std::vector<BackwardCase> cases;
  for (std::size_t i = 0; i < std::max(dkdv.size(), dq.size()); ++i)
    cases.push_back(
        {.forward = c, .dkdv_tile = dkdv[std::min(i, dkdv.size() - 1)], .dq_tile = dq[std::min(i, dq.size() - 1)]});
  return cases;
}

constexpr std::array kDoutLayouts = {DoutLayout::kLikeQ, DoutLayout::kApart, DoutLayout::kExpanded};

// Every default tile with what it is for, then tiles of the space in turn, until every two choices have met.
std::vector<BackwardCase> pairwise_backward_cases() {
  std::vector<BackwardCase> cases;
  PairwiseChoices choices;
  std::set<std::pair<TileConfig, TileConfig>> seen;
  for (int d = 0; d < static_cast<int>(head_dims().size()); ++d)
    for (const Choice& fixed : choices_of_tiles(d))
      for (const BackwardCase& c : with_default_tiles(make_case(choices.draw(fixed))))
        if (seen.emplace(*c.dkdv_tile, *c.dq_tile).second)
          cases.push_back({.forward = make_case(choices.next(fixed)), .dkdv_tile = c.dkdv_tile, .dq_tile = c.dq_tile});
  for (std::size_t i = 0; !choices.all_covered(); ++i)
    cases.push_back(with_tiles(make_case(choices.next(only(-1))), 7 * i));
  for (std::size_t i = 0; i < cases.size(); ++i) {
    cases[i].dout_layout = kDoutLayouts[i / 4 % kDoutLayouts.size()];
    cases[i].shares_out = i / 2 % 2 == 0;
  }
  return cases;
}

// Where a block has all keys: every head dim with every mask's choices and every number of keys that a tile has, tiles
// of the space in turn.
std::vector<BackwardCase> all_keys_cases() {
  std::vector<BackwardCase> cases;
  PairwiseChoices choices;
  std::size_t turn = 0;
  for (int d = 0; d < static_cast<int>(head_dims().size()); ++d)
    for (int visible = 0; visible < sizes()[kVisible]; ++visible) {
      Choice fixed = only(d);
      fixed[kVisible] = visible;
      fixed[kValues] = (d + visible) % 4;  // up to 128
      fixed[kSeqlenK] = (d + visible) % sizes()[kSeqlenK];
      const ForwardCase c = make_case(choices.next(fixed));
      std::vector<TileConfig> tiles = backward_tiles(KernelKind::kBackwardAllKeys, c);
      std::erase_if(tiles, [&](const TileConfig& tile) { return tile.block_m < c.seqlen_k; });
      if (tiles.empty()) continue;
      cases.push_back({.forward = c,
                       .all_keys_tile = tiles[7 * turn % tiles.size()],
                       .dout_layout = kDoutLayouts[turn / 4 % kDoutLayouts.size()]});
      ++turn;
    }
  return cases;
}

// Every tile of dK/dV and of dQ with a head dim and a mask that have it; the masks take turns.
std::vector<BackwardCase> all_backward_tiles() {
  std::vector<BackwardCase> cases;
  PairwiseChoices choices;
  std::set<TileConfig> dkdv_seen, dq_seen;
  const auto draw = [&](int d, int visible) {
    Choice fixed = only(d);
    fixed[kVisible] = visible;
    return make_case(choices.draw(fixed));
  };
  const int masks = sizes()[kVisible];
  for (int d = 0; d < static_cast<int>(head_dims().size()); ++d) {
    std::size_t tiles = 0;
    for (int visible = 0; visible < masks; ++visible) tiles = std::max(tiles, most_tiles(draw(d, visible)));
    for (int i = 0; i < static_cast<int>(tiles); ++i)
      for (int turn = 0; turn < masks; ++turn) {
        const BackwardCase c = with_tiles(draw(d, (i + turn) % masks), i);
        const bool new_dkdv = dkdv_seen.insert(*c.dkdv_tile).second;
        if (dq_seen.insert(*c.dq_tile).second || new_dkdv) cases.push_back(c);
      }
  }
  return cases;
}

void check_all_backward(const std::vector<BackwardCase>& cases) {
  MESSAGE(cases.size() << " cases");
  CHECK(count_faults(cases, run_backward_case) == 0);
}

}  // namespace

TEST_CASE("backward: edges of tiles, masks, groups, layouts and scales (FLASH_ATTN_JIT_TEST_ALL=1)") {
  if (tests_all()) check_all_backward(listed<BackwardCase>(kEdges));
}

TEST_CASE("backward: every head dim, length, mask, layout and input, pair by pair") {
  check_all_backward(pick_of_grid(pairwise_backward_cases()));
}

TEST_CASE("backward: blocks with all keys, of every head dim, mask and number of keys") {
  check_all_backward(pick_of_grid(all_keys_cases()));
}

TEST_CASE("backward: every tile (FLASH_ATTN_JIT_TEST_ALL=1)") {
  if (runs_whole_grids()) check_all_backward(all_backward_tiles());
}

TEST_CASE("backward: every head dim and mask with every length (FLASH_ATTN_JIT_TEST_ALL=1)") {
  if (!runs_whole_grids()) return;
  std::vector<BackwardCase> cases;
  for (const Choice& choice : lengths_and_masks()) cases.push_back({.forward = make_case(choice)});
  check_all_backward(cases);
}

TEST_CASE("backward: sinks beside a gradient of softmax_lse, and among scores of a thousand") {
  check_all_backward(listed<BackwardCase>({
      "hdim64 causal headsk2 sq230 sk60 sink1 dlse",
      "hdim33 causal varlen4 gqa2 sq90 sk60 sink-1 dlse",
      "hdim64 full headsk2 sq70 sk60 sink990 thousand",
  }));
}

// Some in one kernel, which has all keys, some in three.
TEST_CASE("backward: softmax_lse has a gradient") {
  check_all_backward(listed<BackwardCase>({
      "hdim64 full sq70 sk60 dlse",
      "hdim64 causal gqa2 batch2 sq170 sk230 dlse",
      "hdim128 causal headsk2 sq150 sk140 dlse",
      "hdim64 causal gqa2 sq170 sk60 rowgaps dlse dout64",
      "hdim33 causal varlen4 gqa2 sq90 sk60 dlse",
      "hdim32 window9,3 softcap5 sq170 sk60 dlse doutexpanded",
      "hdim96 causal varlen5 alibi sq140 sk230 dlse",
      "hdim256 full sq33 sk65 dlse",
  }));
}

// Behind one kernel that has all keys, or three. The grids have more.
TEST_CASE("backward: attn_bias has a gradient") {
  for (const char* const text : {
           "hdim64 full gqa2 batch2 sq70 sk60 bias16unpaired",
           "hdim64 causal gqa2 batch3 sq170 sk230 bias16unpaired sharesout",
           "hdim33 causal varlen4 gqa2 sq90 sk200 bias32keys dlse",
           "hdim128 window9,30 softcap5 headsk2 alibi sq170 sk160 bias32keys sharesout",
           "hdim64 causal varlen5 gqa3 sq90 sk72 bias16 sink1",
           "hdim256 window20,-1 gqa3 sq33 sk64 bias16",
           "hdim32 full gqa2 sq70 sk90 bias32unpaired dbias:m64n24w2q16l0b0k0",
       })
    CHECK(run_backward_case(BackwardCase::parse(text)) == "");
}

// 2^-40 to 2^20, in one kernel that has all keys, in three, with what else goes into delta.
TEST_CASE("backward: gradients of bfloat16 tensors may have any size") {
  check_all_backward(listed<BackwardCase>({
      "bf16 hdim64 full sq70 sk60 dout9.0949470177292824e-13",
      "bf16 hdim64 causal gqa2 batch2 sq170 sk230 dout9.0949470177292824e-13 dlse",
      "bf16 hdim128 causal headsk2 sq150 sk140 dout1048576",
      "bf16 hdim64 causal gqa2 sq170 sk60 rowgaps dout1e-8 dlse",
      "bf16 hdim33 causal varlen4 gqa2 sq90 sk60 dout1048576 sink1",
      "bf16 hdim96 causal varlen5 alibi sq140 sk230 dout1e-8",
      "bf16 hdim256 full sq33 sk65 dout9.0949470177292824e-13 dropout0.3",
      "bf16 hdim64 full gqa2 sq70 sk230 bias16unpaired sharesout dout1e-8",
  }));
}

TEST_CASE("backward: a case's text parses back") {
  for (const BackwardCase& c : pairwise_backward_cases()) REQUIRE(BackwardCase::parse(c.text()).text() == c.text());
}

TEST_CASE("backward: no queries or no keys leave gradients of zero") {
  for (const char* text :
       {"hdim64 full sq0 sk64", "hdim64 full sq64 sk0", "hdim64 causal sq0 sk0", "hdim64 full sq0 sk64 bias32keys",
        "hdim64 full sq64 sk0 bias16", "hdim64 full sq63 sk64 varlen5 boolmaskunpaired",
        "hdim64 gqa2 sq63 sk40 varlen5 bias16 sink1"}) {
    CAPTURE(text);
    CHECK(run_backward_case(BackwardCase::parse(text)) == "");
  }
}

TEST_CASE("backward: the case of FLASH_ATTN_JIT_TEST_BACKWARD_CASE") {
  if (const char* text = std::getenv("FLASH_ATTN_JIT_TEST_BACKWARD_CASE"))
    CHECK(run_backward_case(BackwardCase::parse(text)) == "");
}
