#include "runtime/launch/append_launch.h"

#include <array>
#include <string>
#include <vector>

#include "generator/errors.h"
#include "generator/legality.h"
#include "runtime/interpreter/interpreter.h"
#include "runtime/launch/interpreted_tensors.h"
#include "runtime/launch/process.h"

namespace flash_attn_jit {
namespace {

// The numbers on the device, which a kernel on a GPU does not check: what does not fit it leaves out.
void require_room(const AppendRequest& request) {
  const std::int64_t rows = cache_rows(request), rows_new = request.k_new.shape[kSeqlen];
  for (std::int64_t b = 0; b < request.k_new.shape[kBatch]; ++b) {
    const std::int64_t used = request.used[b];
    if (used < 0 || used + rows_new > rows)
      throw ArgumentError({"cache_seqlens[" + std::to_string(b) + "]",
                           "is " + std::to_string(used) + ", and " + std::to_string(rows_new) + " rows come behind",
                           "0 to " + std::to_string(rows - rows_new) + ": the cache has " + std::to_string(rows)});
    if (request.pages) require_pages(*request.pages, b, used + rows_new, request.k);
    if (request.rotary && used + rows_new > request.rotary->rows)
      throw ArgumentError(
          {"rotary_cos", "has " + std::to_string(request.rotary->rows) + " rows",
           "a row for each place: sequence " + std::to_string(b) + " reaches " + std::to_string(used + rows_new)});
  }
}

TensorExtent numbers_extent(const char* name, const void* data, int bytes, std::vector<std::int64_t> shape,
                            std::vector<std::int64_t> strides) {
  return {.name = name,
          .data = const_cast<void*>(data),  // only read
          .element_bytes = bytes,
          .shape = std::move(shape),
          .strides = std::move(strides),
          .use = TensorUse::kRead};
}

std::vector<TensorExtent> extents_of(const AppendRequest& request) {
  const std::int64_t batch = request.k_new.shape[kBatch];
  std::vector<TensorExtent> tensors = {
      fp16_extent("k", request.k_new, TensorUse::kRead), fp16_extent("v", request.v_new, TensorUse::kRead),
      fp16_extent("k_cache", request.k, TensorUse::kWrite), fp16_extent("v_cache", request.v, TensorUse::kWrite),
      numbers_extent("cache_seqlens", request.used, 4, {batch}, {1})};
  if (request.pages)
    tensors.push_back(numbers_extent("block_table", request.pages->table, 4, {batch, request.pages->columns},
                                     {request.pages->stride, 1}));
  if (!request.rotary) return tensors;
  const Rotary& rotary = *request.rotary;
  tensors.push_back(fp16_extent("q", request.q, TensorUse::kRead));
  tensors.push_back(fp16_extent("q_turned", request.q_turned, TensorUse::kWrite));
  tensors.push_back(
      numbers_extent("rotary_cos", rotary.cos, 2, {rotary.rows, rotary.dims / 2}, {rotary.cos_stride, 1}));
  tensors.push_back(
      numbers_extent("rotary_sin", rotary.sin, 2, {rotary.rows, rotary.dims / 2}, {rotary.sin_stride, 1}));
  return tensors;
}

}  // namespace

void append_on_device(const AppendRequest& request, int device_ordinal, StreamHandle stream) {
  Device& device = process_devices().device(device_ordinal);
  device.launch(std::array{plan_append(request, device.plan_target())}, stream);
}

void append_in_interpreter(const AppendRequest& request) {
  const AppendLaunch launch =
      plan_append(request, {arch_limits(75), kInterpretedMultiprocessors, process_tile_chooser()});
  require_room(request);
  if (launch.blocks == 0) return;
  const FoundKernel found = process_host_kernels().find_or_compile(launch.spec);
  interpret(found.kernel, {launch.blocks, found.kernel.threads, found.kernel.dynamic_smem}, &launch.params,
            extents_of(request));
}

}  // namespace flash_attn_jit
