// The CUDA half of primitives.cuh: inline PTX, because NVRTC compiles this with no header and no include path.
#pragma once

extern __shared__ unsigned char dynamic_shared_memory[];

__device__ __forceinline__ int thread_in_block() { return threadIdx.x; }
__device__ __forceinline__ int block_in_grid() { return blockIdx.x; }

__device__ __forceinline__ int reread_thread_in_block() {
  int i;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(i));
  return i;
}

__device__ __forceinline__ int reread_block_in_grid() {
  int i;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(i));
  return i;
}

// ---- global memory: volatile, so that a load stays far ahead of the store that uses its value ----

__device__ __forceinline__ void load_global_16B(Vec16& v, const void* p) {
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
               : "l"(p));
}

__device__ __forceinline__ void load_global_8B(unsigned& a, unsigned& b, const void* p) {
  asm volatile("ld.global.v2.u32 {%0, %1}, [%2];" : "=r"(a), "=r"(b) : "l"(p));
}

__device__ __forceinline__ unsigned load_global_2B(const void* p) {
  unsigned short v;
  asm volatile("ld.global.u16 %0, [%1];" : "=h"(v) : "l"(p));
  return v;
}

__device__ __forceinline__ unsigned load_global_1B(const void* p) {
  unsigned v;
  asm volatile("ld.global.u8 %0, [%1];" : "=r"(v) : "l"(p));
  return v;
}

__device__ __forceinline__ float load_global_f32(const float* p) {
  float v;
  asm volatile("ld.global.f32 %0, [%1];" : "=f"(v) : "l"(p));
  return v;
}

__device__ __forceinline__ int load_global_i32(const int* p) {
  int v;
  asm volatile("ld.global.s32 %0, [%1];" : "=r"(v) : "l"(p));
  return v;
}

__device__ __forceinline__ void store_global_16B(void* p, const Vec16& v) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.word[0]), "r"(v.word[1]), "r"(v.word[2]),
               "r"(v.word[3])
               : "memory");
}

__device__ __forceinline__ void store_global_2B(void* p, unsigned v) {
  asm volatile("st.global.u16 [%0], %1;" ::"l"(p), "h"(static_cast<unsigned short>(v)) : "memory");
}

__device__ __forceinline__ void store_global_f32(float* p, float v) {
  asm volatile("st.global.f32 [%0], %1;" ::"l"(p), "f"(v) : "memory");
}

// ---- the same of what no kernel writes: not volatile, so that loads of one address become one and leave loops ----

__device__ __forceinline__ float load_constant_f32(const float* p) {
  float v;
  asm("ld.global.nc.f32 %0, [%1];" : "=f"(v) : "l"(p));
  return v;
}

__device__ __forceinline__ int load_constant_i32(const int* p) {
  int v;
  asm("ld.global.nc.s32 %0, [%1];" : "=r"(v) : "l"(p));
  return v;
}

__device__ __forceinline__ long long load_constant_i64(const long long* p) {
  long long v;
  asm("ld.global.nc.s64 %0, [%1];" : "=l"(v) : "l"(p));
  return v;
}

__device__ __forceinline__ unsigned load_constant_2B(const void* p) {
  unsigned short v;
  asm("ld.global.nc.u16 %0, [%1];" : "=h"(v) : "l"(p));
  return v;
}

__device__ __forceinline__ unsigned load_constant_1B(const void* p) {
  unsigned v;
  asm("ld.global.nc.u8 %0, [%1];" : "=r"(v) : "l"(p));
  return v;
}

// ---- shared memory: the kernels have no static shared memory, so that dynamic_shared_memory lies at address 0 of
// the window on every architecture below sm_90; there the runtime reserves the first KiB, hence the base ----

__device__ __forceinline__ unsigned shared_window(SharedAddress a) {
  return a + static_cast<unsigned>(__cvta_generic_to_shared(dynamic_shared_memory));
}

__device__ __forceinline__ void load_shared_16B(Vec16& v, SharedAddress a) {
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
               : "r"(shared_window(a))
               : "memory");
}

