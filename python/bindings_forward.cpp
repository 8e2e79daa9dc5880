#include "python/bindings_forward.h"

#include "python/bindings_arguments.h"
#include "runtime/forward.h"

namespace py = pybind11;

namespace flash_attn_jit::bindings {

void forward(py::handle q_object, py::handle k_object, py::handle v_object, py::handle out_object,
             py::handle lse_object, std::optional<double> softmax_scale, bool causal,
             const std::optional<std::string>& tile) {
  const Argument q("q", q_object), k("k", k_object), v("v", v_object);
  check_input(q, q, "(batch, seqlen_q, num_heads, head_dim)");
  check_input(k, q, "(batch, seqlen_k, num_heads_k, head_dim)");
  check_input(v, q, "(batch, seqlen_k, num_heads_k, head_dim)");
  const Argument out("out", out_object), lse("softmax_lse", lse_object);
  check_input(out, q, "q's shape");
  check_like_q(out, q);
  check_rows(lse, q);

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
