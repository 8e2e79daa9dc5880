#include "python/bindings_arguments.h"

#include <string>

#include "generator/errors.h"
#include "runtime/launch/process.h"

namespace py = pybind11;

namespace flash_attn_jit::bindings {
namespace {

std::string device_came(const Argument& argument) { return "is on device " + device_text(argument.object); }

void check_device(const Argument& argument) {
  switch (argument.info.device.kind) {
    case DeviceKind::kCuda:
      return;
    case DeviceKind::kCpu:
      if (config().interpret) return;
      break;
    case DeviceKind::kOther:
      break;
  }
  throw ArgumentError({argument.name, device_came(argument), kAcceptedDevice});
}

void check_dtype(const Argument& argument, const Argument& q) {
  const ElementType dtype = argument.info.dtype;
  const std::string name = argument.name, came = "has dtype " + dtype_text(argument.object);
  if (dtype == ElementType::kBFloat16 && config().refuses_bfloat16)
    throw UnsupportedError({name, came + ", and FLASH_ATTN_JIT_BFLOAT16 is refuse", "torch.float16",
                            "Cast it: " + name + ".to(torch.float16)"});
  if (dtype != ElementType::kFloat16 && dtype != ElementType::kBFloat16)
    throw ArgumentError({name, came, kAcceptedDtype, "Cast it: " + name + ".to(torch.float16)"});
  if (dtype != q.info.dtype)
    throw ArgumentError({name, came + " and " + q.name + " " + dtype_text(q.object), std::string(q.name) + "'s dtype",
                         "Cast it: " + name + ".to(" + dtype_text(q.object) + ")"});
}

}  // namespace

bool is_contiguous(const TensorInfo& tensor) {
  std::int64_t expected = 1;
  for (int i = tensor.rank - 1; i >= 0; --i) {
    if (tensor.shape[i] != 1 && tensor.strides[i] != expected) return !tensor.has_elements();
    expected *= tensor.shape[i];
  }
  return true;
}

void check_same_device(const Argument& argument, const Argument& q) {
  if (argument.info.device == q.info.device) return;
  throw ArgumentError({argument.name, device_came(argument) + " and q on " + device_text(q.object), kAcceptedDevices});
}

void refuse_rank(const char* name, py::handle tensor, Layout layout) {
  throw ArgumentError(
      {name, "has " + std::to_string(py::len(tensor.attr("shape"))) + " dimensions, shape " + shape_text(tensor),
       layout == Layout::kTotal   ? "3, (total, heads, head_dim)"
       : layout == Layout::kPages ? "4, (pages, page size, heads, head_dim)"
                                  : "4, (batch, seqlen, heads, head_dim)"});
}

void check_input(const Argument& argument, const Argument& q, Layout layout) {
  if (argument.info.rank != (layout == Layout::kTotal ? 3 : 4)) refuse_rank(argument.name, argument.object, layout);
  check_device(argument);
  check_same_device(argument, q);
  check_dtype(argument, q);
}

DType dtype_of(const Argument& argument) {
  return argument.info.dtype == ElementType::kBFloat16 ? DType::kBFloat16 : DType::kFloat16;
}

void check_rows(const Argument& argument, const Argument& q) {
  const auto& shape = q.info.shape;
  const bool varlen = q.info.rank == 3;
  const std::array<std::int64_t, 4> expected = varlen ? std::array<std::int64_t, 4>{shape[1], shape[0], 0, 0}
                                                      : std::array<std::int64_t, 4>{shape[0], shape[2], shape[1], 0};
  const TensorInfo& rows = argument.info;
  if (rows.rank == q.info.rank - 1 && rows.dtype == ElementType::kFloat32 && rows.device == q.info.device &&
      rows.shape == expected && is_contiguous(rows))
    return;
  throw ArgumentError({argument.name,
                       "has shape " + shape_text(argument.object) + " and dtype " + dtype_text(argument.object),
                       std::string(varlen ? "(num_heads, total_q)" : "(batch, num_heads, seqlen_q)") +
                           ", torch.float32, contiguous, on q's device"});
}

TensorView view(const Argument& argument) {
  const TensorInfo& info = argument.info;
  if (info.rank == 4) return {info.data, info.shape, info.strides};
  return {info.data,
          {1, info.shape[0], info.shape[1], info.shape[2]},
          {0, info.strides[0], info.strides[1], info.strides[2]},
          info.rank};
}

}  // namespace flash_attn_jit::bindings