__device__ __forceinline__ unsigned load_shared_2B(SharedAddress a) {
  unsigned short v;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(v) : "r"(shared_window(a)) : "memory");
  return v;
}

__device__ __forceinline__ float load_shared_f32(SharedAddress a) {
  float v;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(shared_window(a)) : "memory");
  return v;
}

__device__ __forceinline__ void store_shared_16B(SharedAddress a, const Vec16& v) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(shared_window(a)), "r"(v.word[0]), "r"(v.word[1]),
               "r"(v.word[2]), "r"(v.word[3])
               : "memory");
}

__device__ __forceinline__ void store_shared_4B(SharedAddress a, unsigned v) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(shared_window(a)), "r"(v) : "memory");
}

__device__ __forceinline__ void store_shared_f32(SharedAddress a, float v) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(shared_window(a)), "f"(v) : "memory");
}

__device__ __forceinline__ void store_shared_2B(SharedAddress a, unsigned v) {
  asm volatile("st.shared.u16 [%0], %1;" ::"r"(shared_window(a)), "h"(static_cast<unsigned short>(v)) : "memory");
}

__device__ __forceinline__ void ldmatrix_x4(unsigned (&r)[4], SharedAddress a) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_window(a))
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x4_trans(unsigned (&r)[4], SharedAddress a) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_window(a))
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x2(unsigned (&r)[2], SharedAddress a) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_window(a))
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x2_trans(unsigned (&r)[2], SharedAddress a) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_window(a))
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x1(unsigned& r, SharedAddress a) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(r) : "r"(shared_window(a)) : "memory");
}

__device__ __forceinline__ void ldmatrix_x1_trans(unsigned& r, SharedAddress a) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
               : "=r"(r)
               : "r"(shared_window(a))
               : "memory");
}

// ---- warp and block ----

__device__ __forceinline__ unsigned shuffle(unsigned v, int lane) {
  unsigned r;
  asm volatile("shfl.sync.idx.b32 %0, %1, %2, 31, 0xffffffff;" : "=r"(r) : "r"(v), "r"(lane));
  return r;
}

__device__ __forceinline__ float shuffle_xor(float v, int lane_mask) {
  float r;
  asm volatile("shfl.sync.bfly.b32 %0, %1, %2, 31, 0xffffffff;" : "=f"(r) : "f"(v), "r"(lane_mask));
  return r;
}

__device__ __forceinline__ bool any_in_warp(bool p) {
  int r;
  asm volatile(
      "{ .reg .pred p, q;\n setp.ne.s32 p, %1, 0;\n vote.sync.any.pred q, p, 0xffffffff;\n selp.s32 %0, 1, 0, q; }"
      : "=r"(r)
      : "r"(static_cast<int>(p)));
  return r != 0;
}

__device__ __forceinline__ bool any_in_block(bool p) {
  int r;
  asm volatile("{ .reg .pred p, q;\n setp.ne.s32 p, %1, 0;\n bar.red.or.pred q, 0, p;\n selp.s32 %0, 1, 0, q; }"
               : "=r"(r)
               : "r"(static_cast<int>(p))
               : "memory");
  return r != 0;
}

__device__ __forceinline__ void warp_barrier() { asm volatile("bar.warp.sync 0xffffffff;" ::: "memory"); }
__device__ __forceinline__ void block_barrier() { asm volatile("bar.sync 0;" ::: "memory"); }

// ---- arithmetic ----

__device__ __forceinline__ float exp2_approx(float x) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}

