#include "python/bindings_tensors.h"

#include <algorithm>

#include "generator/errors.h"
#include "python/dlpack_abi.h"

namespace py = pybind11;

namespace flash_attn_jit::bindings {
namespace {

// What is read of torch. Leaked, because it must outlive the interpreter's own teardown.
struct Torch {
  const dlpack::ExchangeApi* exchange = nullptr;  // null: read attributes instead
  py::object tensor_type, float16, bfloat16, float32, int32, boolean;
  py::object current_stream_of;  // an ordinal's raw stream
  py::object empty;
  py::tuple empty_keywords = py::make_tuple("dtype", "device");
};
Torch* torch = nullptr;

const dlpack::ExchangeApi* find_exchange_api(const py::object& tensor_type) {
  if (!py::hasattr(tensor_type, dlpack::kExchangeAttribute)) return nullptr;
  const py::object capsule = tensor_type.attr(dlpack::kExchangeAttribute);
  if (!PyCapsule_IsValid(capsule.ptr(), dlpack::kCapsuleName)) return nullptr;
  auto* header = static_cast<dlpack::ExchangeHeader*>(PyCapsule_GetPointer(capsule.ptr(), dlpack::kCapsuleName));
  while (header && header->version.major != dlpack::kMajorVersion) header = header->previous;
  const auto* api = reinterpret_cast<const dlpack::ExchangeApi*>(header);
  return api && api->tensor_from_object && api->current_stream ? api : nullptr;
}

// torch's private function, which makes no object; its public way where a version lacks it, or is built without CUDA.
py::object find_current_stream(const py::module_& module) {
  const py::object raw = py::getattr(module.attr("_C"), "_cuda_getCurrentRawStream", py::none());
  if (!raw.is_none()) return raw;
  const py::object current_stream = module.attr("cuda").attr("current_stream");
  return py::cpp_function(
      [current_stream](int ordinal) { return py::object(current_stream(ordinal).attr("cuda_stream")); });
}

DeviceKind kind_of(const dlpack::Device& device) {
  if (device.type == dlpack::kCPU) return DeviceKind::kCpu;
  return device.type == dlpack::kCUDA ? DeviceKind::kCuda : DeviceKind::kOther;
}

ElementType type_of(const dlpack::DataType& type) {
  if (type.lanes != 1) return ElementType::kOther;
  if (type.code == dlpack::kInt && type.bits == 32) return ElementType::kInt32;
  if (type.code == dlpack::kBool && type.bits == 8) return ElementType::kBool;
  if (type.code == dlpack::kBFloat && type.bits == 16) return ElementType::kBFloat16;
  if (type.code != dlpack::kFloat) return ElementType::kOther;
  if (type.bits == 16) return ElementType::kFloat16;
  return type.bits == 32 ? ElementType::kFloat32 : ElementType::kOther;
}

TensorInfo read_by_exchange(py::handle tensor) {
  dlpack::Tensor view;
  if (torch->exchange->tensor_from_object(tensor.ptr(), &view) != 0) throw py::error_already_set();
  TensorInfo info;
  info.data = view.data ? static_cast<char*>(view.data) + view.byte_offset : nullptr;
  info.device.kind = kind_of(view.device);
  info.device.ordinal = info.device.kind == DeviceKind::kCuda ? view.device.id : 0;
  info.dtype = type_of(view.dtype);
  info.rank = view.ndim;
  const int kept = std::min(info.rank, TensorInfo::kMaxRank);
  std::copy_n(view.shape, kept, info.shape.begin());
  std::copy_n(view.strides, kept, info.strides.begin());
  return info;
}

ElementType type_of(const py::object& dtype) {
  if (dtype.is(torch->float16)) return ElementType::kFloat16;
  if (dtype.is(torch->bfloat16)) return ElementType::kBFloat16;
  if (dtype.is(torch->int32)) return ElementType::kInt32;
  if (dtype.is(torch->boolean)) return ElementType::kBool;
  return dtype.is(torch->float32) ? ElementType::kFloat32 : ElementType::kOther;
}

Device device_of(const py::object& device) {
  const auto type = device.attr("type").cast<std::string>();
  if (type == "cpu") return {DeviceKind::kCpu, 0};
  if (type == "cuda") return {DeviceKind::kCuda, device.attr("index").cast<int>()};
  return {};
}

TensorInfo read_by_attributes(py::handle tensor) {
  TensorInfo info;
  info.device = device_of(tensor.attr("device"));
  info.dtype = type_of(py::object(tensor.attr("dtype")));
  const py::tuple shape(tensor.attr("shape"));
  const py::tuple strides(tensor.attr("stride")());
  info.rank = static_cast<int>(shape.size());
  for (int i = 0; i < std::min(info.rank, TensorInfo::kMaxRank); ++i) {
    info.shape[i] = shape[i].cast<std::int64_t>();
    info.strides[i] = strides[i].cast<std::int64_t>();
  }
  info.data = reinterpret_cast<void*>(tensor.attr("data_ptr")().cast<std::uintptr_t>());
  return info;
}

std::string text_of(const py::object& value) { return py::str(value).cast<std::string>(); }

TensorInfo read(py::handle tensor, const char* argument) {
  try {
    return torch->exchange ? read_by_exchange(tensor) : read_by_attributes(tensor);
  } catch (py::error_already_set& error) {
    if (!error.matches(PyExc_Exception)) throw;  // Ctrl-C is no fault of the tensor
    throw ArgumentError({argument, "is a tensor whose memory cannot be read (" + text_of(error.value()) + ")",
                         std::string("a dense torch.Tensor on ") + kAcceptedDevice});
  }
}

}  // namespace

bool TensorInfo::has_elements() const {
  return std::find(shape.begin(), shape.begin() + std::min(rank, kMaxRank), 0) ==
         shape.begin() + std::min(rank, kMaxRank);
}

void connect_torch(py::module_ module) {
  auto* found = new Torch;
  found->tensor_type = module.attr("Tensor");
  found->float16 = module.attr("float16");
  found->bfloat16 = module.attr("bfloat16");
  found->float32 = module.attr("float32");
  found->int32 = module.attr("int32");
  found->boolean = module.attr("bool");
  found->exchange = find_exchange_api(found->tensor_type);
  found->current_stream_of = find_current_stream(module);
  found->empty = module.attr("empty");
  torch = found;
}

TensorInfo read_tensor(py::handle tensor, const char* argument) {
  if (!torch) throw Error("connect_torch() was not called");
  const int is_tensor = PyObject_IsInstance(tensor.ptr(), torch->tensor_type.ptr());
  if (is_tensor < 0) throw py::error_already_set();
  if (!is_tensor) throw ArgumentError({argument, "is " + kind_text(tensor), "a torch.Tensor"});
  return read(tensor, argument);
}

void* current_cuda_stream(int ordinal) {
  if (torch->exchange) {
    void* stream = nullptr;
    if (torch->exchange->current_stream(dlpack::kCUDA, ordinal, &stream) != 0) throw py::error_already_set();
    return stream;
  }
  return reinterpret_cast<void*>(torch->current_stream_of(ordinal).cast<std::uintptr_t>());
}

py::object empty_floats(std::int64_t count, py::handle like) {
  const py::int_ elements(count);
  const py::object device = like.attr("device");
  PyObject* const arguments[] = {elements.ptr(), torch->float32.ptr(), device.ptr()};
  PyObject* const tensor = PyObject_Vectorcall(torch->empty.ptr(), arguments, 1, torch->empty_keywords.ptr());
  if (!tensor) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(tensor);
}

bool uses_exchange_api() { return torch && torch->exchange; }

std::string dtype_text(py::handle tensor) { return text_of(tensor.attr("dtype")); }
std::string device_text(py::handle tensor) { return text_of(tensor.attr("device")); }
std::string shape_text(py::handle tensor) { return text_of(py::tuple(py::list(tensor.attr("shape")))); }
std::string strides_text(py::handle tensor) { return text_of(tensor.attr("stride")()); }

std::string kind_text(py::handle object) {
  return text_of(py::module_::import("flash_attn_jit.errors").attr("kind_text")(object));
}

}  // namespace flash_attn_jit::bindings
