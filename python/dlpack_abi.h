// The part of DLPack's C exchange interface (version 1) that reading a tensor takes. Its layout is a public
// ABI: https://dmlc.github.io/dlpack/latest/c_api.html
#pragma once

#include <cstdint>

namespace flash_attn_jit::dlpack {

inline constexpr char kExchangeAttribute[] = "__dlpack_c_exchange_api__";  // of the tensor's type, a capsule
inline constexpr char kCapsuleName[] = "dlpack_exchange_api";
inline constexpr std::uint32_t kMajorVersion = 1;

enum DeviceType : std::int32_t { kCPU = 1, kCUDA = 2 };
enum TypeCode : std::uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBFloat = 4, kComplex = 5, kBool = 6 };

struct Device {
  std::int32_t type;
  std::int32_t id;
};

struct DataType {
  std::uint8_t code;
  std::uint8_t bits;
  std::uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  std::int32_t ndim;
  DataType dtype;
  std::int64_t* shape;
  std::int64_t* strides;  // in elements
  std::uint64_t byte_offset;
};

struct Version {
  std::uint32_t major;
  std::uint32_t minor;
};

struct ExchangeHeader {
  Version version;
  ExchangeHeader* previous;  // the table of an older major version, or null
};

struct ExchangeApi {
  ExchangeHeader header;
  void* managed_tensor_allocator;
  void* managed_tensor_from_object;
  void* managed_tensor_to_object;
  // Fills `out` with a view of the tensor `object`; -1 with a Python exception set where it cannot. May be
  // null.
  int (*tensor_from_object)(void* object, Tensor* out);
  // The producer's current stream on a device; -1 with a Python exception set where it cannot.
  int (*current_stream)(std::int32_t device_type, std::int32_t device_id, void** out);
};

}  // namespace flash_attn_jit::dlpack
