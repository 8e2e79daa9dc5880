// The backward kernels in the interpreter, against float64.
#include <doctest/doctest.h>

#include <algorithm>
#include <cstdlib>
#include <vector>

#include "backward_case.h"
#include "generator/default_tiles.h"
#include "generator/legality.h"

using namespace flash_attn_jit;
using namespace flash_attn_jit::testing;

TEST_CASE("backward: edges of tiles, masks, groups, layouts and scales") {
  for (const char* text : {
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
       }) {
    CAPTURE(text);
    CHECK(run_backward_case(BackwardCase::parse(text)) == "");
  }
}

// Tiles of the backward tables and, spread over it, of the tile space.
std::vector<TileConfig> sample_of_tiles(KernelKind kind, int head_dim) {
  KernelSpec spec;
  spec.kind = kind;
  spec.head_dim = head_dim;
  std::vector<TileConfig> tiles = default_tiles(spec, arch_limits(75));
  const std::vector<TileConfig> space = tile_space(spec, arch_limits(75));
  for (std::size_t i = 0; i < space.size(); i += 7) tiles.push_back(space[i]);
  return tiles;
}

TEST_CASE("backward: tiles of every head dim class") {
  for (const int head_dim : {32, 64, 96, 128, 192, 256}) {
    const auto dkdv = sample_of_tiles(KernelKind::kBackwardDkDv, head_dim);
    const auto dq = sample_of_tiles(KernelKind::kBackwardDq, head_dim);
    for (std::size_t i = 0; i < std::max(dkdv.size(), dq.size()); ++i) {
      BackwardCase c = BackwardCase::parse(i % 2 ? "full sq70 sk150" : "causal gqa2 sq150 sk135");
      c.forward.head_dim = head_dim;
      c.dkdv_tile = dkdv[i % dkdv.size()];
      c.dq_tile = dq[i % dq.size()];
      CHECK(run_backward_case(c) == "");
    }
  }
}

TEST_CASE("backward: no queries or no keys leave gradients of zero") {
  for (const char* text : {"hdim64 full sq0 sk64", "hdim64 full sq64 sk0", "hdim64 causal sq0 sk0"}) {
    CAPTURE(text);
    CHECK(run_backward_case(BackwardCase::parse(text)) == "");
  }
}

TEST_CASE("backward: the case of FLASH_ATTN_JIT_TEST_BACKWARD_CASE") {
  if (const char* text = std::getenv("FLASH_ATTN_JIT_TEST_BACKWARD_CASE"))
    CHECK(run_backward_case(BackwardCase::parse(text)) == "");
}
