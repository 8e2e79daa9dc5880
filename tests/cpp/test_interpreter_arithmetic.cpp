// The arithmetic of primitives_host.cuh against double precision and against what the PTX manual says of
// special values.
#include <doctest/doctest.h>

#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "fp16.h"
#include "small_kernel.h"

using namespace flash_attn_jit;
using namespace flash_attn_jit::testing;

namespace {

// out[i] = f(x[i], y[i]), by one warp.
std::vector<float> evaluate(const std::string& expression, std::vector<float> x, std::vector<float> y = {}) {
  y.resize(x.size());
  std::vector<float> out(x.size());
  struct Params {
    const float *x, *y;
    float* out;
    int n;
  } params{x.data(), y.data(), out.data(), static_cast<int>(x.size())};
  const CompiledKernel kernel =
      compile_small_kernel("struct Params { const float *x, *y; float* out; int n; };",
                           "for (int i = thread_in_block(); i < params.n; i += 32) { const float x = params.x[i], y = "
                           "params.y[i]; (void)y; store_global_f32(params.out + i, " +
                               expression + "); }");
  const TensorExtent extent{"out", out.data(), 4, {static_cast<std::int64_t>(out.size())}, {1}, TensorUse::kWrite};
  run_small_kernel(kernel, 32, &params, {&extent, 1});
  return out;
}

bool same(float a, float b) { return std::bit_cast<std::uint32_t>(a) == std::bit_cast<std::uint32_t>(b); }

constexpr float kInfinityF32 = INFINITY;
constexpr float kNanF32 = std::numeric_limits<float>::quiet_NaN();

}  // namespace

TEST_CASE("Fp16::pack rounds to nearest even, and the halves do not mix") {
  std::vector<float> x, y;
  for (int h = 0; h < 0x7c00; ++h) {
    // A number of fp16, the middle to the next one, and both floats beside the middle.
    const float value = static_cast<float>(from_fp16(static_cast<std::uint16_t>(h)));
    const float above = h == 0x7bff ? 65536.0f : static_cast<float>(from_fp16(static_cast<std::uint16_t>(h + 1)));
    const float middle = (value + above) / 2;
    for (const float each : {value, middle, std::nextafter(middle, 0.0f), std::nextafter(middle, kInfinityF32)}) {
      x.push_back(each);
      y.push_back(-each);
    }
  }
  const std::vector<float> packed = evaluate("bits_float(Fp16::pack(x, y))", x, y);
  for (std::size_t i = 0; i < x.size(); ++i) {
    const std::uint32_t bits = std::bit_cast<std::uint32_t>(packed[i]);
    REQUIRE((bits & 0xffff) == to_fp16(x[i]));
    REQUIRE((bits >> 16) == to_fp16(y[i]));
  }
}

TEST_CASE("Fp16::pack of special values") {
  const std::vector<float> out =
      evaluate("bits_float(Fp16::pack(x, 0.0f))",
               {kInfinityF32, -kInfinityF32, 65519.0f, 65520.0f, 1e30f, kNanF32, -kNanF32, -0.0f, 1e-30f});
  const std::array<std::uint32_t, 9> expected = {0x7c00, 0xfc00, 0x7bff, 0x7c00, 0x7c00, 0x7fff, 0x7fff, 0x8000, 0};
  for (std::size_t i = 0; i < expected.size(); ++i) CHECK(std::bit_cast<std::uint32_t>(out[i]) == expected[i]);
}

TEST_CASE("Fp16::pack_toward_zero cuts off, and leaves what is finite finite") {
  std::vector<float> x = {kInfinityF32, -kInfinityF32, 65504.0f, 65519.0f,        65520.0f, 65536.0f,
                          -3e38f,       kNanF32,       -0.0f,    0x1.fffffep-25f, -1e-45f,  0x1p-24f};
  const std::vector<std::uint16_t> special = {0x7c00, 0xfc00, 0x7bff, 0x7bff, 0x7bff, 0x7bff,
                                              0xfbff, 0x7fff, 0x8000, 0,      0x8000, 1};
  for (int h = 0; h < 0x7c00; ++h) {
    const float value = static_cast<float>(from_fp16(static_cast<std::uint16_t>(h)));
    const float above = h == 0x7bff ? 65536.0f : static_cast<float>(from_fp16(static_cast<std::uint16_t>(h + 1)));
    x.push_back(value);
    x.push_back(std::nextafter(above, 0.0f));
  }
  const std::vector<float> packed = evaluate("bits_float(Fp16::pack_toward_zero(x, -x))", x);
  for (std::size_t i = 0; i < x.size(); ++i) {
    const std::uint32_t bits = std::bit_cast<std::uint32_t>(packed[i]);
    const auto expected = i < special.size() ? special[i] : static_cast<std::uint16_t>((i - special.size()) / 2);
    CAPTURE(x[i]);
    REQUIRE((bits & 0xffff) == expected);
    if (!std::isnan(x[i])) REQUIRE((bits >> 16) == (expected ^ 0x8000u));
  }
}

