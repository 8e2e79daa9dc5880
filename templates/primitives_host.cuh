// The host half of primitives.cuh. What touches memory or other threads goes to the interpreter's engine through the
// table of host_engine.cuh; arithmetic is done here. No standard header: a kernel compiles in a fraction of the time.
#pragma once

#include "host_engine.cuh"

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)

#define FLASH_ATTN_JIT_EXPORT extern "C" __attribute__((visibility("default")))

// What the interpreter looks up: the table to fill in, and the kernel's body for one thread.
FLASH_ATTN_JIT_EXPORT HostEngine flash_attn_jit_engine;
HostEngine flash_attn_jit_engine;
FLASH_ATTN_JIT_EXPORT void flash_attn_jit_thread(const void* params);

// The template's line that called a primitive, as trailing default arguments of it.
#define FLASH_ATTN_JIT_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline int thread_in_block() { return flash_attn_jit_engine.thread_in_block(); }
inline int block_in_grid() { return flash_attn_jit_engine.block_in_grid(); }
inline int reread_thread_in_block() { return thread_in_block(); }
inline int reread_block_in_grid() { return block_in_grid(); }

// ---- global memory ----

inline void load_global_16B(Vec16& v, const void* p, FLASH_ATTN_JIT_SITE) {
  flash_attn_jit_engine.load_global(HostAccess::kLoadGlobal16B, &v, p, file, line);
}

inline void load_global_8B(unsigned& a, unsigned& b, const void* p, FLASH_ATTN_JIT_SITE) {
  unsigned v[2];
  flash_attn_jit_engine.load_global(HostAccess::kLoadGlobal8B, v, p, file, line);
  a = v[0];
  b = v[1];
}

inline unsigned load_global_2B(const void* p, FLASH_ATTN_JIT_SITE) {
  unsigned short v;
  flash_attn_jit_engine.load_global(HostAccess::kLoadGlobal2B, &v, p, file, line);
  return v;
}

inline unsigned load_global_1B(const void* p, FLASH_ATTN_JIT_SITE) {
  unsigned char v;
  flash_attn_jit_engine.load_global(HostAccess::kLoadGlobal1B, &v, p, file, line);
  return v;
}

inline float load_global_f32(const float* p, FLASH_ATTN_JIT_SITE) {
  float v;
  flash_attn_jit_engine.load_global(HostAccess::kLoadGlobalF32, &v, p, file, line);
  return v;
}

inline int load_global_i32(const int* p, FLASH_ATTN_JIT_SITE) {
  int v;
  flash_attn_jit_engine.load_global(HostAccess::kLoadGlobalI32, &v, p, file, line);
  return v;
}

inline float load_constant_f32(const float* p, FLASH_ATTN_JIT_SITE) { return load_global_f32(p, file, line); }
inline int load_constant_i32(const int* p, FLASH_ATTN_JIT_SITE) { return load_global_i32(p, file, line); }
inline unsigned load_constant_2B(const void* p, FLASH_ATTN_JIT_SITE) { return load_global_2B(p, file, line); }
inline unsigned load_constant_1B(const void* p, FLASH_ATTN_JIT_SITE) { return load_global_1B(p, file, line); }

inline long long load_constant_i64(const long long* p, FLASH_ATTN_JIT_SITE) {
  long long v;
  flash_attn_jit_engine.load_global(HostAccess::kLoadGlobal8B, &v, p, file, line);
  return v;
}

inline void store_global_16B(void* p, const Vec16& v, FLASH_ATTN_JIT_SITE) {
  flash_attn_jit_engine.store_global(HostAccess::kStoreGlobal16B, p, &v, file, line);
}

inline void store_global_2B(void* p, unsigned v, FLASH_ATTN_JIT_SITE) {
  const unsigned short low = static_cast<unsigned short>(v);
  flash_attn_jit_engine.store_global(HostAccess::kStoreGlobal2B, p, &low, file, line);
}

