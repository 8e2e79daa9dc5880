// What a user's functions read of the tensors that they capture, for the code that is made of them. Nothing outside of
// a tensor is read, whatever the indices: rows of a tile beyond the sequence have places, too.
#pragma once

#include "attention_params.cuh"
#include "primitives.cuh"
#include "python_arithmetic.cuh"
#include "transcendental.cuh"

// Elements in memory: `Value` is what they are computed with.
template <class Stored>
struct UserNarrowInt {
  using Value = int;
  static __device__ __forceinline__ int load(const void* data, long long at) {
    if constexpr (sizeof(Stored) == 1)
      return static_cast<Stored>(load_constant_1B(static_cast<const char*>(data) + at));
    else
      return static_cast<Stored>(load_constant_2B(static_cast<const char*>(data) + at * 2));
  }
};
using UserInt8 = UserNarrowInt<signed char>;
using UserUint8 = UserNarrowInt<unsigned char>;
using UserInt16 = UserNarrowInt<short>;

struct UserBool {
  using Value = bool;
  static __device__ __forceinline__ bool load(const void* data, long long at) {
    return load_constant_1B(static_cast<const char*>(data) + at) != 0;
  }
};

struct UserInt32 {
  using Value = int;
  static __device__ __forceinline__ int load(const void* data, long long at) {
    return load_constant_i32(static_cast<const int*>(data) + at);
  }
};

struct UserInt64 {
  using Value = long long;
  static __device__ __forceinline__ long long load(const void* data, long long at) {
    return load_constant_i64(static_cast<const long long*>(data) + at);
  }
};

struct UserFloat32 {
  using Value = float;
  static __device__ __forceinline__ float load(const void* data, long long at) {
    return load_constant_f32(static_cast<const float*>(data) + at);
  }
};

struct UserFloat16 {
  using Value = float;
  static __device__ __forceinline__ float load(const void* data, long long at) {
    return Fp16::low(load_constant_2B(static_cast<const char*>(data) + at * 2));
  }
};

struct UserBfloat16 {
  using Value = float;
  static __device__ __forceinline__ float load(const void* data, long long at) {
    return float_of_bits(load_constant_2B(static_cast<const char*>(data) + at * 2) << 16);
  }
};

// A dimension's part of an element's place. An index below 0 counts from the end; beyond the ends it is that at the
// last. `Offset` counts the tensor's elements, `kIsUnit`: neighbours of the dimension are neighbours in memory.
template <class Offset, bool kMayBeNegative, bool kIsUnit, class Index>
__device__ __forceinline__ Offset user_offset(const UserTensor& tensor, int dim, Index index) {
  const int size = tensor.sizes[dim];
  if (kMayBeNegative && index < 0) index += size;
  const Index last = size - 1;
  const bool is_inside = kMayBeNegative ? 0 <= index && index <= last : index <= last;
  const int at = static_cast<int>(is_inside ? index : last);
  return kIsUnit ? at : at * static_cast<Offset>(tensor.strides[dim]);
}

template <class Element>
__device__ __forceinline__ typename Element::Value load_user(const UserTensor& tensor, long long offset) {
  return Element::load(tensor.data, offset);
}
