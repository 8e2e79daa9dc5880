#include "runtime/launch/interpreted_tensors.h"

#include <limits>
#include <string>

#include "generator/errors.h"

namespace flash_attn_jit {

TensorExtent fp16_extent(const char* name, const TensorView& view, TensorUse use) {
  return {.name = name,
          .data = view.data,
          .element_bytes = 2,
          .shape = {view.shape.begin(), view.shape.end()},
          .strides = {view.strides.begin(), view.strides.end()},
          .use = use};
}

TensorExtent row_extent(const char* name, const float* data, const TensorView& q, TensorUse use) {
  const std::int64_t batch = q.shape[kBatch], seqlen_q = q.shape[kSeqlen], heads = q.shape[kHeads];
  return {.name = name,
          .data = const_cast<float*>(data),  // a registered tensor is only written where its use says so
          .element_bytes = 4,
          .shape = {batch, heads, seqlen_q},
          .strides = {heads * seqlen_q, seqlen_q, 1},
          .use = use};
}

TensorExtent bias_gradient_extent(const BiasGradient& dbias) {
  const auto& [batches, heads, rows, keys] = dbias.shape;
  return {.name = "dbias",
          .data = dbias.data,
          .element_bytes = bytes_of(dbias.type),
          .shape = {batches, heads, rows, keys},
          .strides = {heads * rows * keys, rows * keys, keys, 1},
          .use = TensorUse::kWrite};
}

void append_option_extents(const AttentionOptions& options, const TensorView& q, const TensorView& k,
                           std::vector<TensorExtent>& tensors) {
  const ProblemShape shape = problem_shape(q, k, options);
  visit_tensors(options, shape, q.shape[kHeads], [&](const OptionTensor& tensor) {
    tensors.push_back({.name = tensor.name,
                       .data = const_cast<void*>(tensor.data),  // only read
                       .element_bytes = tensor.element_bytes,
                       .shape = {tensor.shape.begin(), tensor.shape.begin() + tensor.rank},
                       .strides = {tensor.strides.begin(), tensor.strides.begin() + tensor.rank},
                       .use = TensorUse::kRead});
  });
}

namespace {

void require_cu_seqlens(const std::string& side, const int* cu_seqlens, std::int64_t batch, std::int64_t max_seqlen,
                        std::int64_t total) {
  const auto refuse = [&](std::int64_t b, const std::string& why, const std::string& accepted) {
    throw ArgumentError(
        {"cu_seqlens_" + side + "[" + std::to_string(b) + "]", "is " + std::to_string(cu_seqlens[b]) + why, accepted});
  };
  if (cu_seqlens[0] != 0) refuse(0, "", "0, where the first sequence begins");
  for (std::int64_t b = 0; b < batch; ++b) {
    const std::int64_t seqlen = std::int64_t(cu_seqlens[b + 1]) - cu_seqlens[b];
    if (seqlen < 0) refuse(b + 1, ", less than the one before", "numbers that do not fall");
    if (seqlen > max_seqlen)
      refuse(b + 1, ", so that a sequence is " + std::to_string(seqlen) + " long",
             "at most max_seqlen_" + side + ", " + std::to_string(max_seqlen));
  }
  if (cu_seqlens[batch] > total) refuse(batch, "", "at most the number of rows, " + std::to_string(total));
}

std::string indexed(const char* name, std::int64_t b) { return name + ("[" + std::to_string(b) + "]"); }

// Rows that sequence b has in k and v, used or not.
std::int64_t key_rows(const AttentionOptions& options, const ProblemShape& shape, std::int64_t b) {
  if (!options.varlen || options.varlen->cu_seqlens_k == nullptr) return shape.seqlen_k;
  return std::int64_t{options.varlen->cu_seqlens_k[b + 1]} - options.varlen->cu_seqlens_k[b];
}

// Whether max_seqlen_k is what bounds them, and not the table of pages.
bool is_bound_by_max_seqlen(const AttentionOptions& options, std::int64_t rows, const TensorView& k) {
  return options.varlen && options.varlen->cu_seqlens_k == nullptr && options.pages &&
         rows == options.varlen->max_seqlen_k && rows < k.shape[kSeqlen] * options.pages->columns;
}

// Returns how many of them are used.
std::int64_t require_key_lengths(const AttentionOptions& options, std::int64_t b, std::int64_t rows,
                                 const TensorView& k) {
  std::int64_t used = rows;
  if (!options.key_lengths) return used;
  const KeyLengths& lengths = *options.key_lengths;
  if (lengths.used != nullptr) used = lengths.used[b] + lengths.used_more;
  if (used < 0 || used > rows)
    throw ArgumentError({indexed("seqused_k", b), "is " + std::to_string(used),
                         is_bound_by_max_seqlen(options, rows, k)
                             ? "0 to max_seqlen_k, " + std::to_string(rows)
                             : "0 to " + std::to_string(rows) + ", the rows that there are"});
  if (lengths.leftpad == nullptr) return used;
  if (const int leftpad = lengths.leftpad[b]; leftpad < 0 || leftpad > used)
    throw ArgumentError({indexed("leftpad_k", b), "is " + std::to_string(leftpad),
                         "0 to " + std::to_string(used) + ", the rows that are used"});
  return used;
}

}  // namespace

void require_pages(const PageTable& pages, std::int64_t b, std::int64_t used, const TensorView& k) {
  const std::int64_t page_size = k.shape[kSeqlen], num_pages = k.shape[kBatch];
  for (std::int64_t p = 0; p * page_size < used; ++p)
    if (const int page = pages.table[b * pages.stride + p]; page < 0 || page >= num_pages)
      throw ArgumentError(
          {indexed("block_table", b) + "[" + std::to_string(p) + "]", "is " + std::to_string(page),
           "0 to " + std::to_string(num_pages - 1) + ": there are " + std::to_string(num_pages) + " pages"});
}

void require_lengths(const AttentionOptions& options, const TensorView& q, const TensorView& k) {
  const ProblemShape shape = problem_shape(q, k, options);
  if (options.varlen) {
    const Varlen& varlen = *options.varlen;
    require_cu_seqlens("q", varlen.cu_seqlens_q, varlen.batch, varlen.max_seqlen_q, q.shape[kSeqlen]);
    // With pages it says how many keys, and not where: as many as the table has room for.
    const std::int64_t total = options.pages ? std::numeric_limits<std::int64_t>::max() : k.shape[kSeqlen];
    const std::int64_t longest = options.pages ? shape.seqlen_k : varlen.max_seqlen_k;
    if (varlen.cu_seqlens_k != nullptr) require_cu_seqlens("k", varlen.cu_seqlens_k, varlen.batch, longest, total);
  }
  for (std::int64_t b = 0; b < shape.batch; ++b) {
    const std::int64_t rows = key_rows(options, shape, b);
    const std::int64_t used = require_key_lengths(options, b, rows, k);
    if (options.pages) require_pages(*options.pages, b, used, k);
  }
}

}  // namespace flash_attn_jit
