// The tensors that a kernel may touch, and whether an access stays inside their elements.
#pragma once

#include <bitset>
#include <cstdint>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#include "runtime/interpreter/tensor_extent.h"

namespace flash_attn_jit {

// When an access happens: the number of the barrier that began its block, and of the block's last one. They only grow.
struct BlockTime {
  std::uint32_t begin, now;
};

class GlobalMemory {
 public:
  // Throws ArgumentError for a tensor with a negative stride or as many strides as it has not dimensions.
  explicit GlobalMemory(std::span<const TensorExtent> tensors);

  // On false the access is not allowed, and `error` says why. Nothing is copied.
  bool check_read(const void* address, int bytes, const BlockTime& time, std::string& error) const;

  // As check_read, and every element may be written once only.
  bool check_write(void* address, int bytes, const BlockTime& time, std::string& error);

 private:
  // A dimension that moves the address: more than one index, stride not 0.
  struct Dim {
    std::size_t index;  // in TensorExtent::shape
    std::int64_t size;
    std::int64_t stride;
    std::int64_t reach_below;  // the largest offset that the dims after this one can make
  };

  struct Tensor {
    TensorExtent extent;
    std::uintptr_t begin = 0, end = 0;  // bytes
    std::vector<Dim> dims;              // by falling stride
  };

  static constexpr std::int64_t kPageElements = 1 << 14;
  using WrittenPages = std::unordered_map<std::int64_t, std::bitset<kPageElements>>;
  using WriteTimes = std::unordered_map<std::int64_t, std::uint32_t>;  // by element offset

  static Tensor describe(const TensorExtent& extent);
  static bool holds(const Tensor& tensor, std::uintptr_t address, int bytes);
  static bool is_element(std::span<const Dim> dims, std::int64_t offset);
  static bool row_holds(std::span<const Dim> dims, std::int64_t offset, std::int64_t elements);
  bool note_write(std::size_t tensor, std::uintptr_t address, int bytes, const BlockTime& time, std::string& error);
  bool is_passed_on(std::size_t tensor, std::uintptr_t address, int bytes, const BlockTime& time) const;

  std::string explain(std::uintptr_t address, int bytes, TensorUse use) const;
  const Tensor* nearest(std::uintptr_t address) const;
  static std::string coordinates(const Tensor& tensor, std::int64_t offset, std::int64_t& beyond);

  std::vector<Tensor> tensors_;
  std::vector<WrittenPages> written_;   // by tensor; element offsets
  std::vector<WriteTimes> written_at_;  // of tensors that are passed on
};

}  // namespace flash_attn_jit
