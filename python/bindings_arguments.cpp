#include "python/bindings_arguments.h"

#include <cmath>
#include <cstdio>

#include "generator/errors.h"
#include "python/bindings_errors.h"
#include "runtime/launch/process.h"
#include "runtime/system/errors.h"

namespace py = pybind11;

namespace flash_attn_jit::bindings {
namespace {

std::string quoted_device(const Argument& argument) {
  return std::string(argument.name) + " is on device " + device_text(argument.object);
}

void check_rank(const Argument& argument, Lengths lengths) {
  const bool varlen = lengths == Lengths::kVarlen;
  if (argument.info.rank == (varlen ? 3 : 4)) return;
  throw ArgumentError(std::string(argument.name) + " has " + std::to_string(argument.info.rank) +
                      " dimensions, shape " + shape_text(argument.object) + ". Accepted: " +
                      (varlen ? "3, (total, heads, head_dim)." : "4, (batch, seqlen, heads, head_dim)."));
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
  const py::gil_scoped_release without_gil;
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
  const int last = argument.info.rank - 1;
  if (argument.info.shape[last] <= 1 || argument.info.strides[last] == 1 || !argument.info.has_elements()) return;
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

void check_small_tensor(const Argument& argument, const Argument& q, ElementType dtype, bool shape_fits,
                        const std::string& accepted) {
  check_same_device(argument, q);
  const TensorInfo& info = argument.info;
  const int last = info.rank - 1;  // shape_fits: there is one
  if (info.dtype == dtype && shape_fits && (info.strides[last] == 1 || info.shape[last] <= 1)) return;
  throw ArgumentError(std::string(argument.name) + " has shape " + shape_text(argument.object) + ", strides " +
                      strides_text(argument.object) + " and dtype " + dtype_text(argument.object) + ". Accepted: " +
                      accepted);
}

std::string number_text(double x) {
  char text[32];
  std::snprintf(text, sizeof text, "%g", x);
  return text;
}

float scale_of(std::optional<double> softmax_scale, std::int64_t head_dim) {
  // Head dim 0 is refused by the legality rules, in their own words.
  const double scale = softmax_scale.value_or(head_dim > 0 ? 1.0 / std::sqrt(double(head_dim)) : 1.0);
  if (!(std::fabs(scale) <= kMostScale))
    throw ArgumentError("softmax_scale is " + number_text(scale) + ". Accepted: a number from " +
                        number_text(-kMostScale) + " to " + number_text(kMostScale) +
                        ", or None for 1/sqrt(head_dim).");
  return static_cast<float>(scale);
}

float softcap_of(double softcap) {
  if (softcap != 0 && !(softcap >= kLeastSoftcap && softcap <= kMostScale))
    throw ArgumentError("softcap is " + number_text(softcap) + ". Accepted: 0.0 for none, or a number from " +
                        number_text(kLeastSoftcap) + " to " + number_text(kMostScale) + ".");
  return static_cast<float>(softcap);
}

// One length for the whole batch, or cu_seqlens.
std::optional<Varlen> read_varlen(const OptionArguments& arguments, const Argument& q) {
  if (!arguments.is_varlen()) return std::nullopt;
  const Argument cu_seqlens_q("cu_seqlens_q", arguments.cu_seqlens_q);
  const Argument cu_seqlens_k("cu_seqlens_k", arguments.cu_seqlens_k);
  for (const Argument* each : {&cu_seqlens_q, &cu_seqlens_k})
    check_small_tensor(*each, q, ElementType::kInt32, each->info.rank == 1 && each->info.shape[0] >= 1,
                       "(batch + 1), torch.int32, contiguous: where each sequence begins, and where the last ends.");
  if (cu_seqlens_q.info.shape[0] != cu_seqlens_k.info.shape[0])
    throw ArgumentError("cu_seqlens_k has shape " + shape_text(cu_seqlens_k.object) + ". Accepted: cu_seqlens_q's, " +
                        shape_text(cu_seqlens_q.object) + ".");
  return Varlen{static_cast<const int*>(cu_seqlens_q.info.data), static_cast<const int*>(cu_seqlens_k.info.data),
                cu_seqlens_q.info.shape[0] - 1, arguments.max_seqlen_q, arguments.max_seqlen_k};
}

std::optional<AlibiSlopes> read_alibi(const OptionArguments& arguments, const Argument& q,
                                      const std::optional<Varlen>& varlen) {
  if (arguments.alibi_slopes.is_none()) return std::nullopt;
  const Argument slopes("alibi_slopes", arguments.alibi_slopes);
  const std::int64_t batch = varlen ? varlen->batch : q.info.shape[0], heads = q.info.shape[q.info.rank - 2];
  const auto& shape = slopes.info.shape;
  const bool of_heads = slopes.info.rank == 1 && shape[0] == heads;
  const bool of_batch = slopes.info.rank == 2 && shape[0] == batch && shape[1] == heads;
  check_small_tensor(slopes, q, ElementType::kFloat32, of_heads || of_batch,
                     "torch.float32, (num_heads) or (batch, num_heads), contiguous in the last dimension.");
  return AlibiSlopes{static_cast<const float*>(slopes.info.data), of_batch ? slopes.info.strides[0] : 0};
}

// A window without a left end that ends at the diagonal is the causal mask.
Mask mask_of(const Window& window) {
  if (window.left < 0 && window.right < 0) return Mask::kNone;
  return window.left < 0 && window.right == 0 ? Mask::kCausal : Mask::kWindow;
}

}  // namespace

AttentionOptions read_options(const OptionArguments& arguments, const Argument& q) {
  AttentionOptions options;
  options.softmax_scale = scale_of(arguments.softmax_scale, q.info.shape[q.info.rank - 1]);
  // causal forces a window's right half to 0.
  options.window = {arguments.window_left, arguments.causal ? 0 : arguments.window_right};
  options.mask = mask_of(options.window);
  options.softcap = softcap_of(arguments.softcap);
  options.varlen = read_varlen(arguments, q);
  options.alibi = read_alibi(arguments, q, options.varlen);
  return options;
}

void check_input(const Argument& argument, const Argument& q, Lengths lengths, LastDim last_dim) {
  check_rank(argument, lengths);
  check_device(argument);
  check_same_device(argument, q);
  check_dtype(argument);
  if (last_dim == LastDim::kContiguous) check_last_stride(argument);
}

void check_like_q(const Argument& argument, const Argument& q) {
  if (argument.info.shape != q.info.shape)
    throw ArgumentError(std::string(argument.name) + " has shape " + shape_text(argument.object) +
                        ". Accepted: q's, " + shape_text(q.object) + ".");
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
  throw ArgumentError(std::string(argument.name) + " has shape " + shape_text(argument.object) + " and dtype " +
                      dtype_text(argument.object) + ". Accepted: " +
                      (varlen ? "(num_heads, total_q)" : "(batch, num_heads, seqlen_q)") +
                      ", torch.float32, contiguous, on q's device.");
}

TensorView view(const Argument& argument) {
  const TensorInfo& info = argument.info;
  if (info.rank == 4) return {info.data, info.shape, info.strides};
  return {info.data,
          {1, info.shape[0], info.shape[1], info.shape[2]},
          {0, info.strides[0], info.strides[1], info.strides[2]}};
}

}  // namespace flash_attn_jit::bindings
