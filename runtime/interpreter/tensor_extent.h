// A tensor as the interpreter is told of it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace flash_attn_jit {

// What a kernel may do with a tensor: one of these. kPassOn: a block writes elements, and behind a barrier reads them.
enum class TensorUse { kRead, kWrite, kPassOn };

// A tensor that the kernel may touch; every global access is checked against it, gaps between rows included.
struct TensorExtent {
  std::string name;  // "q", "softmax_lse"
  void* data = nullptr;
  int element_bytes = 2;
  std::vector<std::int64_t> shape;
  std::vector<std::int64_t> strides;  // in elements
  TensorUse use = TensorUse::kRead;
};

}  // namespace flash_attn_jit
