#include "python/bindings_backward.h"

#include "python/bindings_arguments.h"
#include "runtime/backward.h"

namespace py = pybind11;

namespace flash_attn_jit::bindings {
namespace {

std::optional<TileConfig> parse_tile(const std::optional<std::string>& text) {
  return text ? std::optional(TileConfig::parse(*text)) : std::nullopt;
}

}  // namespace

void backward(py::handle dout_object, py::handle q_object, py::handle k_object, py::handle v_object,
              py::handle out_object, py::handle lse_object, py::handle dq_object, py::handle dk_object,
              py::handle dv_object, py::handle delta_object, std::optional<double> softmax_scale, bool causal,
              const std::optional<std::string>& dkdv_tile, const std::optional<std::string>& dq_tile) {
  const Argument q("q", q_object), k("k", k_object), v("v", v_object), out("out", out_object),
      dout("dout", dout_object), dq("dq", dq_object), dk("dk", dk_object), dv("dv", dv_object);
  for (const Argument* argument : {&q, &k, &v, &out, &dout, &dq, &dk, &dv})
    check_input(*argument, q, "(batch, seqlen, heads, head_dim)");
  const Argument lse("softmax_lse", lse_object), delta("delta", delta_object);
  check_rows(lse, q);
  check_rows(delta, q);

  const BackwardRequest request{.q = view(q),
                                .out = view(out),
                                .dout = view(dout),
                                .dq = view(dq),
                                .k = view(k),
                                .v = view(v),
                                .dk = view(dk),
                                .dv = view(dv),
                                .softmax_lse = static_cast<const float*>(lse.info.data),
                                .delta = static_cast<float*>(delta.info.data),
                                .softmax_scale = scale_of(softmax_scale, q.info.shape[3]),
                                .mask = causal ? Mask::kCausal : Mask::kNone,
                                .dkdv_tile = parse_tile(dkdv_tile),
                                .dq_tile = parse_tile(dq_tile)};

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