__device__ __forceinline__ float log2_approx(float x) {
  float r;
  asm("lg2.approx.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}

__device__ __forceinline__ float reciprocal(float x) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}

__device__ __forceinline__ float sqrt_approx(float x) {
  float r;
  asm("sqrt.approx.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}

__device__ __forceinline__ float rsqrt_approx(float x) {
  float r;
  asm("rsqrt.approx.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}

__device__ __forceinline__ float absolute(float x) {
  float r;
  asm("abs.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}

__device__ __forceinline__ float round_down(float x) {
  float r;
  asm("cvt.rmi.f32.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}

__device__ __forceinline__ float round_up(float x) {
  float r;
  asm("cvt.rpi.f32.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}

__device__ __forceinline__ float round_to_zero(float x) {
  float r;
  asm("cvt.rzi.f32.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}

__device__ __forceinline__ float round_to_even(float x) {
  float r;
  asm("cvt.rni.f32.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}

__device__ __forceinline__ int to_int(float x) {
  int r;
  asm("cvt.rzi.s32.f32 %0, %1;" : "=r"(r) : "f"(x));
  return r;
}

__device__ __forceinline__ float max_ignoring_nan(float a, float b) {
  float r;
  asm("max.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
}

__device__ __forceinline__ float saturate(float x) {
  float r;
  asm("mul.sat.f32 %0, %1, 0f3F800000;" : "=f"(r) : "f"(x));
  return r;
}

__device__ __forceinline__ float multiply_rounded(float a, float b) {
  float product;
  asm("mul.rn.f32 %0, %1, %2;" : "=f"(product) : "f"(a), "f"(b));
  return product;
}

__device__ __forceinline__ float fma_rounded(float a, float b, float c) {
  float r;
  asm("fma.rn.f32 %0, %1, %2, %3;" : "=f"(r) : "f"(a), "f"(b), "f"(c));
  return r;
}

__device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }
__device__ __forceinline__ float not_a_number() { return __int_as_float(0x7fffffff); }
__device__ __forceinline__ bool is_nan(float x) { return x != x; }

__device__ __forceinline__ float float_of_bits(unsigned u) { return __uint_as_float(u); }
__device__ __forceinline__ unsigned bits_of_float(float x) { return __float_as_uint(x); }

__device__ __forceinline__ unsigned low_halves(unsigned a, unsigned b) {
  unsigned r;
  asm("prmt.b32 %0, %1, %2, 0x5410;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}

__device__ __forceinline__ unsigned select_bytes(unsigned a, unsigned b, unsigned selector) {
  unsigned r;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(selector));
  return r;
}

__device__ __forceinline__ unsigned high_halves(unsigned a, unsigned b) {
  unsigned r;
  asm("prmt.b32 %0, %1, %2, 0x7632;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}

// ---- elements ----

struct Fp16 {
  using Bits = unsigned short;

  static __device__ __forceinline__ float low(unsigned pair) {
    float r;
    asm("{ .reg .b16 l, h;\n mov.b32 {l, h}, %1;\n cvt.f32.f16 %0, l; }" : "=f"(r) : "r"(pair));
    return r;
  }

  static __device__ __forceinline__ float high(unsigned pair) { return low(pair >> 16); }

  static __device__ __forceinline__ unsigned pack(float lo, float hi) {
    unsigned r;
#if __CUDA_ARCH__ >= 800
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
#else
    asm("{ .reg .b16 l, h;\n cvt.rn.f16.f32 l, %1;\n cvt.rn.f16.f32 h, %2;\n mov.b32 %0, {l, h}; }"
        : "=r"(r)
        : "f"(lo), "f"(hi));
#endif
    return r;
  }

  static __device__ __forceinline__ unsigned pack_toward_zero(float lo, float hi) {
    unsigned r;
#if __CUDA_ARCH__ >= 800
    asm("cvt.rz.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
#else
    asm("{ .reg .b16 l, h;\n cvt.rz.f16.f32 l, %1;\n cvt.rz.f16.f32 h, %2;\n mov.b32 %0, {l, h}; }"
        : "=r"(r)
        : "f"(lo), "f"(hi));
#endif
    return r;
  }

  static __device__ __forceinline__ void multiply_add(float (&c)[4], unsigned a0, unsigned a1, unsigned b) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a0), "r"(a1), "r"(b));
  }

  static __device__ __forceinline__ void multiply(float (&c)[4], unsigned a0, unsigned a1, unsigned b) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%7, %7, %7, %7};"
                 : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])
                 : "r"(a0), "r"(a1), "r"(b), "f"(0.0f));
  }
};
