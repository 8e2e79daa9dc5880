// Which problems share a record.
#include <doctest/doctest.h>

#include <climits>
#include <map>
#include <set>

#include "generator/errors.h"
#include "runtime/tuner/problem_class.h"
#include "tests/cpp/counted_allocations.h"

using namespace flash_attn_jit;

namespace {

// The upper ends of all buckets.
std::vector<std::int64_t> ends_of(const Buckets& buckets) {
  std::vector<std::int64_t> ends;
  for (std::int64_t end = buckets.least; end <= buckets.greatest; end *= 2) ends.push_back(end);
  return ends;
}

}  // namespace

TEST_CASE("buckets: both ends of each, and every size has one") {
  for (const Buckets& buckets : {kSeqlenBuckets, kBatchHeadsBuckets}) {
    std::int64_t below = -1;  // the end of the bucket before
    for (const std::int64_t end : ends_of(buckets)) {
      CHECK(buckets.of(below + 1) == end);
      CHECK(buckets.of(end) == end);
      below = end;
    }
    CHECK(buckets.of(buckets.greatest + 1) == buckets.greatest);
    CHECK(buckets.of(INT64_MAX) == buckets.greatest);
    CHECK(buckets.of(0) == buckets.least);
  }
}

TEST_CASE("a problem's class: the kernel without its tile, and the three buckets") {
  const KernelSpec spec = KernelSpec::parse("bwd_dq hdim96 fp16 window alibi gqa4 elem2 m128n16w4q96l2b4k8");
  const ProblemClass problem = class_of(spec, {1000, 77, 65, 40});
  CHECK(problem.text() == "bwd_dq hdim96 fp16 window alibi gqa4 elem2 q1024 k128 bh128");
  CHECK(problem.kernel() == "bwd_dq hdim96 fp16 window alibi gqa4 elem2");
  CHECK(problem.spec.tile == TileConfig{});
  CHECK(parse_kernel_without_tile(problem.kernel()) == problem.spec);
  CHECK_THROWS_AS(parse_kernel_without_tile("bwd_dq hdim96"), SpecError);

  KernelSpec other_tile = spec;
  other_tile.tile = {};
  CHECK(class_of(other_tile, {513, 65, 128, 108}) == problem);
  for (const Problem& other : {Problem{1025, 77, 65, 40}, {512, 77, 65, 40}, {1000, 64, 65, 40}, {1000, 77, 64, 40}})
    CHECK(class_of(spec, other) != problem);
}

TEST_CASE(
    "queries of the decode kernel count by the rows that they make with a group's heads, a warp's 16 at the least") {
  const auto queries_of = [](int group, std::int64_t seqlen_q) {
    const KernelSpec spec = parse_kernel_without_tile("decode hdim64 fp16 full gqa" + std::to_string(group) + " vec16");
    return class_of(spec, {seqlen_q, 4000, 32, 40}).seqlen_q;
  };
  for (const auto& [group, of_warp] : std::map<int, int>{{1, 16}, {2, 8}, {3, 4}, {4, 4}, {7, 2}, {8, 2}, {64, 1}}) {
    CAPTURE(group);
    CHECK(queries_of(group, 1) == of_warp);
    CHECK(queries_of(group, of_warp) == of_warp);
    CHECK(queries_of(group, of_warp + 1) == 2 * of_warp);
    CHECK(queries_of(group, 4 * of_warp) == 4 * of_warp);
    CHECK((group > 16 || of_warp * group <= 16));
  }
  const KernelSpec spec = parse_kernel_without_tile("decode hdim64 fp16 full gqa4 vec16");
  CHECK(class_of(spec, {1, 4000, 32, 40}).text() == "decode hdim64 fp16 full gqa4 vec16 q4 k4096 bh32");
}

TEST_CASE("a class is found without taking memory" * doctest::skip(!testing::kCountsAllocations)) {
  const KernelSpec spec = KernelSpec::parse("fwd hdim64 fp16 causal gqa1 vec16 m128n16w4q64l2b4k7");
  const std::size_t before = testing::allocations_of_this_thread();
  std::int64_t sum = 0;
  for (std::int64_t size = 0; size < 5000; size += 7) sum += class_of(spec, {size, size, size, 40}).seqlen_q;
  CHECK(testing::allocations_of_this_thread() == before);
  CHECK(sum > 0);
}
