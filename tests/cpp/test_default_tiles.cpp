// The default tiles are legal wherever they apply, and the one for small problems fills a T4 where the large one does not.
#include <doctest/doctest.h>

#include <algorithm>

#include "generator/errors.h"
#include "generator/families/families.h"
#include "generator/tile_chooser.h"

using namespace flash_attn_jit;

namespace {

constexpr int kT4Multiprocessors = 40;

TileConfig chosen(const KernelSpec& spec, const Problem& problem) {
  return default_tile_chooser().choose(spec, problem);
}

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
      const auto defaults = default_tiles(spec);
      const auto space = tile_space(spec, t4);
      CHECK(defaults.size() >= (family_of(kind).products == 0 ? 1 : 2));  // without a main loop one will do
      for (const TileConfig& tile : defaults) CHECK(std::binary_search(space.begin(), space.end(), tile));
      for (const TileConfig& tile : space) {
        spec.tile = tile;
        CAPTURE(spec.text());
        CHECK(check(spec, t4).value_or("legal") == "legal");
      }
    });
}

TEST_CASE("a problem that fills the device gets the large tile, a small one the small tile") {
  for_every_problem([&](const KernelSpec& spec) {
    const auto tiles = default_tiles(spec);
    CHECK(tiles.front().block_m > tiles.back().block_m);
    CHECK(chosen(spec, {4096, 4096, 64, kT4Multiprocessors}) == tiles.front());
    CHECK(chosen(spec, {128, 128, 12, kT4Multiprocessors}) == tiles.back());
    CHECK(chosen(spec, {1, 1, 1, kT4Multiprocessors}) == tiles.back());
  });
}

TEST_CASE(
    "rows that a tile computes for nothing count: where the large tile would stand half empty, another is chosen") {
  for (const KernelKind kind : {KernelKind::kForward, KernelKind::kBackwardDkDv, KernelKind::kBackwardDq}) {
    KernelSpec spec;
    spec.kind = kind;
    spec.head_dim = 64;
    const TileConfig large = default_tiles(spec).front();
    REQUIRE(large.block_m == 256);
    for (const int multiprocessors : {kT4Multiprocessors, 132}) {
      CHECK(chosen(spec, {128, 128, 384, multiprocessors}).block_m <= 128);
      CHECK(chosen(spec, {256, 256, 3960, multiprocessors}) == large);
    }
    // The rows are keys where dK and dV are made, and there is a block for each key head.
    const bool owns_keys = kind == KernelKind::kBackwardDkDv;
    CHECK((chosen(spec, {4096, 128, 384, kT4Multiprocessors}) == large) == !owns_keys);
    CHECK((chosen(spec, {128, 4096, 384, kT4Multiprocessors}) == large) == owns_keys);
    spec.group_size = 8;
    CHECK((chosen(spec, {256, 256, 40, kT4Multiprocessors}) == large) == !owns_keys);
  }
}

TEST_CASE("there is no tile above head dim 256") {
  KernelSpec spec;
  spec.head_dim = 257;
  CHECK_THROWS_AS(chosen(spec, {4096, 4096, 64, kT4Multiprocessors}), UnsupportedError);
}
