#include "python/bindings_forward.h"

#include "python/bindings_arguments.h"
#include "python/bindings_options.h"
#include "python/bindings_user.h"
#include "runtime/launch/forward_launch.h"

namespace py = pybind11;

namespace flash_attn_jit::bindings {
namespace {

// torch's memory, so that its allocator knows who uses it, in stream capture too. It is free to others as soon as the
// call returns: those of the same stream come after.
class TorchWorkspace final : public Workspace {
 public:
  explicit TorchWorkspace(py::handle like) : like_(like) {}
  ~TorchWorkspace() override {
    const py::gil_scoped_acquire gil;
    tensor_ = py::object();
  }
  TorchWorkspace(const TorchWorkspace&) = delete;

  float* allocate(std::int64_t floats) override {
    const py::gil_scoped_acquire gil;
    tensor_ = empty_floats(floats, like_);
    return static_cast<float*>(read_tensor(tensor_, "workspace").data);
  }

 private:
  py::handle like_;
  py::object tensor_;
};

}  // namespace

void forward(py::handle q_object, py::handle k_object, py::handle v_object, py::handle out_object,
             py::handle lse_object, py::handle options, const std::optional<std::string>& tile, py::handle user) {
  const Layout layout = layout_of(options);
  const Argument q("q", q_object), k("k", k_object), v("v", v_object), out("out", out_object);
  const Layout layout_of_keys = is_paged(options) ? Layout::kPages : layout;
  for (const Argument* argument : {&q, &out}) check_input(*argument, q, layout);
  for (const Argument* argument : {&k, &v}) check_input(*argument, q, layout_of_keys);

  ForwardRequest request;
  request.q = view(q);
  request.k = view(k);
  request.v = view(v);
  request.out = view(out);
  if (!lse_object.is_none()) {
    const Argument lse("softmax_lse", lse_object);
    check_rows(lse, q);
    request.softmax_lse = static_cast<float*>(lse.info.data);
  }
  for (const NamedTensor& read : {NamedTensor{"q", request.q}, {"k", request.k}, {"v", request.v}})
    require_apart({"out", request.out}, read);
  request.options = read_options(options, q);
  request.options.user = read_user_functions(user, q);
  request.num_splits = num_splits(options);
  if (tile) request.tile = TileConfig::parse(*tile);

  if (q.info.device.kind == DeviceKind::kCpu) {
    const py::gil_scoped_release without_gil;
    forward_in_interpreter(request);
    return;
  }
  const int ordinal = q.info.device.ordinal;
  void* stream = current_cuda_stream(ordinal);
  TorchWorkspace workspace(q_object);
  request.workspace = &workspace;
  const py::gil_scoped_release without_gil;
  forward_on_device(request, ordinal, stream);
}

}  // namespace flash_attn_jit::bindings