inline void store_global_f32(float* p, float v, FLASH_ATTN_JIT_SITE) {
  flash_attn_jit_engine.store_global(HostAccess::kStoreGlobalF32, p, &v, file, line);
}

// ---- shared memory ----

inline void load_shared_16B(Vec16& v, SharedAddress a, FLASH_ATTN_JIT_SITE) {
  flash_attn_jit_engine.load_shared(HostAccess::kLoadShared16B, &v, a, file, line);
}

inline unsigned load_shared_2B(SharedAddress a, FLASH_ATTN_JIT_SITE) {
  unsigned short v;
  flash_attn_jit_engine.load_shared(HostAccess::kLoadShared2B, &v, a, file, line);
  return v;
}

inline float load_shared_f32(SharedAddress a, FLASH_ATTN_JIT_SITE) {
  float v;
  flash_attn_jit_engine.load_shared(HostAccess::kLoadSharedF32, &v, a, file, line);
  return v;
}

inline void store_shared_16B(SharedAddress a, const Vec16& v, FLASH_ATTN_JIT_SITE) {
  flash_attn_jit_engine.store_shared(HostAccess::kStoreShared16B, a, &v, file, line);
}

inline void store_shared_4B(SharedAddress a, unsigned v, FLASH_ATTN_JIT_SITE) {
  flash_attn_jit_engine.store_shared(HostAccess::kStoreShared4B, a, &v, file, line);
}

inline void store_shared_f32(SharedAddress a, float v, FLASH_ATTN_JIT_SITE) {
  flash_attn_jit_engine.store_shared(HostAccess::kStoreShared4B, a, &v, file, line);
}

inline void store_shared_2B(SharedAddress a, unsigned v, FLASH_ATTN_JIT_SITE) {
  const unsigned short low = static_cast<unsigned short>(v);
  flash_attn_jit_engine.store_shared(HostAccess::kStoreShared2B, a, &low, file, line);
}

inline void ldmatrix_x4(unsigned (&r)[4], SharedAddress a, FLASH_ATTN_JIT_SITE) {
  flash_attn_jit_engine.ldmatrix(HostAccess::kLdmatrixX4, r, a, file, line);
}

inline void ldmatrix_x4_trans(unsigned (&r)[4], SharedAddress a, FLASH_ATTN_JIT_SITE) {
  flash_attn_jit_engine.ldmatrix(HostAccess::kLdmatrixX4Trans, r, a, file, line);
}

inline void ldmatrix_x2(unsigned (&r)[2], SharedAddress a, FLASH_ATTN_JIT_SITE) {
  flash_attn_jit_engine.ldmatrix(HostAccess::kLdmatrixX2, r, a, file, line);
}

inline void ldmatrix_x2_trans(unsigned (&r)[2], SharedAddress a, FLASH_ATTN_JIT_SITE) {
  flash_attn_jit_engine.ldmatrix(HostAccess::kLdmatrixX2Trans, r, a, file, line);
}

inline void ldmatrix_x1(unsigned& r, SharedAddress a, FLASH_ATTN_JIT_SITE) {
  flash_attn_jit_engine.ldmatrix(HostAccess::kLdmatrixX1, &r, a, file, line);
}

inline void ldmatrix_x1_trans(unsigned& r, SharedAddress a, FLASH_ATTN_JIT_SITE) {
  flash_attn_jit_engine.ldmatrix(HostAccess::kLdmatrixX1Trans, &r, a, file, line);
}

// ---- warp and block ----

inline unsigned shuffle(unsigned v, int lane, FLASH_ATTN_JIT_SITE) {
  return flash_attn_jit_engine.shuffle(v, lane, file, line);
}

inline float shuffle_xor(float v, int lane_mask, FLASH_ATTN_JIT_SITE) {
  unsigned bits;
  __builtin_memcpy(&bits, &v, sizeof bits);
  bits = flash_attn_jit_engine.shuffle(bits, (thread_in_block() % 32) ^ lane_mask, file, line);
  __builtin_memcpy(&v, &bits, sizeof v);
  return v;
}

