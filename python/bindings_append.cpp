#include "python/bindings_append.h"

#include "generator/errors.h"
#include "python/bindings_arguments.h"
#include "python/bindings_options.h"
#include "runtime/launch/append_launch.h"

namespace py = pybind11;

namespace flash_attn_jit::bindings {
namespace {

constexpr const char* kAcceptedRotary = "(places, dims / 2), of k's dtype, contiguous in the last dimension";

Rotary read_rotary(py::handle cos_object, py::handle sin_object, const Argument& k, bool interleaved) {
  const Argument cos("rotary_cos", cos_object), sin("rotary_sin", sin_object);
  for (const Argument* each : {&cos, &sin})
    check_small_tensor(*each, k, k.info.dtype, each->info.rank == 2, kAcceptedRotary);
  if (sin.info.shape != cos.info.shape)
    throw ArgumentError(
        {"rotary_sin", "has shape " + shape_text(sin.object), "rotary_cos's, " + shape_text(cos.object)});
  return {.cos = cos.info.data,
          .sin = sin.info.data,
          .cos_stride = cos.info.strides[0],
          .sin_stride = sin.info.strides[0],
          .rows = cos.info.shape[0],
          .dims = 2 * cos.info.shape[1],
          .interleaved = interleaved};
}

}  // namespace

void append(py::handle k_object, py::handle v_object, py::handle k_cache_object, py::handle v_cache_object,
            py::handle cache_seqlens_object, py::handle block_table, py::handle q_object, py::handle q_turned_object,
            py::handle rotary_cos, py::handle rotary_sin, bool interleaved, bool queries_advance) {
  const Argument k("k", k_object), v("v", v_object), k_cache("k_cache", k_cache_object),
      v_cache("v_cache", v_cache_object);
  const Layout layout_of_cache = block_table.is_none() ? Layout::kBatch : Layout::kPages;
  for (const Argument* argument : {&k, &v}) check_input(*argument, k, Layout::kBatch);
  for (const Argument* argument : {&k_cache, &v_cache}) check_input(*argument, k, layout_of_cache);
  const std::int64_t batch = k.info.shape[0];
  const Argument cache_seqlens("cache_seqlens", cache_seqlens_object);
  check_small_tensor(cache_seqlens, k, ElementType::kInt32,
                     cache_seqlens.info.rank == 1 && cache_seqlens.info.shape[0] == batch, kAcceptedOfBatch);
  AppendRequest request;
  request.dtype = dtype_of(k);
  request.k_new = view(k);
  request.v_new = view(v);
  request.k = view(k_cache);
  request.v = view(v_cache);
  request.used = static_cast<const int*>(cache_seqlens.info.data);
  request.pages = read_page_table(block_table, k, batch);
  request.queries_advance = queries_advance;
  if (!rotary_cos.is_none()) {
    const Argument q("q", q_object), q_turned("q_turned", q_turned_object);
    for (const Argument* argument : {&q, &q_turned}) check_input(*argument, k, Layout::kBatch);
    request.q = view(q);
    request.q_turned = view(q_turned);
    request.rotary = read_rotary(rotary_cos, rotary_sin, k, interleaved);
  }
  if (k.info.device.kind == DeviceKind::kCpu) {
    const py::gil_scoped_release without_gil;
    append_in_interpreter(request);
    return;
  }
  const int ordinal = k.info.device.ordinal;
  void* stream = current_cuda_stream(ordinal);
  const py::gil_scoped_release without_gil;
  append_on_device(request, ordinal, stream);
}

}  // namespace flash_attn_jit::bindings
