// The forward kernel in the interpreter against float64.
//
// One case from the shell, with the templates as they lie in the source tree:
//
//   export FLASH_ATTN_JIT_TEMPLATES=$PWD/templates
//   export FLASH_ATTN_JIT_TEST_CASE="hdim128 causal gqa2 sq257 sk129"
//   build/flash_attn_jit_tests -tc="the case of*"
//
// It prints errors, bounds and the interpreter's report. Words: see ForwardCase::text(), a tile among
// them; none is needed.
#include <doctest/doctest.h>

#include <cstdlib>
#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "case_grid.h"
#include "generator/legality.h"
#include "generator/tile_chooser.h"
#include "runtime/interpreter/interpreter.h"

using namespace flash_attn_jit;
using namespace flash_attn_jit::testing;

namespace {

ForwardCase with_tile(const Choice& choice, std::optional<TileConfig> tile) {
  ForwardCase c = make_case(choice);
  c.tile = tile;
  return c;
}

// The default tiles of a head dim, each with the mask, the features and the layout that it is for: what the library
// runs by itself.
void add_default_tiles(int head_dim, PairwiseChoices& choices, std::vector<ForwardCase>& cases) {
  std::set<std::pair<Mask, TileConfig>> seen;
  for (const Choice& fixed : choices_of_tiles(head_dim)) {
    const ForwardCase drawn = make_case(choices.draw(fixed));
    for (const TileConfig& tile : default_tiles(spec_of(drawn)))
      if (seen.emplace(drawn.mask, tile).second) cases.push_back(with_tile(choices.next(fixed), tile));
  }
}

// Every default tile with what it is for, every tile of the tile space with some head dim, and every two
// choices with each other.
std::vector<ForwardCase> pairwise_forward_cases() {
  std::vector<ForwardCase> cases;
  PairwiseChoices choices;
  std::set<TileConfig> seen;
  for (int i = 0; i < static_cast<int>(head_dims().size()); ++i) {
    add_default_tiles(i, choices, cases);
    for (const TileConfig& tile : tiles_of(head_dims()[i]))
      if (seen.insert(tile).second) cases.push_back(with_tile(choices.next(only(i)), tile));
  }
  while (!choices.all_covered()) cases.push_back(make_case(choices.next(only(-1))));
  return cases;
}

void check_all_forward(const std::vector<ForwardCase>& cases) {
  MESSAGE(cases.size() << " cases");
  CHECK(count_faults(cases, [](const ForwardCase& c) { return run_forward_case(c).fault; }) == 0);
}

}  // namespace

TEST_CASE("the case of FLASH_ATTN_JIT_TEST_CASE") {
  const char* text = std::getenv("FLASH_ATTN_JIT_TEST_CASE");
  if (text == nullptr) return;
  const ForwardCase c = ForwardCase::parse(text);
  const ForwardOutcome outcome = run_forward_case(c);
  MESSAGE(c.text() << "\nout error " << outcome.out_error << " bound " << outcome.out_bound << "\nlse error "
                   << outcome.lse_error << " bound " << outcome.lse_bound << "\n"
                   << last_interpreter_report().text());
  CHECK(outcome.fault == "");
}

TEST_CASE("a case's text parses back") {
  for (const ForwardCase& c : pairwise_forward_cases()) REQUIRE(ForwardCase::parse(c.text()).text() == c.text());
}

TEST_CASE("forward: every tile, head dim, length, layout and input, pair by pair") {
  check_all_forward(pick_of_grid(pairwise_forward_cases()));
}

TEST_CASE("forward: sinks far above the scores and far below them, and among scores of a thousand") {
  check_all_forward(listed<ForwardCase>({
      "hdim64 headsk2 sq64 sk64 sink990 thousand",
      "hdim64 causal headsk2 sq70 sk50 sink-200",
      "hdim64 causal headsk2 sq70 sk50 sink1e30",
      "hdim64 causal headsk2 sq70 sk50 sink-1e30",
      "hdim32 headsk2 sq70 sk0 sink60",
  }));
}

TEST_CASE("forward: every head dim and mask with every length (FLASH_ATTN_JIT_TEST_ALL=1)") {
  if (!runs_whole_grids()) return;
  std::vector<ForwardCase> cases;
  for (const Choice& choice : lengths_and_masks()) cases.push_back(make_case(choice));
  check_all_forward(cases);
}
