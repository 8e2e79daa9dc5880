#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <set>
#include <vector>

#include "generator/errors.h"
#include "runtime/request/divisor.h"
#include "runtime/request/forward.h"
#include "tests/cpp/containing.h"

using namespace flash_attn_jit;
using flash_attn_jit::testing::Containing;

namespace {

constexpr int kMultiprocessors = 40;

void* address(std::uintptr_t at) { return reinterpret_cast<void*>(at); }

TensorView contiguous_view(std::uintptr_t at, std::int64_t b, std::int64_t s, std::int64_t h, std::int64_t d) {
  return {address(at), {b, s, h, d}, {s * h * d, h * d, d, 1}};
}

ForwardRequest forward_request(std::int64_t b, std::int64_t sq, std::int64_t sk, std::int64_t h, std::int64_t hk,
                               std::int64_t d) {
  ForwardRequest r;
  r.q = contiguous_view(0x1000, b, sq, h, d);
  r.k = contiguous_view(0x2000, b, sk, hk, d);
  r.v = contiguous_view(0x3000, b, sk, hk, d);
  r.out = contiguous_view(0x4000, b, sq, h, d);
  r.softmax_lse = reinterpret_cast<float*>(address(0x5000));
  r.options.softmax_scale = 0.125f;
  return r;
}

// As whoever makes the kernel checks it.
LaunchPlan plan(const ForwardRequest& r) {
  LaunchPlan made = plan_forward(r, {arch_limits(75), kMultiprocessors, default_tile_chooser()});
  if (const auto reason = check(made.spec, arch_limits(75))) throw UnsupportedError(*reason);
  return made;
}

template <typename Expected>
std::string refusal(const ForwardRequest& r) {
  try {
    plan(r);
  } catch (const Expected& error) {
    return error.what();
  }
  return "";
}

}  // namespace

TEST_CASE("plan: what the kernel is told") {
  ForwardRequest r = forward_request(2, 300, 500, 8, 2, 64);
  r.options.mask = Mask::kCausal;
  const LaunchPlan p = plan(r);
  CHECK(p.spec.head_dim == 64);
  CHECK(p.spec.mask == Mask::kCausal);
  CHECK(p.spec.group_size == 4);
  CHECK(p.spec.access == GlobalAccess::kVector16B);
  const int m_blocks = (300 + p.spec.tile.block_m - 1) / p.spec.tile.block_m;
  CHECK(p.blocks == 2 * 8 * m_blocks);
  CHECK(p.params.num_m_blocks == m_blocks);
  CHECK(p.params.q == address(0x1000));
  CHECK(p.params.k == address(0x2000));
  CHECK(p.params.v == address(0x3000));
  CHECK(p.params.out == address(0x4000));
  CHECK(p.params.softmax_lse == address(0x5000));
  CHECK(p.params.seqlen_q == 300);
  CHECK(p.params.seqlen_k == 500);
  CHECK(p.params.num_heads == 8);
  CHECK(p.params.q_strides.batch == 300 * 8 * 64);
  CHECK(p.params.q_strides.row == 8 * 64);
  CHECK(p.params.q_strides.head == 64);
  CHECK(p.params.k_strides.batch == 500 * 2 * 64);
  CHECK(p.params.v_strides.row == 2 * 64);
  CHECK(p.params.out_strides.head == 64);
  CHECK(p.params.softmax_scale_log2 == doctest::Approx(0.125 * std::log2(std::exp(1.0))));
  CHECK(p.params.sign == 0);
}

TEST_CASE("plan: strides are taken as they are") {
  ForwardRequest r = forward_request(2, 32, 32, 4, 4, 64);
  r.q.strides = {1'000'000'000'000, 64, 32 * 64, 1};  // (b, h, s, d) transposed, batches far apart
  const LaunchPlan p = plan(r);
  CHECK(p.params.q_strides.batch == 1'000'000'000'000);
  CHECK(p.params.q_strides.row == 64);
  CHECK(p.params.q_strides.head == 32 * 64);
  CHECK(p.spec.access == GlobalAccess::kVector16B);
}