TEST_CASE("exp2_approx is within 2 ulp, and has no subnormals") {
  std::vector<float> x;
  std::mt19937 random(2);
  std::uniform_real_distribution<float> uniform(-126, 127);
  for (int i = 0; i < 1000; ++i) x.push_back(uniform(random));
  const std::vector<float> out = evaluate("exp2_approx(x)", x);
  for (std::size_t i = 0; i < x.size(); ++i) {
    const double exact = std::exp2(static_cast<double>(x[i]));
    REQUIRE(std::fabs(out[i] - exact) <= exact * 0x1p-22);
  }
  const std::vector<float> special =
      evaluate("exp2_approx(x)", {0.0f, -0.0f, kInfinityF32, -kInfinityF32, kNanF32, 128.0f, -126.5f, -200.0f, 1e-40f});
  CHECK(special[0] == 1);
  CHECK(special[1] == 1);
  CHECK(special[2] == kInfinityF32);
  CHECK(same(special[3], 0.0f));
  CHECK(std::isnan(special[4]));
  CHECK(special[5] == kInfinityF32);
  CHECK(same(special[6], 0.0f));
  CHECK(same(special[7], 0.0f));
  CHECK(special[8] == 1);
}

TEST_CASE("log2_approx, reciprocal, fma_rounded") {
  const std::vector<float> logs = evaluate("log2_approx(x)", {8.0f, 0.0f, -1.0f, kInfinityF32, 3.0f});
  CHECK(logs[0] == 3);
  CHECK(logs[1] == -kInfinityF32);
  CHECK(std::isnan(logs[2]));
  CHECK(logs[3] == kInfinityF32);
  CHECK(logs[4] == doctest::Approx(std::log2(3.0)).epsilon(1e-6));
  const std::vector<float> inverse = evaluate("reciprocal(x)", {3.0f, 0.0f, -0.0f, kInfinityF32, 1e-40f, 0x1.8p126f});
  CHECK(inverse[0] == doctest::Approx(1.0 / 3).epsilon(1e-6));
  CHECK(inverse[1] == kInfinityF32);
  CHECK(inverse[2] == -kInfinityF32);
  CHECK(same(inverse[3], 0.0f));
  CHECK(inverse[4] == kInfinityF32);
  CHECK(same(inverse[5], 0.0f));
  // One rounding: the product alone would round its last bit away.
  const float x = 1 + 0x1p-12f;
  CHECK(evaluate("fma_rounded(x, x, y)", {x}, {-1 - 0x1p-11f})[0] == 0x1p-24f);
}

TEST_CASE("saturate") {
  const std::vector<float> x = {-kInfinityF32, -1, -0.0f, 0, 1e-40f, 0.25f, 1, 1.0000001f, 7, kInfinityF32, kNanF32};
  const std::vector<float> expected = {0, 0, 0, 0, 1e-40f, 0.25f, 1, 1, 1, 1, 0};
  const std::vector<float> out = evaluate("saturate(x)", x);
  for (std::size_t i = 0; i < x.size(); ++i) CHECK(same(out[i], expected[i]));
}

TEST_CASE("max_ignoring_nan") {
  const std::vector<float> out =
      evaluate("max_ignoring_nan(x, y)", {1, 2, kNanF32, 4, kNanF32, -0.0f, 0.0f, -0.0f, -kInfinityF32},
               {2, 1, 3, kNanF32, kNanF32, 0.0f, -0.0f, -0.0f, kNanF32});
  CHECK(out[0] == 2);
  CHECK(out[1] == 2);
  CHECK(out[2] == 3);
  CHECK(out[3] == 4);
  CHECK(std::isnan(out[4]));
  CHECK(same(out[5], 0.0f));
  CHECK(same(out[6], 0.0f));
  CHECK(same(out[7], -0.0f));
  CHECK(out[8] == -kInfinityF32);
}

TEST_CASE("the process's floating point modes do not reach a kernel") {
#if defined(__SSE2__)
  const unsigned saved = __builtin_ia32_stmxcsr();
  __builtin_ia32_ldmxcsr(saved | 0x8040);  // flush subnormals, as libraries built with -ffast-math do
  const float flushed = evaluate("x * 0.5f", {0x1p-126f})[0];
  const unsigned after = __builtin_ia32_stmxcsr();
  __builtin_ia32_ldmxcsr(saved);
  CHECK(same(flushed, 0x1p-127f));
  CHECK((after & 0x8040) == 0x8040);
#endif
}
