#include "runtime/interpreter/warp_math.h"

#include <bit>
#include <cstring>

namespace flash_attn_jit {
namespace {

// Vectors of the compiler's own, which every target has in some form.
typedef float Float4 __attribute__((vector_size(16)));
typedef std::uint32_t Uint4 __attribute__((vector_size(16)));

// fp16 in the low halves -> fp32, exactly: the bits move to their place, and a product with 2^112 corrects
// the exponent of normal and subnormal numbers alike. Infinity and NaN get fp32's exponent.
Float4 widen(Uint4 halves) {
  const Uint4 moved = (halves & 0x7fffu) << 13;
  const Float4 finite = reinterpret_cast<Float4>(moved) * 0x1p112f;
  const Uint4 special = reinterpret_cast<Uint4>((halves & 0x7c00u) == 0x7c00u) & 0x7f800000u;
  return reinterpret_cast<Float4>(reinterpret_cast<Uint4>(finite) | special | (halves & 0x8000u) << 16);
}

// Row-major A (16 x 8) and B (8 x 8), widened.
struct Matrices {
  alignas(16) float a[16][8];
  alignas(16) float b[8][8];
};

void widen_pairs(const std::array<std::uint32_t, 32>& pairs, float* low, float* high, int first_lane) {
  Uint4 words;
  std::memcpy(&words, &pairs[first_lane], sizeof words);
  const Float4 l = widen(words & 0xffffu), h = widen(words >> 16);
  std::memcpy(low, &l, sizeof l);
  std::memcpy(high, &h, sizeof h);
}

// Rows g of A: four lanes hold columns 2t and 2t + 1.
void gather_a(const std::array<std::uint32_t, 32>& pairs, float (*rows)[8]) {
  for (int g = 0; g < 8; ++g) {
    float low[4], high[4];
    widen_pairs(pairs, low, high, 4 * g);
    for (int t = 0; t < 4; ++t) {
      rows[g][2 * t] = low[t];
      rows[g][2 * t + 1] = high[t];
    }
  }
}

// Column g of B: four lanes hold rows 2t and 2t + 1.
void gather_b(const std::array<std::uint32_t, 32>& pairs, float (*rows)[8]) {
  for (int g = 0; g < 8; ++g) {
    float low[4], high[4];
    widen_pairs(pairs, low, high, 4 * g);
    for (int t = 0; t < 4; ++t) {
      rows[2 * t][g] = low[t];
      rows[2 * t + 1][g] = high[t];
    }
  }
}

}  // namespace

void warp_mma(const MmaOperands& operands, bool accumulate) {
  Matrices m;
  gather_a(operands.a0, m.a);
  gather_a(operands.a1, m.a + 8);
  gather_b(operands.b, m.b);
  for (int half = 0; half < 2; ++half)
    for (int g = 0; g < 8; ++g) {
      float* const* c = &operands.c[4 * g];
      Float4 sums[2] = {};
      if (accumulate)
        for (int t = 0; t < 4; ++t)
          for (int i = 0; i < 2; ++i) sums[t / 2][2 * (t % 2) + i] = c[t][2 * half + i];
      const float* row = m.a[8 * half + g];
      for (int k = 0; k < 8; ++k) {
        Float4 b[2];
        std::memcpy(b, m.b[k], sizeof b);
        sums[0] += row[k] * b[0];
        sums[1] += row[k] * b[1];
      }
      for (int t = 0; t < 4; ++t)
        for (int i = 0; i < 2; ++i) c[t][2 * half + i] = sums[t / 2][2 * (t % 2) + i];
    }
}

std::uint32_t ldmatrix_fragment(const MatrixRows& rows, int lane) {
  const auto& row = rows[lane / 4];
  return row[2 * (lane % 4)] | static_cast<std::uint32_t>(row[2 * (lane % 4) + 1]) << 16;
}

std::uint32_t ldmatrix_fragment_trans(const MatrixRows& rows, int lane) {
  const int column = lane / 4, row = 2 * (lane % 4);
  return rows[row][column] | static_cast<std::uint32_t>(rows[row + 1][column]) << 16;
}

}  // namespace flash_attn_jit