inline bool any_in_warp(bool p, FLASH_ATTN_JIT_SITE) { return flash_attn_jit_engine.any_in_warp(p, file, line) != 0; }

inline bool any_in_block(bool p, FLASH_ATTN_JIT_SITE) { return flash_attn_jit_engine.any_in_block(p, file, line) != 0; }

inline void warp_barrier(FLASH_ATTN_JIT_SITE) { flash_attn_jit_engine.warp_barrier(file, line); }
inline void block_barrier(FLASH_ATTN_JIT_SITE) { flash_attn_jit_engine.block_barrier(file, line); }

// ---- arithmetic ----

inline unsigned float_bits(float x) {
  unsigned u;
  __builtin_memcpy(&u, &x, sizeof u);
  return u;
}

inline float bits_float(unsigned u) {
  float x;
  __builtin_memcpy(&x, &u, sizeof x);
  return x;
}

// .ftz: a subnormal becomes a zero of its sign.
inline float flush_subnormal(float x) { return __builtin_fabsf(x) < 0x1p-126f ? __builtin_copysignf(0.0f, x) : x; }

inline float exp2_approx(float x) { return flush_subnormal(__builtin_exp2f(flush_subnormal(x))); }
inline float log2_approx(float x) { return __builtin_log2f(x); }
inline float reciprocal(float x) { return flush_subnormal(1.0f / flush_subnormal(x)); }
inline float sqrt_approx(float x) { return __builtin_sqrtf(x); }
inline float rsqrt_approx(float x) { return 1.0f / __builtin_sqrtf(x); }
inline float absolute(float x) { return __builtin_fabsf(x); }
inline float round_down(float x) { return __builtin_floorf(x); }
inline float round_up(float x) { return __builtin_ceilf(x); }
inline float round_to_zero(float x) { return __builtin_truncf(x); }
inline float round_to_even(float x) { return __builtin_nearbyintf(x); }

inline int to_int(float x) {
  if (x != x) return 0;
  if (x >= 0x1p31f) return 2147483647;
  return x > -0x1p31f ? static_cast<int>(x) : -2147483647 - 1;
}

