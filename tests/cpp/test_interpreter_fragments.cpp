// The tensor instruction, ldmatrix, shuffles and votes of the interpreter against plain loops over whole
// matrices.
#include <doctest/doctest.h>

#include <array>
#include <cstdint>
#include <random>
#include <vector>

#include "fp16.h"
#include "small_kernel.h"

using namespace flash_attn_jit;
using namespace flash_attn_jit::testing;

namespace {

TensorExtent flat(const char* name, void* data, std::int64_t elements, int element_bytes, TensorUse use) {
  return {name, data, element_bytes, {elements}, {1}, use};
}

// Row-major matrices, the fragments cut out by index as primitives.cuh draws them.
constexpr const char* kMmaParams =
    "struct Params { const unsigned short *a, *b; const float* c; float* d; int accumulate; };";
constexpr const char* kMmaBody = R"(
  const int g = thread_in_block() / 4, t = thread_in_block() % 4;
  const auto pair = [](unsigned lo, unsigned hi) { return lo | hi << 16; };
  const unsigned a0 = pair(params.a[g * 8 + 2 * t], params.a[g * 8 + 2 * t + 1]);
  const unsigned a1 = pair(params.a[(g + 8) * 8 + 2 * t], params.a[(g + 8) * 8 + 2 * t + 1]);
  const unsigned b = pair(params.b[2 * t * 8 + g], params.b[(2 * t + 1) * 8 + g]);
  float c[4];
  for (int i = 0; i < 4; ++i) c[i] = params.c[(g + i / 2 * 8) * 8 + 2 * t + i % 2];
  if (params.accumulate) Fp16::multiply_add(c, a0, a1, b); else Fp16::multiply(c, a0, a1, b);
  for (int i = 0; i < 4; ++i) store_global_f32(params.d + (g + i / 2 * 8) * 8 + 2 * t + i % 2, c[i]);
)";

struct MmaCase {
  std::array<std::uint16_t, 128> a;
  std::array<std::uint16_t, 64> b;
  std::array<float, 128> c;

  std::array<float, 128> run(const CompiledKernel& kernel, bool accumulate) const {
    std::array<float, 128> d{};
    struct Params {
      const std::uint16_t *a, *b;
      const float* c;
      float* d;
      int accumulate;
    } params{a.data(), b.data(), c.data(), d.data(), accumulate};
    const TensorExtent out = flat("d", d.data(), 128, 4, TensorUse::kWrite);
    run_small_kernel(kernel, 32, &params, {&out, 1});
    return d;
  }

  double expected(int row, int column, bool accumulate) const {
    double sum = accumulate ? c[row * 8 + column] : 0;
    for (int k = 0; k < 8; ++k) sum += from_fp16(a[row * 8 + k]) * from_fp16(b[k * 8 + column]);
    return sum;
  }
};

}  // namespace

TEST_CASE("multiply_add multiplies whole matrices") {
  const CompiledKernel kernel = compile_small_kernel(kMmaParams, kMmaBody);
  std::mt19937 random(1);
  std::uniform_int_distribution<int> small(-64, 64);
  for (int round = 0; round < 10; ++round) {
    // Small whole numbers, so that every order of the sums gives the same, exact result.
    MmaCase test;
    for (auto& x : test.a) x = to_fp16(small(random));
    for (auto& x : test.b) x = to_fp16(small(random));
    for (auto& x : test.c) x = static_cast<float>(small(random));
    for (const bool accumulate : {false, true}) {
      const auto d = test.run(kernel, accumulate);
      for (int i = 0; i < 128; ++i) REQUIRE(d[i] == test.expected(i / 8, i % 8, accumulate));
    }
  }
}

TEST_CASE("multiply_add reads every fp16 exactly, subnormals included") {
  const CompiledKernel kernel = compile_small_kernel(kMmaParams, kMmaBody);
  MmaCase test{};
  for (int k = 0; k < 8; ++k) test.b[k * 8 + k] = to_fp16(1);  // the identity
  for (int first = 0; first < 0x10000; first += 128) {
    for (int i = 0; i < 128; ++i) test.a[i] = static_cast<std::uint16_t>(first + i);
    // Infinity and NaN spoil their row: 0 x inf is NaN.
    if ((first & 0x7c00) == 0x7c00) continue;
    const auto d = test.run(kernel, false);
    for (int i = 0; i < 128; ++i) REQUIRE(d[i] == from_fp16(test.a[i]));
  }
}

TEST_CASE("multiply_add with infinity and NaN") {
  const CompiledKernel kernel = compile_small_kernel(kMmaParams, kMmaBody);
  MmaCase test{};
  for (auto& x : test.b) x = to_fp16(1);
  test.a[3 * 8 + 2] = 0x7c00;
  test.a[12 * 8 + 7] = 0xfc00;
  test.a[5 * 8] = 0x7e00;
  test.a[6 * 8] = 0x7c00;
  test.a[6 * 8 + 1] = 0xfc00;
  const auto d = test.run(kernel, true);
  for (int column = 0; column < 8; ++column) {
    CHECK(d[3 * 8 + column] == INFINITY);
    CHECK(d[12 * 8 + column] == -INFINITY);
    CHECK(std::isnan(d[5 * 8 + column]));
    CHECK(std::isnan(d[6 * 8 + column]));
    CHECK(d[4 * 8 + column] == 0);
  }
}