TEST_CASE("plan: an attn_bias is read several keys at once where all its rows let it") {
  ForwardRequest r = forward_request(2, 30, 64, 4, 4, 64);
  const PairTensor whole{address(0x6000), PairType::kFloat16, {2, 4, 30, 64}, {4 * 30 * 64, 30 * 64, 64, 1}};
  const auto has = [&](const PairTensor& bias, Feature feature) {
    r.options.bias = bias;
    return plan(r).spec.has(feature);
  };
  CHECK(has(whole, Feature::kBias16));
  CHECK_FALSE(has(whole, Feature::kUnpaired));
  CHECK_FALSE(has(whole, Feature::kOneRow));
  for (const PairType type : {PairType::kFloat16, PairType::kFloat32, PairType::kBool}) {
    PairTensor odd = whole;
    odd.type = type;
    CHECK_FALSE(has(odd, Feature::kUnpaired));
    const int bytes = bytes_of(type);
    odd.data = address(0x6000 + (type == PairType::kBool ? 4 : 8));
    CHECK(has(odd, Feature::kUnpaired));
    odd.data = whole.data;
    for (int d = 0; d < 4; ++d) {
      PairTensor strided = odd;
      strided.strides[d] += d == 3 ? 1 : 4;
      CAPTURE(d);
      CHECK(has(strided, Feature::kUnpaired));
    }
    r.options.bias = odd;
    const PairTensorParams& params = plan(r).params.pairs;
    CHECK(params.batch_stride == 4 * 30 * 64 * bytes);
    CHECK(params.query_stride == 64 * bytes);
    CHECK(params.key_stride == bytes);
  }
  const PairTensor keys{address(0x6000), PairType::kBool, {2, 1, 1, 64}, {64, 7, 7, 1}};  // strides of 1 say nothing
  CHECK(has(keys, Feature::kOneRow));
  CHECK_FALSE(has(keys, Feature::kUnpaired));
  CHECK(plan(r).params.pairs.head_stride == 0);
  const PairTensor column{address(0x6000), PairType::kFloat32, {1, 1, 30, 1}, {30, 30, 1, 1}};
  CHECK(has(column, Feature::kUnpaired));
  CHECK(plan(r).params.pairs.key_stride == 0);
}

TEST_CASE("plan: an attn_bias of another shape is named") {
  ForwardRequest r = forward_request(2, 30, 64, 4, 2, 64);
  for (int d = 0; d < 4; ++d) {
    PairTensor bias{address(0x6000), PairType::kFloat16, {2, 4, 30, 64}, {4 * 30 * 64, 30 * 64, 64, 1}};
    bias.shape[d] += 2;
    r.options.bias = bias;
    CHECK(refusal<ArgumentError>(r) == Containing{"attn_bias has shape"});
  }
  r.options.bias = PairTensor{address(0x6000), PairType::kFloat32, {1, 1, 30, 64}, {0, 0, 1LL << 29, 1}};
  CHECK(refusal<UnsupportedError>(r) == Containing{"attn_bias has strides"});
}

TEST_CASE("plan: the sign and the size of the scale") {
  ForwardRequest r = forward_request(1, 8, 8, 1, 1, 64);
  r.options.softmax_scale = -2;
  CHECK(plan(r).params.sign == 0x80008000u);
  CHECK(plan(r).params.softmax_scale_log2 == doctest::Approx(2 * std::log2(std::exp(1.0))));
  r.options.softmax_scale = 0;
  CHECK(plan(r).params.sign == 0);
  CHECK(plan(r).params.softmax_scale_log2 == 0x1p-70f);
  for (const float bad : {std::numeric_limits<float>::infinity(), std::nanf(""), 3e38f}) {
    r.options.softmax_scale = bad;
    CHECK(refusal<ArgumentError>(r) == Containing{"softmax_scale"});
  }
}

