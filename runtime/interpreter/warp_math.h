// The tensor instruction and ldmatrix of one warp: which element lies in which lane, as
// templates/primitives.cuh draws it.
#pragma once

#include <array>
#include <cstdint>

namespace flash_attn_jit {

// What the 32 lanes bring to an mma_m16n8k8.
struct MmaOperands {
  std::array<float*, 32> c;  // 4 each
  std::array<std::uint32_t, 32> a0, a1, b;
};

// C = A B, plus C where `accumulate`. Products are exact in fp32; they are added to C one by one, k rising,
// each sum rounded to fp32. (The hardware adds in another order and truncates: results differ in the last
// bits.)
void warp_mma(const MmaOperands& operands, bool accumulate);

// An 8x8 matrix of fp16: row r is the 16 bytes that lane r of an ldmatrix points at.
using MatrixRows = std::array<std::array<std::uint16_t, 8>, 8>;

// What lane `lane` gets of the matrix, or of its transpose.
std::uint32_t ldmatrix_fragment(const MatrixRows& rows, int lane);
std::uint32_t ldmatrix_fragment_trans(const MatrixRows& rows, int lane);

}  // namespace flash_attn_jit