inline float saturate(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }
inline float multiply_rounded(float a, float b) {
  volatile float product = a * b;
  return product;
}
inline float fma_rounded(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline float infinity() { return __builtin_inff(); }
inline float not_a_number() { return __builtin_nanf(""); }
inline bool is_nan(float x) { return x != x; }

// As max.f32: the other one where one is NaN, and +0 above -0.
inline float max_ignoring_nan(float a, float b) {
  if (a != a) return b;
  if (b != b) return a;
  if (a != b) return a > b ? a : b;
  return bits_float(float_bits(a) & float_bits(b));
}

inline float float_of_bits(unsigned u) { return bits_float(u); }
inline unsigned bits_of_float(float x) { return float_bits(x); }
inline unsigned low_halves(unsigned a, unsigned b) { return (a & 0xffffu) | b << 16; }
inline unsigned high_halves(unsigned a, unsigned b) { return a >> 16 | (b & 0xffff0000u); }

inline unsigned select_bytes(unsigned a, unsigned b, unsigned selector) {
  const unsigned long long both = static_cast<unsigned long long>(b) << 32 | a;
  unsigned r = 0;
  for (int i = 0; i < 4; ++i) r |= (both >> (selector >> 4 * i & 7u) * 8 & 0xffu) << 8 * i;
  return r;
}

// ---- elements ----

struct Fp16 {
  using Bits = unsigned short;

  static float low(unsigned pair) {
    const unsigned magnitude = pair & 0x7fffu, sign = (pair & 0x8000u) << 16;
    if (magnitude >= 0x7c00u) return bits_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
    // The exponent's bias differs by 112; the product is exact, subnormals included.
    return bits_float(sign | float_bits(bits_float(magnitude << 13) * 0x1p112f));
  }

  static float high(unsigned pair) { return low(pair >> 16); }

  // As cvt.rn.f16.f32: rounds to nearest even, above 65504 and its rounding to infinity, NaN to 0x7fff.
  static unsigned bits(float x) {
    const unsigned sign = float_bits(x) >> 16 & 0x8000u;
    const unsigned magnitude = float_bits(x) & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return 0x7fffu;
    if (magnitude >= 0x477ff000u) return sign | 0x7c00u;
    // Below 2^-14 fp16 counts in steps of 2^-24, which is the last bit of a float next to 0.5.
    if (magnitude < 0x38800000u) return sign | (float_bits(bits_float(magnitude) + 0.5f) - float_bits(0.5f));
    const unsigned half_way = 0xfffu + (magnitude >> 13 & 1u);
    return sign | (((magnitude + half_way) >> 13) - (112u << 10));
  }

  // As cvt.rz.f16.f32: cut off, so that what is finite stays finite.
  static unsigned bits_toward_zero(float x) {
    const unsigned sign = float_bits(x) >> 16 & 0x8000u;
    const unsigned magnitude = float_bits(x) & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return 0x7fffu;
    if (magnitude == 0x7f800000u) return sign | 0x7c00u;
    if (magnitude >= 0x47800000u) return sign | 0x7bffu;
    if (magnitude < 0x38800000u) return sign | static_cast<unsigned>(bits_float(magnitude) * 0x1p24f);
    return sign | ((magnitude >> 13) - (112u << 10));
  }

  static unsigned pack(float lo, float hi) { return bits(lo) | bits(hi) << 16; }
  static unsigned pack_toward_zero(float lo, float hi) { return bits_toward_zero(lo) | bits_toward_zero(hi) << 16; }

  static void multiply_add(float (&c)[4], unsigned a0, unsigned a1, unsigned b, FLASH_ATTN_JIT_SITE) {
    flash_attn_jit_engine.mma(1, c, a0, a1, b, file, line);
  }

  static void multiply(float (&c)[4], unsigned a0, unsigned a1, unsigned b, FLASH_ATTN_JIT_SITE) {
    flash_attn_jit_engine.mma(0, c, a0, a1, b, file, line);
  }
};

// ---- undefined behaviour: the handlers that -fsanitize=undefined calls, so that no sanitizer library is needed.
// What each is given starts with the place in the source. ----

struct SanitizerPlace {
  const char* file;
  unsigned line, column;
};

#define FLASH_ATTN_JIT_HANDLER(name, what)                                                                   \
  extern "C" __attribute__((visibility("hidden"))) void __ubsan_handle_##name(const SanitizerPlace* place) { \
    flash_attn_jit_engine.undefined_behaviour(what, place->file, static_cast<int>(place->line));             \
  }

FLASH_ATTN_JIT_HANDLER(add_overflow, "a signed addition overflows")
FLASH_ATTN_JIT_HANDLER(sub_overflow, "a signed subtraction overflows")
FLASH_ATTN_JIT_HANDLER(mul_overflow, "a signed multiplication overflows")
FLASH_ATTN_JIT_HANDLER(negate_overflow, "a signed negation overflows")
FLASH_ATTN_JIT_HANDLER(divrem_overflow, "a division by zero, or one that overflows")
FLASH_ATTN_JIT_HANDLER(shift_out_of_bounds, "a shift by too much, by a negative amount or of a negative value")
FLASH_ATTN_JIT_HANDLER(out_of_bounds, "an array index out of bounds")
FLASH_ATTN_JIT_HANDLER(local_out_of_bounds, "an access outside its object")
FLASH_ATTN_JIT_HANDLER(load_invalid_value, "a bool or enum holds no value of its type")
FLASH_ATTN_JIT_HANDLER(float_cast_overflow, "a float that its integer type cannot hold")
FLASH_ATTN_JIT_HANDLER(vla_bound_not_positive, "an array of no positive length")
FLASH_ATTN_JIT_HANDLER(builtin_unreachable, "unreachable code is reached")
FLASH_ATTN_JIT_HANDLER(missing_return, "a function ends without a return")
#undef FLASH_ATTN_JIT_HANDLER
