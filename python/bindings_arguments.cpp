#include "python/bindings_arguments.h"

#include <cmath>

#include "generator/errors.h"
#include "python/bindings_errors.h"
#include "runtime/config.h"
#include "runtime/driver.h"

namespace py = pybind11;

namespace flash_attn_jit::bindings {
namespace {

std::string quoted_device(const Argument& argument) {
  return std::string(argument.name) + " is on device " + device_text(argument.object);
}

void check_rank(const Argument& argument, const char* layout) {
  if (argument.info.rank == 4) return;
  throw ArgumentError(std::string(argument.name) + " has " + std::to_string(argument.info.rank) +
                      " dimensions, shape " + shape_text(argument.object) + ". Accepted: 4, " + layout + ".");
}

void check_device(const Argument& argument) {
  switch (argument.info.device.kind) {
    case DeviceKind::kCuda:
      return;
    case DeviceKind::kCpu:
      if (config().interpret) return;
      throw ArgumentError(
          quoted_device(argument) +
          ". Accepted: a CUDA device. To run CPU tensors in the interpreter, slow and checked, set "
          "FLASH_ATTN_JIT_INTERPRET=1 before Python starts.");
    case DeviceKind::kOther:
      throw ArgumentError(quoted_device(argument) + ". Accepted: a CUDA device.");
  }
}

void check_same_device(const Argument& argument, const Argument& q) {
  if (argument.info.device == q.info.device) return;
  throw ArgumentError(quoted_device(argument) + " and q on " + device_text(q.object) +
                      ". Accepted: all on one device.");
}

// Where the kernels of a device's tensors run, in words, and its compute capability x 10.
struct Chip {
  std::string name;
  int sm;
};

Chip chip_of(const Device& device) {
  if (device.kind == DeviceKind::kCpu) return {"the interpreter, which plays sm_75", 75};
  Driver* driver = process_driver();
  if (!driver) throw DriverError(process_driver_absence());
  const DeviceInfo info = driver->device_info(device.ordinal);
  return {info.name + " (sm_" + std::to_string(info.sm) + ")", info.sm};
}

void check_dtype(const Argument& argument) {
  if (argument.info.dtype == ElementType::kFloat16) return;
  const std::string name = argument.name;
  const std::string what_came = name + " has dtype " + dtype_text(argument.object);
  const std::string what_to_do = " Accepted: torch.float16. Cast it: " + name + ".to(torch.float16).";
  if (argument.info.dtype != ElementType::kBFloat16) throw ArgumentError(what_came + "." + what_to_do);
  const Chip chip = chip_of(argument.info.device);
  if (chip.sm < 80)
    throw UnsupportedError(what_came + ", which has no hardware support on " + chip.name + "." + what_to_do);
  throw NotBuiltError(what_came + ", which is not built yet for " + chip.name + "." + what_to_do);
}

void check_last_stride(const Argument& argument) {
  if (argument.info.shape[3] <= 1 || argument.info.strides[3] == 1 || !argument.info.has_elements()) return;
  throw ArgumentError(std::string(argument.name) + " has strides " + strides_text(argument.object) +
                      ". Accepted: a last dimension that is contiguous (stride 1). Use " + argument.name +
                      ".contiguous().");
}

bool is_contiguous(const TensorInfo& tensor) {
  std::int64_t expected = 1;
  for (int i = tensor.rank - 1; i >= 0; --i) {
    if (tensor.shape[i] != 1 && tensor.strides[i] != expected) return !tensor.has_elements();
    expected *= tensor.shape[i];
  }
  return true;
}

}  // namespace

void check_input(const Argument& argument, const Argument& q, const char* layout) {
  check_rank(argument, layout);
  check_device(argument);
  check_same_device(argument, q);
  check_dtype(argument);
  check_last_stride(argument);
}

void check_like_q(const Argument& argument, const Argument& q) {
  if (argument.info.shape != q.info.shape)
    throw ArgumentError(std::string(argument.name) + " has shape " + shape_text(argument.object) +
                        ". Accepted: q's, " + shape_text(q.object) + ".");
}

void check_rows(const Argument& argument, const Argument& q) {
  const auto& [batch, seqlen_q, num_heads, head_dim] = q.info.shape;
  const TensorInfo& rows = argument.info;
  const bool fits = rows.rank == 3 && rows.dtype == ElementType::kFloat32 && rows.device == q.info.device &&
                    rows.shape == std::array<std::int64_t, 4>{batch, num_heads, seqlen_q, 0};
  if (!fits || !is_contiguous(rows))
    throw ArgumentError(std::string(argument.name) + " has shape " + shape_text(argument.object) + " and dtype " +
                        dtype_text(argument.object) +
                        ". Accepted: (batch, num_heads, seqlen_q), torch.float32, contiguous, on q's device.");
}

TensorView view(const Argument& argument) {
  return {argument.info.data, argument.info.shape, argument.info.strides};
}

float scale_of(std::optional<double> softmax_scale, std::int64_t head_dim) {
  // Head dim 0 is refused by the legality rules, in their own words.
  const double scale = softmax_scale.value_or(head_dim > 0 ? 1.0 / std::sqrt(double(head_dim)) : 1.0);
  if (!std::isfinite(static_cast<float>(scale)))
    throw ArgumentError("softmax_scale is " + std::to_string(scale) +
                        ". Accepted: a finite number in float32's range, or None for 1/sqrt(head_dim).");
  return static_cast<float>(scale);
}

}  // namespace flash_attn_jit::bindings
