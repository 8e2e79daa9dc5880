// The default tiles are legal wherever they apply, and the one for small problems fills a T4 where the large one does not.
#include <doctest/doctest.h>

#include <algorithm>

#include "generator/default_tiles.h"
#include "generator/errors.h"

using namespace flash_attn_jit;

namespace {

constexpr int kT4Multiprocessors = 40;

template <class Body>
void for_every_problem(Body body) {
  for (int head_dim = 1; head_dim <= 256; ++head_dim)
    for (Mask mask : {Mask::kNone, Mask::kCausal})
      for (GlobalAccess access : {GlobalAccess::kVector16B, GlobalAccess::kElement2B}) {
        if (access == GlobalAccess::kVector16B && head_dim % 8 != 0) continue;
        KernelSpec spec;
        spec.head_dim = head_dim;
        spec.mask = mask;
        spec.access = access;
        body(spec);
      }
}

}  // namespace

TEST_CASE("every default tile and every tile of the space is legal on a T4, and the space holds the defaults") {
  const ArchLimits t4 = arch_limits(75);
  for (const KernelKind kind : kKernelKinds)
    for_every_problem([&](KernelSpec spec) {
      spec.kind = kind;
      const auto defaults = default_tiles(spec, t4);
      const auto space = tile_space(spec, t4);
      CHECK(defaults.size() >= (kind == KernelKind::kBackwardPreprocess ? 1 : 2));
      for (const TileConfig& tile : defaults) CHECK(std::binary_search(space.begin(), space.end(), tile));
      for (const TileConfig& tile : space) {
        spec.tile = tile;
        CAPTURE(spec.text());
        CHECK(check(spec, t4).value_or("legal") == "legal");
      }
    });
}

TEST_CASE("a problem that fills the device gets the large tile, a small one the small tile") {
  const ArchLimits t4 = arch_limits(75);
  for_every_problem([&](const KernelSpec& spec) {
    const auto tiles = default_tiles(spec, t4);
    CHECK(tiles.front().block_m > tiles.back().block_m);
    CHECK(choose_tile(spec, t4, {4096, 64, kT4Multiprocessors}) == tiles.front());
    CHECK(choose_tile(spec, t4, {128, 12, kT4Multiprocessors}) == tiles.back());
    CHECK(choose_tile(spec, t4, {1, 1, kT4Multiprocessors}) == tiles.back());
  });
}

TEST_CASE("there is no tile above head dim 256") {
  KernelSpec spec;
  spec.head_dim = 257;
  CHECK_THROWS_AS(choose_tile(spec, arch_limits(75), {4096, 64, kT4Multiprocessors}), UnsupportedError);
}