TEST_CASE("ldmatrix gives each lane its elements of four matrices") {
  // Matrix i, row r, column c holds 64 i + 8 r + c; its rows lie in shuffled places.
  const CompiledKernel kernel = compile_small_kernel("struct Params { unsigned* out; };", R"(
    const int lane = thread_in_block();
    const unsigned at = (lane * 11 + 5) % 32 * 16;
    Vec16 row;
    for (int i = 0; i < 4; ++i) row.word[i] = (lane * 8 + 2 * i) | (lane * 8 + 2 * i + 1) << 16;
    store_shared_16B(at, row);
    warp_barrier();
    unsigned x4[4], trans[4], two[2], one[2];
    ldmatrix_x4(x4, at);
    ldmatrix_x4_trans(trans, at);
    ldmatrix_x2_trans(two, lane < 16 ? at : 3);
    ldmatrix_x1(one[0], lane < 8 ? at : 3);
    ldmatrix_x1_trans(one[1], lane < 8 ? at : 3);
    for (int i = 0; i < 4; ++i) {
      store_global_f32((float*)params.out + lane * 12 + i, bits_float(x4[i]));
      store_global_f32((float*)params.out + lane * 12 + 4 + i, bits_float(trans[i]));
    }
    for (int i = 0; i < 2; ++i) {
      store_global_f32((float*)params.out + lane * 12 + 8 + i, bits_float(two[i]));
      store_global_f32((float*)params.out + lane * 12 + 10 + i, bits_float(one[i]));
    }
  )");
  std::array<std::uint32_t, 384> out{};
  std::uint32_t* params = out.data();
  const TensorExtent extent = flat("out", out.data(), 384, 4, TensorUse::kWrite);
  run_small_kernel(kernel, 32, &params, {&extent, 1});
  const auto pair = [](int lo, int hi) { return static_cast<std::uint32_t>(lo | hi << 16); };
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i) {
      const int g = lane / 4, t = lane % 4;
      const std::uint32_t straight = pair(64 * i + 8 * g + 2 * t, 64 * i + 8 * g + 2 * t + 1);
      const std::uint32_t transposed = pair(64 * i + 8 * (2 * t) + g, 64 * i + 8 * (2 * t + 1) + g);
      CHECK(out[lane * 12 + i] == straight);
      CHECK(out[lane * 12 + 4 + i] == transposed);
      if (i < 2) CHECK(out[lane * 12 + 8 + i] == transposed);
      if (i == 0) {
        CHECK(out[lane * 12 + 10] == straight);
        CHECK(out[lane * 12 + 11] == transposed);
      }
    }
}

TEST_CASE("any_in_block hears every warp, each time anew, and is a barrier") {
  const CompiledKernel kernel = compile_small_kernel("struct Params { float* out; };", R"(
    const int thread = thread_in_block();
    for (int i = 0; i < 5; ++i) {
      if (thread == 0) store_shared_4B(0, i);
      const bool any = any_in_block(i % 2 == 1 && thread == 33 * i % 96);
      const unsigned shared = load_shared_2B(0);
      block_barrier();
      store_global_f32(params.out + thread * 5 + i, any ? static_cast<float>(shared) : -1.0f);
    }
  )");
  std::vector<float> out(96 * 5);
  float* params = out.data();
  const TensorExtent extent = flat("out", out.data(), 96 * 5, 4, TensorUse::kWrite);
  run_small_kernel(kernel, 96, &params, {&extent, 1});
  for (int thread = 0; thread < 96; ++thread)
    for (int i = 0; i < 5; ++i) CHECK(out[thread * 5 + i] == (i % 2 == 1 ? static_cast<float>(i) : -1.0f));
}

TEST_CASE("shuffles and any_in_warp stay inside their warp") {
  const CompiledKernel kernel = compile_small_kernel("struct Params { float* out; };", R"(
    const int thread = thread_in_block();
    float sum = thread;
    for (int mask = 1; mask < 4; mask *= 2) sum += shuffle_xor(sum, mask);
    store_global_f32(params.out + thread * 4, sum);
    store_global_f32(params.out + thread * 4 + 1, any_in_warp(thread == 40));
    store_global_f32(params.out + thread * 4 + 2, shuffle_xor(thread, 31));
    store_global_f32(params.out + thread * 4 + 3, shuffle(thread, thread % 32 / 8));
  )");
  std::array<float, 256> out{};
  float* params = out.data();
  const TensorExtent extent = flat("out", out.data(), 256, 4, TensorUse::kWrite);
  run_small_kernel(kernel, 64, &params, {&extent, 1});
  for (int thread = 0; thread < 64; ++thread) {
    CHECK(out[thread * 4] == thread / 4 * 16 + 6);
    CHECK(out[thread * 4 + 1] == (thread >= 32));
    CHECK(out[thread * 4 + 2] == thread / 32 * 32 + 31 - thread % 32);
    CHECK(out[thread * 4 + 3] == thread / 32 * 32 + thread % 32 / 8);
  }
}
