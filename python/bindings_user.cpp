#include "python/bindings_user.h"

#include <pybind11/stl.h>

#include "generator/errors.h"
#include "python/bindings_options.h"

namespace py = pybind11;

namespace flash_attn_jit::bindings {
namespace {

constexpr const char* kAcceptedCounts = "(batch or 1, num_heads or 1, blocks), torch.int32, contiguous";
constexpr const char* kAcceptedColumns =
    "(batch or 1, num_heads or 1, blocks, at most as many), torch.int32, contiguous";

UserTensorView read_captured(py::handle object, const Argument& q) {
  const Argument tensor("a captured tensor", object);
  check_same_device(tensor, q);
  const TensorInfo& info = tensor.info;
  if (info.rank > kMostUserDims)
    throw ArgumentError({tensor.name, "has shape " + shape_text(object), "at most 4 dimensions"});
  return {info.data, info.rank, info.shape, info.strides, object.attr("element_size")().cast<int>()};
}

bool is_dense(const TensorInfo& info) {
  std::int64_t stride = 1;
  for (int d = info.rank - 1; d >= 0; --d) {
    if (info.shape[d] > 1 && info.strides[d] != stride) return false;
    stride *= info.shape[d];
  }
  return true;
}

// The lists of `name`_num_blocks and `name`_indices, for as many `blocks` of rows.
BlockListsView read_lists(py::handle mask, const std::string& name, const Argument& q, std::int64_t blocks,
                          const BlockMask& sizes) {
  const std::string of_counts = name + "_num_blocks", of_columns = name + "_indices";
  const py::object counts_object = mask.attr(of_counts.c_str()), columns_object = mask.attr(of_columns.c_str());
  if (counts_object.is_none()) return {};
  const Argument counts(of_counts.c_str(), counts_object), columns(of_columns.c_str(), columns_object);
  const auto fits = [&](const TensorInfo& info, int rank) {
    return info.dtype == ElementType::kInt32 && info.rank == rank && info.shape[0] == sizes.batch &&
           info.shape[1] == sizes.heads && info.shape[2] == blocks && is_dense(info);
  };
  check_small_tensor(counts, q, ElementType::kInt32, fits(counts.info, 3), kAcceptedCounts);
  check_small_tensor(columns, q, ElementType::kInt32, fits(columns.info, 4), kAcceptedColumns);
  return {static_cast<const int*>(counts.info.data), static_cast<const int*>(columns.info.data), columns.info.shape[3]};
}

BlockMask read_block_mask(py::handle mask, const Argument& q) {
  BlockMask read;
  read.block_q = mask.attr("block_q").cast<std::int64_t>();
  read.block_k = mask.attr("block_k").cast<std::int64_t>();
  const Argument counts("kv_num_blocks", mask.attr("kv_num_blocks"));
  if (counts.info.rank != 3)
    throw ArgumentError({"block_mask", "has kv_num_blocks of shape " + shape_text(counts.object), kAcceptedCounts});
  read.batch = counts.info.shape[0];
  read.heads = counts.info.shape[1];
  const std::int64_t blocks_q = counts.info.shape[2], blocks_k = mask.attr("blocks_k").cast<std::int64_t>();
  read.keys = read_lists(mask, "kv", q, blocks_q, read);
  read.whole_keys = read_lists(mask, "full_kv", q, blocks_q, read);
  read.queries = read_lists(mask, "q", q, blocks_k, read);
  read.whole_queries = read_lists(mask, "full_q", q, blocks_k, read);
  return read;
}

}  // namespace

std::shared_ptr<const UserFunctions> read_user_functions(py::handle functions, const Argument& q) {
  if (functions.is_none()) return nullptr;
  auto read = std::make_shared<UserFunctions>();
  read->code = functions.attr("code").cast<std::uint64_t>();
  read->has_score = functions.attr("has_score").cast<bool>();
  read->only_adds = functions.attr("only_adds").cast<bool>();
  for (const py::handle tensor : functions.attr("tensors")) read->tensors.push_back(read_captured(tensor, q));
  const py::object mask = functions.attr("block_mask");
  if (!mask.is_none()) read->block_mask = read_block_mask(mask, q);
  return read;
}

}  // namespace flash_attn_jit::bindings