TEST_CASE("plan: 16-byte accesses only where everything allows them") {
  const auto access = [](auto change, std::int64_t head_dim = 64) {
    ForwardRequest r = forward_request(2, 32, 32, 4, 4, head_dim);
    change(r);
    return plan(r).spec.access;
  };
  CHECK(access([](ForwardRequest&) {}) == GlobalAccess::kVector16B);
  for (TensorView ForwardRequest::* tensor :
       {&ForwardRequest::q, &ForwardRequest::k, &ForwardRequest::v, &ForwardRequest::out}) {
    CHECK(access([&](ForwardRequest& r) { (r.*tensor).data = address(0x1002); }) == GlobalAccess::kElement2B);
    CHECK(access([&](ForwardRequest& r) { (r.*tensor).data = address(0x1008); }) == GlobalAccess::kElement2B);
    CHECK(access([&](ForwardRequest& r) { (r.*tensor).data = address(0x1010); }) == GlobalAccess::kVector16B);
    for (const int dim : {0, 1, 2}) {
      CHECK(access([&](ForwardRequest& r) { (r.*tensor).strides[dim] += 4; }) == GlobalAccess::kElement2B);
      CHECK(access([&](ForwardRequest& r) { (r.*tensor).strides[dim] += 8; }) == GlobalAccess::kVector16B);
    }
  }
  CHECK(access([](ForwardRequest&) {}, 72) == GlobalAccess::kVector16B);
  CHECK(access([](ForwardRequest&) {}, 68) == GlobalAccess::kElement2B);
  CHECK(access([](ForwardRequest&) {}, 1) == GlobalAccess::kElement2B);
}

TEST_CASE("plan: a dimension of one element may have any stride") {
  ForwardRequest r = forward_request(1, 32, 32, 1, 1, 64);
  r.q.strides = {3, 64, 5, 1};
  r.k.strides = {7, 64, 9, 1};
  const LaunchPlan p = plan(r);
  CHECK(p.spec.access == GlobalAccess::kVector16B);
  CHECK(p.params.q_strides.batch == 0);
  CHECK(p.params.q_strides.head == 0);
  CHECK(p.params.k_strides.batch == 0);
  CHECK(p.params.q_strides.row == 64);
  ForwardRequest one = forward_request(2, 8, 8, 1, 1, 1);
  one.q.strides[3] = 77;
  CHECK(plan(one).blocks > 0);
}

TEST_CASE("plan: nothing to launch where out has no elements, but without keys there is") {
  CHECK(plan(forward_request(0, 8, 8, 2, 2, 64)).blocks == 0);
  CHECK(plan(forward_request(2, 0, 8, 2, 2, 64)).blocks == 0);
  CHECK(plan(forward_request(2, 8, 8, 0, 0, 64)).blocks == 0);
  ForwardRequest none = forward_request(2, 0, 8, 2, 2, 64);
  none.q.data = none.out.data = nullptr;
  none.softmax_lse = nullptr;
  CHECK(plan(none).blocks == 0);
  ForwardRequest no_keys = forward_request(2, 8, 0, 2, 2, 64);
  no_keys.k.data = no_keys.v.data = nullptr;
  CHECK(plan(no_keys).blocks > 0);
  CHECK(plan(no_keys).params.seqlen_k == 0);
}

TEST_CASE("plan: a small problem gets smaller tiles than a large one") {
  const LaunchPlan small = plan(forward_request(1, 512, 512, 4, 4, 128)),
                   large = plan(forward_request(16, 4096, 4096, 16, 16, 128));
  CHECK(small.spec.tile.block_m < large.spec.tile.block_m);
}

TEST_CASE("plan: a tile that is asked for is taken, or refused with check()'s reason") {
  ForwardRequest r = forward_request(1, 512, 512, 4, 4, 64);
  r.tile = TileConfig::parse("m64n32w4q64l2b8k8");
  CHECK(plan(r).spec.tile == *r.tile);
  r.tile = TileConfig::parse("m64n17w4q64l2b8k8");
  CHECK(refusal<UnsupportedError>(r) == Containing{"m64n17w4q64l2b8k8"});
  r.tile = TileConfig{};
  CHECK(refusal<UnsupportedError>(r) == Containing{"tile"});
}

