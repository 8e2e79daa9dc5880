#include "runtime/request/attention_options.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <string>
#include <tuple>

#include "generator/errors.h"
#include "generator/legality.h"
#include "runtime/request/divisor.h"

namespace flash_attn_jit {
namespace {

constexpr float kLeastScale = 0x1p-70f;  // see softmax_scale_log2 in templates/attention_params.cuh
constexpr unsigned kFlipBothSigns = 0x80008000u;

// Kernels add a row and a window's width in 32 bits.
constexpr std::int64_t kMostWindow = 1 << 30;
constexpr std::int64_t kMostSeqlenWithWindow = 1 << 29;

constexpr std::int64_t kMostKeysInPages = 1 << 30;  // kernels count them in 32 bits

// From a query to the next and from a key to the next of an attn_bias: kernels have 32 bits for it.
constexpr std::int64_t kMostStrideBytes = std::numeric_limits<int>::max();

std::string number_text(double x) {
  char text[32];
  std::snprintf(text, sizeof text, "%g", x);
  return text;
}

std::string range_text(double least, double most) {
  return "a number from " + number_text(least) + " to " + number_text(most);
}

void require_tensor(const OptionTensor& tensor) {
  const bool has_elements =
      std::all_of(tensor.shape.begin(), tensor.shape.begin() + tensor.rank, [](std::int64_t size) { return size > 0; });
  require_memory(tensor.name, tensor.data, has_elements);
}

void require_lengths(const Varlen& varlen) {
  for (const auto& [name, seqlen] :
       {std::pair{"max_seqlen_q", varlen.max_seqlen_q}, {"max_seqlen_k", varlen.max_seqlen_k}})
    if (seqlen < 0)
      throw ArgumentError({name, "is " + std::to_string(seqlen), "the length of the longest sequence, 0 or more"});
}

Feature feature_of(PairType type) {
  switch (type) {
    case PairType::kFloat16:
    case PairType::kBFloat16:
      return Feature::kBias16;
    case PairType::kFloat32:
      return Feature::kBias32;
    case PairType::kBool:
      break;
  }
  return Feature::kBoolMask;
}

// As kernels go by them: 0 where one element serves all.
std::array<std::int64_t, 4> strides_of(const PairTensor& bias) {
  std::array<std::int64_t, 4> strides = bias.strides;
  for (int i = 0; i < 4; ++i)
    if (bias.shape[i] == 1) strides[i] = 0;
  return strides;
}

// Kernels index a captured tensor in 32 bits.
void require_user(const UserFunctions& user, const ProblemShape& shape, std::int64_t num_heads) {
  constexpr std::int64_t kMost = std::numeric_limits<int>::max();
  if (user.tensors.size() > kMostUserTensors)
    throw UnsupportedError({"score_mod", "captures " + std::to_string(user.tensors.size()) + " tensors",
                            "at most " + std::to_string(kMostUserTensors)});
  for (const UserTensorView& tensor : user.tensors) {
    std::int64_t reach = 0;
    for (int d = 0; d < tensor.rank; ++d)
      reach += std::max<std::int64_t>(tensor.shape[d], 0) * std::abs(tensor.strides[d]);
    if (reach > kMost)
      throw UnsupportedError({"score_mod", "captures a tensor that spans " + std::to_string(reach) + " elements",
                              "at most " + std::to_string(kMost)});
  }
  if (!user.block_mask) return;
  const BlockMask& mask = *user.block_mask;
  for (const auto& [name, size, whole] :
       {std::tuple{"batch", mask.batch, shape.batch}, {"heads", mask.heads, num_heads}})
    if (size != whole && size != 1)
      throw ArgumentError({"block_mask", "has " + std::to_string(size) + " in its " + name,
                           std::to_string(whole) + ", the query's, or 1"});
}

// A mask for shapes that it does not fit is refused, and not read.
void require_bias(const PairTensor& bias, const std::optional<Varlen>& varlen, const ProblemShape& shape,
                  std::int64_t num_heads, DType dtype) {
  if (bytes_of(bias.type) == 2 && bias.type != pair_type_of(dtype))
    throw ArgumentError({"attn_bias",
                         dtype == DType::kFloat16 ? "has dtype torch.bfloat16 and q torch.float16"
                                                  : "has dtype torch.float16 and q torch.bfloat16",
                         "torch.bool, torch.float32 or q's dtype"});
  std::array<std::int64_t, 4> whole = {shape.batch, num_heads, shape.seqlen_q, shape.seqlen_k};
  if (varlen) {
    whole[2] = varlen->max_seqlen_q;
    whole[3] = varlen->max_seqlen_k;
  }
  for (int i = 0; i < 4; ++i)
    if (bias.shape[i] != whole[i] && bias.shape[i] != 1)
      throw ArgumentError(
          {"attn_bias", "has shape " + numbers_text(bias.shape),
           "a shape that broadcasts to (batch, num_heads, seqlen_q, seqlen_k), " + numbers_text(whole)});
  const auto strides = strides_of(bias);
  if (std::max(std::abs(strides[2]), std::abs(strides[3])) > kMostStrideBytes / bytes_of(bias.type))
    throw UnsupportedError({"attn_bias", "has strides " + numbers_text(bias.strides),
                            "less than 2 GiB from a query to the next and from a key to the next",
                            "Use attn_bias.contiguous()"});
}

// May a lane's neighbouring keys be read at once, whatever the tile? It has up to 8 of them in a load.
constexpr std::int64_t kNeighbours = 8;
bool has_neighbours(const PairTensor& bias, const AttentionOptions& options) {
  const auto [batch, head, query, key] = strides_of(bias);
  const auto is_aligned = [](std::int64_t elements) { return elements % kNeighbours == 0; };
  const bool is_shifted = options.key_lengths && options.key_lengths->leftpad != nullptr;
  const std::uintptr_t bytes = std::min(kNeighbours * bytes_of(bias.type), 16L);
  return key == 1 && !is_shifted && is_aligned(bias.shape[3]) && is_aligned(batch) && is_aligned(head) &&
         is_aligned(query) && reinterpret_cast<std::uintptr_t>(bias.data) % bytes == 0;
}

int window_width(std::int64_t width) {
  return static_cast<int>(width < 0 ? kMostWindow : std::min(width, kMostWindow));
}

// Of a sequence. Where there is no page, a table has nothing to name.
std::int64_t rows_of_keys(const TensorView& k, const AttentionOptions& options) {
  if (!options.pages) return k.shape[kSeqlen];
  return k.shape[kBatch] > 0 ? k.shape[kSeqlen] * options.pages->columns : 0;
}

}  // namespace

ProblemShape problem_shape(const TensorView& q, const TensorView& k, const AttentionOptions& options) {
  const std::int64_t rows_q = q.shape[kSeqlen], rows_k = rows_of_keys(k, options);
  if (!options.varlen) return {q.shape[kBatch], rows_q, rows_k};
  const Varlen& varlen = *options.varlen;
  return {varlen.batch, std::min(varlen.max_seqlen_q, rows_q), std::min(varlen.max_seqlen_k, rows_k)};
}

void set_pages(KeyCacheParams& cache, const PageTable& pages, const TensorView& k) {
  cache.pages = pages.table;
  cache.pages_stride = pages.stride;
  cache.page_size = static_cast<int>(k.shape[kSeqlen]);
  cache.num_pages = static_cast<int>(k.shape[kBatch]);
  cache.by_page_size = divisor_of(std::max(cache.page_size, 1));
}

std::string accepted_scales() { return range_text(-kMostScale, kMostScale) + ", or None for 1/sqrt(head_dim)"; }

double default_softmax_scale(std::int64_t head_dim) {
  return head_dim > 0 ? 1.0 / std::sqrt(double(head_dim)) : 1.0;  // head dim 0 is refused by the legality rules
}

void set_mask(AttentionOptions& options, bool causal, Window window) {
  if (causal) window.right = 0;
  options.window = window;
  if (window.left >= 0)
    options.mask = Mask::kWindow;
  else  // a window without a left end that ends at the diagonal is the causal mask
    options.mask = window.right < 0 ? Mask::kNone : window.right == 0 ? Mask::kCausal : Mask::kWindow;
}

Problem problem_of(const TensorView& q, const TensorView& k, const AttentionOptions& options, int multiprocessors) {
  const ProblemShape shape = problem_shape(q, k, options);
  Problem problem{shape.seqlen_q, shape.seqlen_k, shape.batch * q.shape[kHeads], multiprocessors};
  // A side without end sees half of the keys in the mean.
  const auto width = [&](std::int64_t side) { return side < 0 ? shape.seqlen_k / 2 : std::min(side, shape.seqlen_k); };
  problem.window = width(options.window.left) + width(options.window.right) + 1;
  if (options.user && options.user->block_mask) {
    problem.mask_block_q = options.user->block_mask->block_q;
    problem.mask_block_k = options.user->block_mask->block_k;
  }
  return problem;
}

void require_options(const AttentionOptions& options, const ProblemShape& shape, std::int64_t num_heads) {
  if (!(std::fabs(options.softmax_scale) <= kMostScale))
    throw ArgumentError({"softmax_scale", "is " + number_text(options.softmax_scale), accepted_scales()});
  if (options.softcap != 0 && !(options.softcap >= kLeastSoftcap && options.softcap <= kMostScale))
    throw ArgumentError(
        {"softcap", "is " + number_text(options.softcap), "0.0 for none, or " + range_text(kLeastSoftcap, kMostScale)});
  if (options.dropout && !(options.dropout->p > 0 && options.dropout->p < 1))
    throw ArgumentError(
        {"dropout_p", "is " + number_text(options.dropout->p), "a number from 0.0, for none, to below 1.0"});
  if (options.bias) require_bias(*options.bias, options.varlen, shape, num_heads, options.dtype);
  if (options.user) require_user(*options.user, shape, num_heads);
  visit_tensors(options, shape, num_heads, require_tensor);
  if (options.varlen) require_lengths(*options.varlen);
  if (options.pages && shape.seqlen_k > kMostKeysInPages)
    throw UnsupportedError({"block_table", "has room for " + std::to_string(shape.seqlen_k) + " keys a sequence",
                            "at most " + std::to_string(kMostKeysInPages)});
  const std::int64_t longest = std::max(shape.seqlen_q, shape.seqlen_k);
  if (options.mask == Mask::kWindow && longest > kMostSeqlenWithWindow)
    throw UnsupportedError({"window_size", "comes with a sequence of " + std::to_string(longest) + " rows",
                            "at most " + std::to_string(kMostSeqlenWithWindow) + " rows with a window"});
}

KernelSpec problem_spec(const TensorView& q, const TensorView& k, const TensorView& v, const AttentionOptions& options,
                        GlobalAccess access) {
  require_head_dims(q.shape[kHeadDim], v.shape[kHeadDim]);
  const std::int64_t num_heads_k = k.shape[kHeads];
  KernelSpec spec;
  spec.dtype = options.dtype;
  spec.set_head_dims(static_cast<int>(q.shape[kHeadDim]), static_cast<int>(v.shape[kHeadDim]));
  spec.mask = options.mask;
  spec.features.set(Feature::kSoftcap, options.softcap > 0);
  spec.features.set(Feature::kAlibi, options.alibi.has_value());
  if (options.bias) {
    spec.features.set(feature_of(options.bias->type));
    spec.features.set(Feature::kOneRow, strides_of(*options.bias)[2] == 0);
    spec.features.set(Feature::kUnpaired, !has_neighbours(*options.bias, options));
  }
  spec.features.set(Feature::kDropout, options.dropout.has_value());
  spec.features.set(Feature::kVarlen, options.varlen.has_value());
  spec.features.set(Feature::kKeyLengths, options.key_lengths.has_value());
  spec.features.set(Feature::kPaged, options.pages.has_value());
  spec.features.set(Feature::kSink, options.sinks != nullptr);
  if (options.user) {
    const bool has_score = options.user->has_score, only_adds = options.user->only_adds;
    spec.features.set(Feature::kUserScore, has_score && !only_adds);
    spec.features.set(Feature::kUserBias, has_score && only_adds);
    spec.features.set(Feature::kBlockMask, options.user->block_mask.has_value());
    spec.functions = options.user->code;
  }
  spec.group_size = num_heads_k > 0 ? static_cast<int>(q.shape[kHeads] / num_heads_k) : 1;
  spec.access = access;
  return spec;
}

AttentionParams attention_params(const TensorView& q, const TensorView& k, const AttentionOptions& options) {
  const ProblemShape shape = problem_shape(q, k, options);
  AttentionParams params{};
  params.seqlen_q = static_cast<int>(shape.seqlen_q);
  params.seqlen_k = static_cast<int>(shape.seqlen_k);
  params.num_heads = static_cast<int>(q.shape[kHeads]);
  params.num_heads_k = static_cast<int>(k.shape[kHeads]);
  if (options.varlen) {
    params.cu_seqlens_q = options.varlen->cu_seqlens_q;
    params.cu_seqlens_k = options.varlen->cu_seqlens_k;
    params.total_q = static_cast<int>(q.shape[kSeqlen]);
  }
  params.window_left = window_width(options.window.left);
  params.window_right = window_width(options.window.right);
  const float scale = static_cast<float>(std::fabs(options.softmax_scale));
  const float softcap = static_cast<float>(options.softcap);
  params.softmax_scale_log2 = std::max((softcap > 0 ? softcap : scale) * kLog2E, kLeastScale);
  params.sign = options.softmax_scale < 0 ? kFlipBothSigns : 0;
  if (softcap > 0) params.softcap.product_scale = scale / softcap;
  if (options.alibi) params.alibi = {options.alibi->data, options.alibi->batch_stride};
  if (options.bias) {
    const auto [batch, head, query, key] = strides_of(*options.bias);
    const int bytes = bytes_of(options.bias->type);
    params.pairs = {options.bias->data, batch * bytes, head * bytes, static_cast<int>(query * bytes),
                    static_cast<int>(key * bytes)};
  }
  return params;
}

UserParams user_params(const TensorView& q, const TensorView& k, const AttentionOptions& options, RowSide rows) {
  UserParams params{};
  if (!options.user) return params;
  const UserFunctions& user = *options.user;
  params.product_scale = static_cast<float>(std::fabs(options.softmax_scale));
  for (std::size_t i = 0; i < user.tensors.size(); ++i) {
    UserTensor& tensor = params.tensors.tensor[i];
    tensor.data = user.tensors[i].data;
    for (int d = 0; d < kMostUserDims; ++d) {
      const bool has_dim = d < user.tensors[i].rank;
      tensor.sizes[d] = has_dim ? static_cast<int>(user.tensors[i].shape[d]) : 1;
      tensor.strides[d] = has_dim ? static_cast<int>(user.tensors[i].strides[d]) : 0;
    }
  }
  if (!user.block_mask) return params;
  const BlockMask& mask = *user.block_mask;
  const ProblemShape shape = problem_shape(q, k, options);
  const auto lists = [](const BlockListsView& of) {
    return BlockLists{of.counts, of.columns, static_cast<int>(of.room)};
  };
  const bool of_queries = rows == RowSide::kQueries;
  const std::int64_t row_block = of_queries ? mask.block_q : mask.block_k;
  const std::int64_t column_block = of_queries ? mask.block_k : mask.block_q;
  const std::int64_t row_blocks = blocks_of(of_queries ? shape.seqlen_q : shape.seqlen_k, row_block);
  params.block_mask.partial = lists(of_queries ? mask.keys : mask.queries);
  params.block_mask.whole = lists(of_queries ? mask.whole_keys : mask.whole_queries);
  params.block_mask.batch_stride = mask.batch == 1 ? 0 : mask.heads * row_blocks;
  params.block_mask.head_stride = mask.heads == 1 ? 0 : row_blocks;
  params.block_mask.row_block = static_cast<int>(row_block);
  params.block_mask.column_block = static_cast<int>(column_block);
  params.block_mask.column_blocks =
      static_cast<int>(blocks_of(of_queries ? shape.seqlen_k : shape.seqlen_q, column_block));
  return params;
}

int kept_pairs(double p) {
  constexpr int kAll = 1 << kDropoutDigits;
  return std::clamp(static_cast<int>(std::lround((1 - p) * kAll)), 1, kAll - 1);
}

DropoutParams dropout_params(const AttentionOptions& options) {
  DropoutParams params{};
  if (!options.dropout) return params;
  const int kept = kept_pairs(options.dropout->p);
  params.seed = options.dropout->seed;
  for (int i = 0; i < kDropoutDigits; ++i) params.digits[i] = (kept >> i & 1) != 0 ? ~0u : 0u;
  params.scale = static_cast<float>(1 << kDropoutDigits) / static_cast<float>(kept);
  params.dp_scale = static_cast<float>(options.softmax_scale) * params.scale;
  return params;
}

TensorStrides strides_of(const TensorView& view) {
  return {stride_of(view, kBatch), stride_of(view, kSeqlen), stride_of(view, kHeads)};
}

}  // namespace flash_attn_jit
