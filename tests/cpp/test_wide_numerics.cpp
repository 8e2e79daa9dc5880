// The forward kernel of head dims above 256, in the interpreter against float64.
#include <doctest/doctest.h>

#include <algorithm>
#include <set>
#include <tuple>
#include <vector>

#include "case_grid.h"
#include "containing.h"
#include "generator/errors.h"
#include "generator/legality.h"
#include "generator/tile_chooser.h"
#include "generator/tile_layout.h"
#include "runtime/system/sanitizers.h"

using namespace flash_attn_jit;
using namespace flash_attn_jit::testing;

namespace {

KernelSpec wide_spec(int head_dim) {
  KernelSpec spec;
  spec.kind = KernelKind::kForwardWide;
  spec.head_dim = head_dim;
  spec.access = head_dim % 8 == 0 ? GlobalAccess::kVector16B : GlobalAccess::kElement2B;
  return spec;
}

// The greatest head dim of every class that the code tells apart: how many dims a warp has, whether they are all the
// caller's, whether rows can be read 16 bytes at a time, whether the last dim stands alone in its pair.
std::vector<int> wide_head_dims() {
  std::set<std::tuple<int, bool, bool, bool>> classes;
  std::vector<int> dims;
  for (int d = kMostHeadDim; d > kMostNarrowHeadDim; --d) {
    const int padded = kernel_dims(wide_spec(d));
    if (classes.emplace(padded, d == padded, d % 8 == 0, d % 2 == 0).second) dims.push_back(d);
  }
  dims.push_back(kMostNarrowHeadDim + 1);
  return dims;
}

// Every two choices with each other; the head dims of other kernels stand for those of this one.
std::vector<ForwardCase> wide_cases() {
  const std::vector<int> dims = wide_head_dims();
  std::vector<ForwardCase> cases;
  PairwiseChoices choices;
  while (!choices.all_covered()) {
    const Choice choice = choices.next(only(-1));
    cases.push_back(make_case(choice));
    cases.back().head_dim = dims[static_cast<std::size_t>(choice[kDimChoice]) % dims.size()];
    cases.back().head_dim_v = 0;
  }
  return cases;
}

void check_all_wide(const std::vector<ForwardCase>& cases) {
  MESSAGE(cases.size() << " cases");
  CHECK(count_faults(cases, [](const ForwardCase& c) { return run_forward_case(c).fault; }) == 0);
}

}  // namespace

TEST_CASE("wide: every head dim, mask, feature, length, layout and input, pair by pair") {
  const std::vector<ForwardCase> cases = wide_cases();  // each of which takes a second under sanitizers
  check_all_wide(kAddressSanitizer ? pick(cases, share_of_grid()) : pick_of_grid(cases));
}

TEST_CASE("wide: where tiles of 8 keys begin and end") {
  std::vector<ForwardCase> cases;
  for (const std::string mask : {"full", "causal", "window3,2", "window0,0", "window-1,9"})
    for (const int keys : {1, 7, 8, 9, 15, 16, 17, 24, 25, 31})
      cases.push_back(ForwardCase::parse("hdim264 " + mask + " sq33 sk" + std::to_string(keys)));
  check_all_wide(pick(cases, share_of_few()));
}

TEST_CASE("wide: sinks far above the scores and far below them, and rows without keys") {
  check_all_wide(listed<ForwardCase>({
      "hdim512 headsk2 sq64 sk64 sink990 thousand",
      "hdim264 causal headsk2 sq70 sk50 sink-200",
      "hdim264 causal headsk2 sq70 sk50 sink1e30",
      "hdim320 headsk2 sq70 sk0 sink60",
      "hdim320 causal sq70 sk3",
  }));
}

TEST_CASE("wide: one and two groups of warps, queries in shared memory, and every place of loads and stores") {
  std::vector<ForwardCase> cases;
  for (const std::string tile : {"m32n8w4q128l2b2k8", "m64n8w8q112l2b2k8", "m64n8w8q128l0b0k0", "m64n8w8q128l8b8k8",
                                 "m64n8w8q128l8b0k4", "m64n8w8q128l5b3k2", "m32n8w4q64l1b0k8"})
    for (const std::string mask : {"full", "causal", "window40,9"})
      cases.push_back(ForwardCase::parse("hdim512 " + mask + " sq70 sk100 rising9 " + tile));
  check_all_wide(pick(cases, share_of_few()));
}

TEST_CASE("wide: tiles that are none are refused") {
  const auto reason = [](const char* tile) {
    KernelSpec spec = wide_spec(512);
    spec.tile = TileConfig::parse(tile);
    return check(spec, arch_limits(75)).value_or("");
  };
  CHECK(reason("m64n8w8q128l2b2k8") == "");
  CHECK(reason("m64n8w4q128l2b2k8") == Containing{"64 rows for 4 warps; accepted: 32 rows for every four warps"});
  CHECK(reason("m48n8w6q128l2b2k8") == Containing{"48 rows for 6 warps"});
  CHECK(reason("m64n16w8q128l2b2k8") == Containing{"16 keys an iteration; accepted: 8"});
  CHECK(reason("m64n8w8q144l2b2k8") == Containing{"144 head dims in registers; accepted: multiples of 16 up to 128"});
  CHECK(reason("m64n8w8q128l2b4k8") ==
        Containing{"accepted: 0 to 8, tiles stored where the next are loaded or before"});
  CHECK(reason("m64n8w8q96l2b2k8") == Containing{"bytes of shared memory"});
}

TEST_CASE("wide: head dims of other kernels are refused, and theirs of this one") {
  KernelSpec spec = wide_spec(256);
  spec.tile = default_tiles(wide_spec(512)).front();
  CHECK(check(spec, arch_limits(75)) == "head_dim is 256 with kind fwd_wide; accepted: 257 to 512");
  CHECK(default_tiles(spec).empty());
  for (const KernelKind kind : kKernelKinds) {
    if (kind == KernelKind::kForwardWide || kind == KernelKind::kAppend) continue;
    spec = wide_spec(257);
    spec.kind = kind;
    CAPTURE(spec.text());
    CHECK(default_tiles(spec).empty());
    CHECK(check(spec, arch_limits(75)).value_or("") == Containing{"head_dim is 257 with kind"});
  }
}
