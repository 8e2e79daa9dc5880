// torch tensors read from C++ without building against torch.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>
#include <optional>
#include <string>

namespace flash_attn_jit::bindings {

enum class DeviceKind { kCpu, kCuda, kOther };

struct Device {
  DeviceKind kind = DeviceKind::kOther;
  int ordinal = 0;  // of a CUDA device; 0 elsewhere
  friend bool operator==(const Device&, const Device&) = default;
};

enum class ElementType { kFloat16, kBFloat16, kFloat32, kInt32, kBool, kOther };

// What a launch needs to know of a tensor. Valid while the Python object lives.
struct TensorInfo {
  static constexpr int kMaxRank = 4;  // no argument has more; beyond it only the rank is kept

  void* data = nullptr;
  Device device;
  ElementType dtype = ElementType::kOther;
  int rank = 0;
  std::array<std::int64_t, kMaxRank> shape{};
  std::array<std::int64_t, kMaxRank> strides{};  // in elements

  bool has_elements() const;
};

// Looks up what is read of torch; called once, when the package is imported.
void connect_torch(pybind11::module_ torch);

// The metadata of `tensor`: through DLPack's C exchange interface where torch.Tensor has it, else by reading
// its Python attributes. `argument` names it in errors. Throws ArgumentError for what is no dense tensor.
TensorInfo read_tensor(pybind11::handle tensor, const char* argument);

// torch's current stream on a CUDA device, as an opaque CUstream.
void* current_cuda_stream(int ordinal);

// torch.empty(count), of float32, on the device of `like`.
pybind11::object empty_floats(std::int64_t count, pybind11::handle like);

// Whether read_tensor goes through the exchange interface.
bool uses_exchange_api();

// What is accepted, in words.
inline constexpr const char* kAcceptedDtype = "torch.float16 or torch.bfloat16";
inline constexpr const char* kAcceptedDevice =
    "a CUDA device, or the CPU in the interpreter, slow and checked: set FLASH_ATTN_JIT_INTERPRET=1 before Python "
    "starts";
inline constexpr const char* kAcceptedDevices = "all on one device";

// As Python prints them: "torch.float16", "cuda:1", "(2, 128, 8, 64)"; and what an object is: "an int", "None".
std::string dtype_text(pybind11::handle tensor);
std::string device_text(pybind11::handle tensor);
std::string shape_text(pybind11::handle tensor);
std::string strides_text(pybind11::handle tensor);
std::string kind_text(pybind11::handle object);

}  // namespace flash_attn_jit::bindings
