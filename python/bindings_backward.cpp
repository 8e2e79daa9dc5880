#include "python/bindings_backward.h"

#include "generator/errors.h"
#include "python/bindings_arguments.h"
#include "python/bindings_options.h"
#include "python/bindings_user.h"
#include "runtime/launch/backward_launch.h"

namespace py = pybind11;

namespace flash_attn_jit::bindings {
namespace {

std::optional<TileConfig> parse_tile(const std::optional<std::string>& text) {
  return text ? std::optional(TileConfig::parse(*text)) : std::nullopt;
}

TensorView gradient(const char* name, py::handle object, const Argument& q, Layout layout) {
  const Argument argument(name, object);
  check_input(argument, q, layout);
  return view(argument);
}

// Its shape is checked where the launch is planned.
BiasGradient bias_gradient(py::handle object, const Argument& q) {
  const Argument argument("dbias", object);
  check_same_device(argument, q);
  const TensorInfo& info = argument.info;
  const bool is_float32 = info.dtype == ElementType::kFloat32;
  if (info.rank == 4 && (is_float32 || info.dtype == q.info.dtype) && is_contiguous(info))
    return {info.data, is_float32 ? PairType::kFloat32 : pair_type_of(dtype_of(q)), info.shape};
  throw ArgumentError({argument.name, "has shape " + shape_text(object) + " and dtype " + dtype_text(object),
                       "None, or (batches, heads, rows, keys), q's dtype or torch.float32, contiguous"});
}

}  // namespace

void backward(py::handle dout_object, py::handle q_object, py::handle k_object, py::handle v_object,
              py::handle out_object, py::handle lse_object, py::handle dlse_object, py::handle dq_object,
              py::handle dk_object, py::handle dv_object, py::handle dbias_object, py::handle delta_object,
              py::handle peaks_object, py::handle options, const std::optional<std::string>& dkdv_tile,
              const std::optional<std::string>& dq_tile, const std::optional<std::string>& all_keys_tile,
              py::handle user) {
  const Layout layout = layout_of(options);
  const Argument q("q", q_object), k("k", k_object), v("v", v_object), out("out", out_object),
      dout("dout", dout_object);
  for (const Argument* argument : {&q, &k, &v, &out, &dout}) check_input(*argument, q, layout);
  const Argument lse("softmax_lse", lse_object), delta("delta", delta_object);
  check_rows(lse, q);
  check_rows(delta, q);

  BackwardRequest request;
  request.q = view(q);
  request.out = view(out);
  request.dout = view(dout);
  request.k = view(k);
  request.v = view(v);
  request.softmax_lse = static_cast<const float*>(lse.info.data);
  request.delta = static_cast<float*>(delta.info.data);
  if (!dlse_object.is_none()) {
    const Argument dlse("dlse", dlse_object);
    check_rows(dlse, q);
    request.dlse = static_cast<const float*>(dlse.info.data);
  }
  if (!peaks_object.is_none()) {
    const Argument peaks("peaks", peaks_object);
    check_rows(peaks, q);
    request.peaks = static_cast<float*>(peaks.info.data);
  }
  request.options = read_options(options, q);
  request.options.user = read_user_functions(user, q);
  request.dkdv_tile = parse_tile(dkdv_tile);
  request.dq_tile = parse_tile(dq_tile);
  request.all_keys_tile = parse_tile(all_keys_tile);
  if (!dq_object.is_none()) request.dq = gradient("dq", dq_object, q, layout);
  if (dk_object.is_none() != dv_object.is_none())
    throw ArgumentError({dk_object.is_none() ? "dk" : "dv", "is None and the other of dk and dv is not",
                         "both, or neither: one kernel makes both"});
  if (!dk_object.is_none())
    request.dkdv = KeyGradients{gradient("dk", dk_object, q, layout), gradient("dv", dv_object, q, layout)};
  if (!dbias_object.is_none()) request.dbias = bias_gradient(dbias_object, q);

  if (q.info.device.kind == DeviceKind::kCpu) {
    const py::gil_scoped_release without_gil;
    backward_in_interpreter(request);
    return;
  }
  const int ordinal = q.info.device.ordinal;
  void* stream = current_cuda_stream(ordinal);
  const py::gil_scoped_release without_gil;
  backward_on_device(request, ordinal, stream);
}

}  // namespace flash_attn_jit::bindings
