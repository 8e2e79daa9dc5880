#include "runtime/interpreter/global_memory.h"

#include <algorithm>

#include "generator/errors.h"

namespace flash_attn_jit {
namespace {

std::string list_text(const std::vector<std::int64_t>& values) {
  std::string text = "(";
  for (std::size_t i = 0; i < values.size(); ++i) text += (i ? ", " : "") + std::to_string(values[i]);
  return text + ")";
}

std::string tensor_text(const TensorExtent& extent) {
  return extent.name + " of shape " + list_text(extent.shape) + " and strides " + list_text(extent.strides);
}

}  // namespace

GlobalMemory::GlobalMemory(std::span<const TensorExtent> tensors)
    : written_(tensors.size()), written_at_(tensors.size()) {
  for (const TensorExtent& extent : tensors) tensors_.push_back(describe(extent));
}

GlobalMemory::Tensor GlobalMemory::describe(const TensorExtent& extent) {
  if (extent.shape.size() != extent.strides.size())
    throw ArgumentError("tensor " + tensor_text(extent) + ": as many strides as dimensions are needed");
  Tensor tensor{extent, reinterpret_cast<std::uintptr_t>(extent.data), 0, {}};
  bool empty = false;
  for (std::size_t i = 0; i < extent.shape.size(); ++i) {
    if (extent.strides[i] < 0) throw ArgumentError("tensor " + tensor_text(extent) + ": strides must not be negative");
    empty |= extent.shape[i] <= 0;
    if (extent.shape[i] > 1 && extent.strides[i] > 0) tensor.dims.push_back({i, extent.shape[i], extent.strides[i], 0});
  }
  std::stable_sort(tensor.dims.begin(), tensor.dims.end(),
                   [](const Dim& a, const Dim& b) { return a.stride > b.stride; });
  std::int64_t reach = 0;
  for (auto dim = tensor.dims.rbegin(); dim != tensor.dims.rend(); ++dim) {
    dim->reach_below = reach;
    reach += (dim->size - 1) * dim->stride;
  }
  tensor.end = tensor.begin + (empty ? 0 : static_cast<std::uintptr_t>(reach + 1) * extent.element_bytes);
  return tensor;
}

bool GlobalMemory::is_element(std::span<const Dim> dims, std::int64_t offset) {
  if (dims.empty()) return offset == 0;
  const Dim& dim = dims.front();
  const std::int64_t most = std::min(offset / dim.stride, dim.size - 1);
  // Dims may overlap (a window that slides by less than its width), so that several indices can be right.
  for (std::int64_t i = most; i >= 0 && offset - i * dim.stride <= dim.reach_below; --i)
    if (is_element(dims.subspan(1), offset - i * dim.stride)) return true;
  return false;
}

// Whether elements offset, offset + 1, ... all lie in one row: quick, but no is not final.
bool GlobalMemory::row_holds(std::span<const Dim> dims, std::int64_t offset, std::int64_t elements) {
  for (const Dim& dim : dims) {
    const std::int64_t index = std::min(offset / dim.stride, dim.size - 1);
    offset -= index * dim.stride;
    if (dim.stride == 1) return offset == 0 && index + elements <= dim.size;
  }
  return offset == 0 && elements == 1;
}

bool GlobalMemory::holds(const Tensor& tensor, std::uintptr_t address, int bytes) {
  const int element_bytes = tensor.extent.element_bytes;
  if (address < tensor.begin || address + bytes > tensor.end) return false;
  if ((address - tensor.begin) % element_bytes != 0 || bytes % element_bytes != 0) return false;
  const auto first = static_cast<std::int64_t>((address - tensor.begin) / element_bytes);
  const std::int64_t elements = bytes / element_bytes;
  if (row_holds(tensor.dims, first, elements)) return true;
  for (std::int64_t i = 0; i < elements; ++i)
    if (!is_element(tensor.dims, first + i)) return false;
  return true;
}

bool GlobalMemory::check_read(const void* pointer, int bytes, const BlockTime& time, std::string& error) const {
  const auto address = reinterpret_cast<std::uintptr_t>(pointer);
  if (address % bytes == 0)
    for (std::size_t i = 0; i < tensors_.size(); ++i) {
      const TensorUse use = tensors_[i].extent.use;
      if (use == TensorUse::kWrite || !holds(tensors_[i], address, bytes)) continue;
      if (use == TensorUse::kRead || is_passed_on(i, address, bytes, time)) return true;
    }
  error = explain(address, bytes, TensorUse::kRead);
  return false;
}

// Whether the same block has written it before its last barrier.
bool GlobalMemory::is_passed_on(std::size_t index, std::uintptr_t address, int bytes, const BlockTime& time) const {
  const Tensor& tensor = tensors_[index];
  const auto first = static_cast<std::int64_t>((address - tensor.begin) / tensor.extent.element_bytes);
  for (std::int64_t offset = first; offset < first + bytes / tensor.extent.element_bytes; ++offset) {
    const auto written = written_at_[index].find(offset);
    if (written == written_at_[index].end() || written->second < time.begin || written->second >= time.now)
      return false;
  }
  return true;
}

bool GlobalMemory::check_write(void* pointer, int bytes, const BlockTime& time, std::string& error) {
  const auto address = reinterpret_cast<std::uintptr_t>(pointer);
  if (address % bytes == 0)
    for (std::size_t i = 0; i < tensors_.size(); ++i)
      if (tensors_[i].extent.use != TensorUse::kRead && holds(tensors_[i], address, bytes))
        return note_write(i, address, bytes, time, error);
  error = explain(address, bytes, TensorUse::kWrite);
  return false;
}

bool GlobalMemory::note_write(std::size_t index, std::uintptr_t address, int bytes, const BlockTime& time,
                              std::string& error) {
  const Tensor& tensor = tensors_[index];
  const auto first = static_cast<std::int64_t>((address - tensor.begin) / tensor.extent.element_bytes);
  for (std::int64_t offset = first; offset < first + bytes / tensor.extent.element_bytes; ++offset) {
    auto written = written_[index][offset / kPageElements][offset % kPageElements];
    if (written) {
      std::int64_t beyond = 0;
      error =
          "element " + coordinates(tensor, offset, beyond) + " of " + tensor.extent.name + " is written a second time";
      return false;
    }
    written = true;
    if (tensor.extent.use == TensorUse::kPassOn) written_at_[index][offset] = time.now;
  }
  return true;
}

const GlobalMemory::Tensor* GlobalMemory::nearest(std::uintptr_t address) const {
  const auto distance = [address](const Tensor& tensor) {
    return address < tensor.begin ? tensor.begin - address : address < tensor.end ? 0 : address - tensor.end + 1;
  };
  const auto found = std::min_element(tensors_.begin(), tensors_.end(),
                                      [&](const Tensor& a, const Tensor& b) { return distance(a) < distance(b); });
  return found == tensors_.end() ? nullptr : &*found;
}

// The coordinates of the last element at or before `offset`, which lies `beyond` elements behind it.
std::string GlobalMemory::coordinates(const Tensor& tensor, std::int64_t offset, std::int64_t& beyond) {
  std::vector<std::int64_t> at(tensor.extent.shape.size(), 0);
  for (const Dim& dim : tensor.dims) {
    at[dim.index] = std::min(offset / dim.stride, dim.size - 1);
    offset -= at[dim.index] * dim.stride;
  }
  beyond = offset;
  return list_text(at);
}

std::string GlobalMemory::explain(std::uintptr_t address, int bytes, TensorUse use) const {
  std::string error = std::string(use == TensorUse::kRead ? "read" : "write") + " of " + std::to_string(bytes) +
                      " bytes of global memory ";
  if (address % bytes != 0) error += "at an address that is no multiple of " + std::to_string(bytes) + ", ";
  const Tensor* tensor = nearest(address);
  if (tensor == nullptr) return error + "outside every tensor: none is registered";
  const std::string name = tensor_text(tensor->extent);
  if (address >= tensor->end)
    return error + "outside every tensor: " + std::to_string(address - tensor->end) + " bytes behind the end of " +
           name;
  if (address < tensor->begin)
    return error + "outside every tensor: " + std::to_string(tensor->begin - address) + " bytes before the start of " +
           name;

  std::int64_t beyond = 0;
  const std::uintptr_t byte = address - tensor->begin;
  const std::string at = coordinates(*tensor, static_cast<std::int64_t>(byte / tensor->extent.element_bytes), beyond);
  if (beyond > 0) return error + "in a gap, " + std::to_string(beyond) + " elements behind " + at + " of " + name;
  if (byte % tensor->extent.element_bytes != 0) return error + "inside element " + at + " of " + name;
  if (use == TensorUse::kWrite && tensor->extent.use == TensorUse::kRead)
    return error + "at " + at + " of " + name + ", which may only be read";
  if (use == TensorUse::kRead && tensor->extent.use == TensorUse::kWrite)
    return error + "at " + at + " of " + name + ", which may only be written";
  if (use == TensorUse::kRead && tensor->extent.use == TensorUse::kPassOn && holds(*tensor, address, bytes))
    return error + "at " + at + " of " + name + ", which this block has not written before its last barrier";
  if (holds(*tensor, address, bytes)) return error + "at " + at + " of " + name;
  return error + "that begins at " + at + " of " + name + " and leaves its row";
}

}  // namespace flash_attn_jit