TEST_CASE("plan: more blocks than a grid holds") {
  ForwardRequest r = forward_request(70'000, 100'000, 8, 1000, 1000, 64);
  CHECK(refusal<UnsupportedError>(r) == Containing{"2147483647"});
  CHECK(refusal<UnsupportedError>(forward_request(1, 1ll << 31, 8, 1, 1, 64)) == Containing{"q has shape"});
}

TEST_CASE("plan: shapes that contradict each other name the argument, what came and what is accepted") {
  ForwardRequest r = forward_request(2, 8, 8, 4, 4, 64);
  r.k = contiguous_view(0x2000, 3, 8, 4, 64);
  CHECK(refusal<ArgumentError>(r) == Containing{"k has shape (3, 8, 4, 64); accepted: (2, 8, 4, 64)"});
  r = forward_request(2, 8, 8, 4, 4, 64);
  r.k = contiguous_view(0x2000, 2, 8, 4, 32);
  CHECK(refusal<ArgumentError>(r) == Containing{"k has shape"});
  r = forward_request(2, 8, 8, 4, 4, 64);
  r.v = contiguous_view(0x3000, 2, 9, 4, 64);
  CHECK(refusal<ArgumentError>(r) == Containing{"v has shape (2, 9, 4, 64); accepted: (2, 8, 4, 64)"});
  r = forward_request(2, 8, 8, 4, 4, 64);
  r.out = contiguous_view(0x4000, 2, 8, 2, 64);
  CHECK(refusal<ArgumentError>(r) == Containing{"out has shape"});
  CHECK(refusal<ArgumentError>(forward_request(2, 8, 8, 4, 3, 64)) == Containing{"q has 4 heads and k 3"});
  CHECK(refusal<ArgumentError>(forward_request(2, 8, 8, 4, 0, 64)) == Containing{"q has 4 heads and k 0"});
}

TEST_CASE("plan: memory that cannot be read") {
  ForwardRequest r = forward_request(2, 8, 8, 4, 4, 64);
  r.v.data = nullptr;
  CHECK(refusal<ArgumentError>(r) == Containing{"v has elements but no memory"});
  r = forward_request(2, 8, 8, 4, 4, 64);
  r.softmax_lse = nullptr;
  CHECK(refusal<ArgumentError>(r) == Containing{"softmax_lse"});
  r = forward_request(2, 8, 8, 4, 4, 64);
  r.k.strides[3] = 2;
  CHECK(refusal<ArgumentError>(r) == Containing{"k has strides"});
}

TEST_CASE("out apart from an input: whatever shares an element is refused, and slices of one tensor are not") {
  const auto shares = [](const TensorView& a, const TensorView& b) {
    try {
      require_apart({"out", a}, {"q", b});
    } catch (const ArgumentError& error) {
      return error.what() == Containing{"out shares memory with q; accepted: "};
    }
    return false;
  };
  std::mt19937 random(6);
  const auto draw = [&](int most) { return static_cast<std::int64_t>(random() % static_cast<unsigned>(most)); };
  const auto draw_view = [&] {
    TensorView view{address(0x1000 + 2 * draw(60)), {}, {}};
    for (int dim = 0; dim < 4; ++dim) {
      view.shape[dim] = draw(4) > 0 ? 1 + draw(3) : draw(3);
      view.strides[dim] = dim == kHeadDim ? 1 : draw(30);
    }
    return view;
  };
  const auto elements_of = [](const TensorView& view) {
    std::set<std::int64_t> elements;
    for (std::int64_t b = 0; b < view.shape[0]; ++b)
      for (std::int64_t s = 0; s < view.shape[1]; ++s)
        for (std::int64_t h = 0; h < view.shape[2]; ++h)
          for (std::int64_t d = 0; d < view.shape[3]; ++d)
            elements.insert(reinterpret_cast<std::intptr_t>(view.data) / 2 + b * view.strides[0] + s * view.strides[1] +
                            h * view.strides[2] + d);
    return elements;
  };
  for (int i = 0; i < 20'000; ++i) {
    const TensorView a = draw_view(), b = draw_view();
    const std::set<std::int64_t> of_a = elements_of(a), of_b = elements_of(b);
    const bool overlaps = std::ranges::any_of(of_a, [&](std::int64_t element) { return of_b.contains(element); });
    CAPTURE(i);
    if (overlaps) REQUIRE(shares(a, b));
    if (of_a.empty() || of_b.empty() || *of_a.rbegin() < *of_b.begin() || *of_b.rbegin() < *of_a.begin())
      REQUIRE(!shares(a, b));
  }
  const TensorView q{address(0x1000), {2, 8, 4, 64}, {8 * 3 * 4 * 64, 3 * 4 * 64, 64, 1}};  // of a packed tensor
  for (const int other : {1, 2}) {
    TensorView out = q;
    out.data = address(0x1000 + other * 4 * 64 * 2);
    CHECK(!shares(out, q));
    CHECK(!shares(q, out));
    out.data = address(0x1000 + (other * 4 * 64 - 8) * 2);
    CHECK(shares(out, q) == (other == 1));
  }
}

