#include "python/bindings_forward.h"

#include "python/bindings_arguments.h"
#include "python/bindings_options.h"
#include "runtime/launch/forward_launch.h"

namespace py = pybind11;

namespace flash_attn_jit::bindings {

void forward(py::handle q_object, py::handle k_object, py::handle v_object, py::handle out_object,
             py::handle lse_object, py::handle options, const std::optional<std::string>& tile) {
  const Lengths lengths = lengths_of(options);
  const Argument q("q", q_object), k("k", k_object), v("v", v_object), out("out", out_object);
  for (const Argument* argument : {&q, &k, &v, &out}) check_input(*argument, q, lengths);
  const Argument lse("softmax_lse", lse_object);
  check_rows(lse, q);

  ForwardRequest request;
  request.q = view(q);
  request.k = view(k);
  request.v = view(v);
  request.out = view(out);
  request.softmax_lse = static_cast<float*>(lse.info.data);
  request.options = read_options(options, q);
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
