// Every machine primitive there is for kernels. They reach the machine through nothing else: the CUDA half of this
// interface is in primitives_cuda.cuh, the host half, on which the interpreter runs the same kernels on a CPU, in
// primitives_host.cuh. No other template asks which of the two it is compiled for.
//
// Index
//   thread_in_block(), block_in_grid()            where this thread is (threads and blocks are one-dimensional)
//   reread_thread_in_block(), reread_block_in_grid()  the same, read anew: what is computed from them after the main
//                                                 loop is not kept in registers across it
//
// Global memory (addresses are ordinary pointers; every load but load_constant_* stays where it is written: the
// compiler may not sink it)
//   load_global_16B(Vec16&, ptr)                  16 bytes, ptr 16-byte aligned
//   load_global_8B(unsigned&, unsigned&, ptr)     8 bytes, ptr 8-byte aligned
//   load_global_2B(ptr) -> unsigned               one element, in the low half
//   load_global_1B(ptr) -> unsigned
//   load_global_f32(ptr) -> float
//   load_global_i32(ptr) -> int
//   load_constant_f32, _i32, _i64, _2B, _1B       of what no kernel writes: the compiler may move and merge these
//   store_global_16B(ptr, Vec16)
//   store_global_2B(ptr, unsigned)                the low half
//   store_global_f32(ptr, float)
//
// Shared memory (addresses are byte offsets into the block's dynamic shared memory, of type SharedAddress)
//   load_shared_16B(Vec16&, address)              address 16-byte aligned
//   load_shared_2B(address) -> unsigned
//   load_shared_f32(address) -> float
//   store_shared_16B(address, Vec16)
//   store_shared_4B(address, unsigned)
//   store_shared_f32(address, float)
//   store_shared_2B(address, unsigned)            the low half
//   ldmatrix_x4(unsigned (&r)[4], address)        warp-wide: lanes 8i..8i+7 give the 8 row addresses (16 bytes each) of
//   ldmatrix_x4_trans(r, address)                 8x8 matrix i; lane l gets in r[i] the elements (l/4, 2(l%4)..+1) of
//   ldmatrix_x2(unsigned (&r)[2], address)        matrix i, of its transpose for _trans. x2: lanes 0..15 give addresses
//   ldmatrix_x2_trans(r, address)                 and x1: lanes 0..7
//   ldmatrix_x1(unsigned& r, address)
//   ldmatrix_x1_trans(r, address)
//
// Warp and block
//   shuffle(unsigned, lane) -> unsigned           what that lane gives
//   shuffle_xor(float, lane_mask) -> float        what the lane gives whose number differs by the mask
//   any_in_warp(bool) -> bool
//   any_in_block(bool) -> bool                    a barrier of the block, too
//   warp_barrier()                                orders this warp's shared-memory accesses
//   block_barrier()                               the same for the whole block
//
// Arithmetic
//   exp2_approx(float), log2_approx(float)        ex2.approx.ftz, lg2.approx
//   reciprocal(float)                             rcp.approx.ftz: 1/x to 1 ulp; 1/0 is inf
//   sqrt_approx(float), rsqrt_approx(float)       to 1 and 2 ulp
//   absolute(float)
//   round_down, round_up, round_to_zero, round_to_even(float) -> float   to a whole number
//   to_int(float) -> int                          towards 0; beyond int's range its end, NaN to 0
//   max_ignoring_nan(float, float)
//   saturate(float)                               to 0 ... 1; NaN to 0
//   fma_rounded(a, b, c)                          one rounding
//   multiply_rounded(a, b)                        never made one with an addition
//   infinity(), not_a_number(), is_nan(float)
//   float_of_bits(unsigned) -> float, bits_of_float(float) -> unsigned
//   low_halves(a, b), high_halves(a, b)           those of a in the low half, of b in the high half
//   select_bytes(a, b, selector)                  byte i is that of a (0 to 3) or b (4 to 7) in digit i of the selector
//
// Elements: what products are made of, 16 bits each, two in a register. A struct for every type; the kernels know it as
// Traits::Element. There is Fp16. What tensors are made of may be another type: stored.cuh.
//   Element::Bits                                 one as it lies in memory
//   Element::pack(lo, hi) -> unsigned             two floats rounded to nearest even, lo in the low half
//   Element::pack_toward_zero(lo, hi) -> unsigned  two floats cut off: finite ones beyond 65504 become that
//   Element::low(unsigned), high(unsigned) -> float  the halves of a pair, exact
//   Element::multiply_add(float (&c)[4], a0, a1, b)  c += A (16x8) B (8x8), warp-wide, fp32 accumulation: mma_m16n8k8
//   Element::multiply(float (&c)[4], a0, a1, b)   c  = A B
//
// Fragments of mma_m16n8k8 in a warp, g = lane / 4, t = lane % 4:
//
//   A 16x8: a0 = (row g, cols 2t, 2t+1)     B 8x8: b = (rows 2t, 2t+1, col g)     C 16x8: c0 c1 = (row g,   cols 2t, 2t+1)
//           a1 = (row g+8, cols 2t, 2t+1)                                                 c2 c3 = (row g+8, cols 2t, 2t+1)
//
// so C's layout, packed pair by pair, is A's: the probabilities of one product are the A operand of the next.
#pragma once

struct alignas(16) Vec16 {
  unsigned word[4];
};

using SharedAddress = unsigned;

#ifdef FLASH_ATTN_JIT_HOST
#include "primitives_host.cuh"
#else
#include "primitives_cuda.cuh"
#endif
