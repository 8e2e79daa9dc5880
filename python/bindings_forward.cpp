#include "python/bindings_forward.h"

#include <cmath>

#include "generator/legality.h"
#include "python/bindings_errors.h"
#include "python/bindings_tensors.h"
#include "runtime/config.h"
#include "runtime/driver.h"
#include "runtime/forward.h"

namespace py = pybind11;

namespace flash_attn_jit::bindings {
namespace {

// One argument: its name, the Python object (for error texts only) and what was read of it.
struct Argument {
  const char* name;
  py::handle object;
  TensorInfo info;

  Argument(const char* name, py::handle object)
      : name(name), object(object), info(read_tensor(object, name)) {}
};

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

void check_input(const Argument& argument, const Argument& q, const char* layout) {
  check_rank(argument, layout);
  check_device(argument);
  check_same_device(argument, q);
  check_dtype(argument);
  check_last_stride(argument);
}

bool is_contiguous(const TensorInfo& tensor) {
  std::int64_t expected = 1;
  for (int i = tensor.rank - 1; i >= 0; --i) {
    if (tensor.shape[i] != 1 && tensor.strides[i] != expected) return !tensor.has_elements();
    expected *= tensor.shape[i];
  }
  return true;
}

// `out` and `softmax_lse` are the package's own allocations, so this names a bug rather than a user's
// mistake.
void check_outputs(const Argument& q, const Argument& out, const Argument& lse) {
  const auto& [batch, seqlen_q, num_heads, head_dim] = q.info.shape;
  const TensorInfo& l = lse.info;
  const bool lse_fits = l.rank == 3 && l.dtype == ElementType::kFloat32 && l.device == q.info.device &&
                        l.shape == std::array<std::int64_t, 4>{batch, num_heads, seqlen_q, 0};
  if (!lse_fits || !is_contiguous(l))
    throw ArgumentError(
        "softmax_lse has shape " + shape_text(lse.object) + " and dtype " + dtype_text(lse.object) +
        ". Accepted: (batch, num_heads, seqlen_q), torch.float32, contiguous, on q's device.");
  if (out.info.shape != q.info.shape)
    throw ArgumentError("out has shape " + shape_text(out.object) + ". Accepted: q's, " +
                        shape_text(q.object) + ".");
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

}  // namespace

void forward(py::handle q_object, py::handle k_object, py::handle v_object, py::handle out_object,
             py::handle lse_object, std::optional<double> softmax_scale, bool causal,
             const std::optional<std::string>& tile) {
  const Argument q("q", q_object), k("k", k_object), v("v", v_object);
  check_input(q, q, "(batch, seqlen_q, num_heads, head_dim)");
  check_input(k, q, "(batch, seqlen_k, num_heads_k, head_dim)");
  check_input(v, q, "(batch, seqlen_k, num_heads_k, head_dim)");
  const Argument out("out", out_object), lse("softmax_lse", lse_object);
  check_input(out, q, "q's shape");
  check_outputs(q, out, lse);

  ForwardRequest request;
  request.q = view(q);
  request.k = view(k);
  request.v = view(v);
  request.out = view(out);
  request.softmax_lse = static_cast<float*>(lse.info.data);
  request.softmax_scale = scale_of(softmax_scale, q.info.shape[3]);
  request.mask = causal ? Mask::kCausal : Mask::kNone;
  if (tile) request.tile = TileConfig::parse(*tile);

  if (q.info.device.kind == DeviceKind::kCpu) {
    const py::gil_scoped_release without_gil;
    forward_in_interpreter(request);
    return;
  }
  const int ordinal = q.info.device.ordinal;
  void* stream = current_cuda_stream(ordinal);
  const py::gil_scoped_release without_gil;
  forward_on_device(request, ordinal, stream);
}

}  // namespace flash_attn_jit::bindings