TEST_CASE("plan: head dims that no kernel is for") {
  CHECK(refusal<UnsupportedError>(forward_request(2, 8, 8, 4, 4, 513)) ==
        Containing{"head_dim is 513; accepted: 1 to 512"});
  CHECK(refusal<UnsupportedError>(forward_request(2, 8, 8, 4, 4, 0)) ==
        Containing{"head_dim is 0; accepted: 1 to 512"});
}

TEST_CASE("a divisor: as division does, at every edge and in between") {
  std::mt19937 random(5);
  constexpr int kMost = std::numeric_limits<int>::max();
  std::vector<int> divisors = {1, 2, 3, kMost - 1, kMost};
  for (int shift = 2; shift < 31; ++shift)
    for (int more : {-1, 0, 1}) divisors.push_back((1 << shift) + more);
  for (int i = 0; i < 2000; ++i)
    divisors.push_back(static_cast<int>(1 + (random() >> 1) % (1u << (1 + i % 31)) % kMost));
  for (const int d : divisors) {
    const Divisor by = divisor_of(d);
    const auto check = [&](std::int64_t n) {
      if (n < 0 || n > kMost) return;
      CAPTURE(n);
      CAPTURE(d);
      const std::uint64_t product = 2 * static_cast<std::uint64_t>(n) * by.multiplier;
      REQUIRE(static_cast<std::int64_t>(product >> 32 >> by.shift) == n / d);
    };
    for (const std::int64_t multiple :
         {std::int64_t{0}, std::int64_t{1}, std::int64_t{kMost / d / 2}, std::int64_t{kMost / d}})
      for (int off : {-1, 0, 1}) check(multiple * d + off);
    check(kMost);
    for (int i = 0; i < 20; ++i) check(random() >> 1);
  }
}

TEST_CASE("plan: head dims above 256 take a kernel of their own, for few queries too, and have no gradients") {
  ForwardRequest r = forward_request(2, 1, 8, 4, 4, 512);
  CHECK(plan(r).spec.kind == KernelKind::kForwardWide);
  r = forward_request(2, 100, 8, 4, 4, 257);
  const LaunchPlan p = plan(r);
  CHECK(p.spec.kind == KernelKind::kForwardWide);
  CHECK(p.blocks == 2 * 4 * ((100 + p.spec.tile.block_m - 1) / p.spec.tile.block_m));
  CHECK(p.combine.blocks == 0);
  CHECK(plan(forward_request(2, 1000, 8, 4, 4, 256)).spec.kind == KernelKind::kForward);
  r.options.has_backward = true;
  CHECK(refusal<UnsupportedError>(r) ==
        Containing{"head_dim is 257, and inputs need a gradient; accepted: 1 to 256 where they do"});
}
