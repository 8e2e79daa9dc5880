// What a call asks of attention, whichever pass it is: scale, mask, score features, lengths. And how kernels are told.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "generator/kernel_family.h"
#include "generator/kernel_spec.h"
#include "generator/tile_chooser.h"
#include "runtime/request/tensor_view.h"
#include "templates/flash_fwd_params.cuh"

namespace flash_attn_jit {

// Query i sees the keys from i + seqlen_k - seqlen_q - left to i + seqlen_k - seqlen_q + right; negative: without end.
struct Window {
  std::int64_t left = -1, right = -1;
};

// A number for every query head: (batch, num_heads) float32, or (num_heads) with a batch stride of 0.
struct PerHead {
  const float* data = nullptr;
  std::int64_t batch_stride = 0;
};

// Sequences that lie one behind the other in tensors of shape (1, total, heads, head_dim). Sequence b has the rows
// [cu_seqlens[b], cu_seqlens[b + 1]).
struct Varlen {
  const int* cu_seqlens_q = nullptr;  // (batch + 1), in the memory of the tensors' device
  const int* cu_seqlens_k = nullptr;
  std::int64_t batch = 0;
  std::int64_t max_seqlen_q = 0, max_seqlen_k = 0;  // no sequence is longer
};

// Of every sequence's rows in k and v, those from leftpad on and below used + used_more are its keys; null: from the
// first, to the last. (batch) each, in the memory of the tensors' device.
struct KeyLengths {
  const int* used = nullptr;
  const int* leftpad = nullptr;
  std::int64_t used_more = 0;  // with `used`
};

// k and v are (pages, page size, heads, head_dim): rows p x page size and on of sequence b lie in page table[b][p].
struct PageTable {
  const int* table = nullptr;  // (batch, columns), in the memory of the tensors' device
  std::int64_t stride = 0, columns = 0;
};

// A tensor that says something of every pair of a query and a key, (batch, num_heads, seqlen_q, seqlen_k); varlen: of
// the longest sequences. Strides count elements.
enum class PairType : std::uint8_t { kFloat16, kBFloat16, kFloat32, kBool };
struct PairTensor {
  const void* data = nullptr;
  PairType type = PairType::kFloat16;
  std::array<std::int64_t, 4> shape{}, strides{};  // sizes are the problem's, or 1 for all
};

// Of the probabilities a share of p becomes 0, and the others grow by 1 / (1 - p). Which of them the seed says, in the
// memory of the tensors' device. p counts in steps of 2^-16, of which there is one at least, and one less than all.
struct Dropout {
  double p = 0;
  const int* seed = nullptr;  // 2 of them
};

constexpr int bytes_of(PairType type) { return type == PairType::kBool ? 1 : type == PairType::kFloat32 ? 4 : 2; }

// Of numbers as the tensors have them.
constexpr PairType pair_type_of(DType dtype) {
  return dtype == DType::kFloat16 ? PairType::kFloat16 : PairType::kBFloat16;
}

// A user's functions of scores and pairs: their code, as the library knows it, and the tensors that it reads.
struct UserTensorView {
  const void* data = nullptr;
  int rank = 0;
  std::array<std::int64_t, kMostUserDims> shape{}, strides{};  // the first `rank` of each; strides count elements
  int element_bytes = 4;
};

// For each block of rows the blocks of columns that it sees: see BlockLists. Contiguous.
struct BlockListsView {
  const int* counts = nullptr;   // (batch, heads, blocks of rows)
  const int* columns = nullptr;  // (batch, heads, blocks of rows, room)
  std::int64_t room = 0;
};
struct BlockMask {
  std::int64_t batch = 1, heads = 1;  // the problem's, or 1 for all
  std::int64_t block_q = 0, block_k = 0;
  BlockListsView keys, whole_keys;        // of blocks of queries; no whole ones where its counts are null
  BlockListsView queries, whole_queries;  // of blocks of keys: backward
};

struct UserFunctions {
  std::uint64_t code = 0;
  bool has_score = false, only_adds = false;  // to a score something that the score has no part in
  std::vector<UserTensorView> tensors;
  std::optional<BlockMask> block_mask;
};

// A score, at most 256 x 65504^2 before it is scaled, stays above kNoMaximum of templates/softmax.cuh, and finite once
// it is divided by a softcap. ALiBi's slopes lie on the device and are not checked: what they add rounds as a score
// does, and with |slope| x distance beyond 1e7 by more than the exponents of float32 take.
inline constexpr double kMostScale = 1e17;
inline constexpr float kLeastSoftcap = 1e-6f;

struct AttentionOptions {
  DType dtype = DType::kFloat16;  // of q, k, v, out and their gradients
  double softmax_scale = 0;
  Mask mask = Mask::kNone;
  Window window;       // where mask is kWindow
  double softcap = 0;  // softcap * tanh(score / softcap); 0: none
  std::optional<PerHead> alibi;
  std::optional<PairTensor>
      bias;  // added to the scores, of `dtype` or float32; or of bools: whether the query sees the key
  const float* sinks = nullptr;  // (num_heads), a logit of each head that takes part in its softmax; null: none
  std::optional<Dropout> dropout;
  std::optional<Varlen> varlen;
  std::optional<KeyLengths> key_lengths;
  std::optional<PageTable> pages;             // with varlen, cu_seqlens_k may be null
  std::shared_ptr<const UserFunctions> user;  // null: none
  // Of a forward pass: a backward pass may follow, whose scores have to be the same bits. The decode kernel's are not.
  bool has_backward = false;
};

// Of a cache's parameters those that say where pages lie; `k` is (pages, page size, heads, head_dim).
void set_pages(KeyCacheParams& cache, const PageTable& pages, const TensorView& k);

// What `softmax_scale` accepts, in words.
std::string accepted_scales();

// The scale of a call that names none: 1/sqrt(head_dim).
double default_softmax_scale(std::int64_t head_dim);

// causal forces a window's right half to 0.
void set_mask(AttentionOptions& options, bool causal, Window window);

// The sizes that a grid follows from; varlen: the longest sequences'.
struct ProblemShape {
  std::int64_t batch, seqlen_q, seqlen_k;
};
ProblemShape problem_shape(const TensorView& q, const TensorView& k, const AttentionOptions& options);

// What a tile is chosen by. `q` and `k` are the problem's.
Problem problem_of(const TensorView& q, const TensorView& k, const AttentionOptions& options, int multiprocessors);

// A tensor that an option reads.
struct OptionTensor {
  const char* name;
  const void* data;
  int rank;
  std::array<std::int64_t, 4> shape, strides;  // the first `rank` of each; strides count elements
  int element_bytes = 4;
};

constexpr std::int64_t blocks_of(std::int64_t rows, std::int64_t block) { return (rows + block - 1) / block; }

// The part of visit_tensors() that is a user's.
template <typename Visit>
void visit_user_tensors(const UserFunctions& user, const ProblemShape& shape, Visit visit) {
  for (const UserTensorView& tensor : user.tensors)
    visit(OptionTensor{"a captured tensor", tensor.data, tensor.rank, tensor.shape, tensor.strides,
                       tensor.element_bytes});
  if (!user.block_mask) return;
  const BlockMask& mask = *user.block_mask;
  const auto lists = [&](const BlockListsView& of, std::int64_t rows, const char* counts, const char* columns) {
    if (of.counts == nullptr) return;
    visit(OptionTensor{counts, of.counts, 3, {mask.batch, mask.heads, rows}, {mask.heads * rows, rows, 1}});
    visit(OptionTensor{columns,
                       of.columns,
                       4,
                       {mask.batch, mask.heads, rows, of.room},
                       {mask.heads * rows * of.room, rows * of.room, of.room, 1}});
  };
  const std::int64_t blocks_q = blocks_of(shape.seqlen_q, mask.block_q);
  const std::int64_t blocks_k = blocks_of(shape.seqlen_k, mask.block_k);
  lists(mask.keys, blocks_q, "kv_num_blocks", "kv_indices");
  lists(mask.whole_keys, blocks_q, "full_kv_num_blocks", "full_kv_indices");
  lists(mask.queries, blocks_k, "q_num_blocks", "q_indices");
  lists(mask.whole_queries, blocks_k, "full_q_num_blocks", "full_q_indices");
}

// Calls visit(const OptionTensor&) for each tensor of the options that are on. `num_heads` are q's.
template <typename Visit>
void visit_tensors(const AttentionOptions& options, const ProblemShape& shape, std::int64_t num_heads, Visit visit) {
  if (options.varlen) {
    const std::int64_t ends = options.varlen->batch + 1;
    visit(OptionTensor{"cu_seqlens_q", options.varlen->cu_seqlens_q, 1, {ends}, {1}});
    if (options.varlen->cu_seqlens_k != nullptr || !options.pages)
      visit(OptionTensor{"cu_seqlens_k", options.varlen->cu_seqlens_k, 1, {ends}, {1}});
  }
  if (options.key_lengths && options.key_lengths->used != nullptr)
    visit(OptionTensor{"seqused_k", options.key_lengths->used, 1, {shape.batch}, {1}});
  if (options.key_lengths && options.key_lengths->leftpad != nullptr)
    visit(OptionTensor{"leftpad_k", options.key_lengths->leftpad, 1, {shape.batch}, {1}});
  if (options.pages)
    visit(OptionTensor{
        "block_table", options.pages->table, 2, {shape.batch, options.pages->columns}, {options.pages->stride, 1}});
  if (options.bias)
    visit(OptionTensor{"attn_bias", options.bias->data, 4, options.bias->shape, options.bias->strides,
                       bytes_of(options.bias->type)});
  if (options.dropout) visit(OptionTensor{"dropout_seed", options.dropout->seed, 1, {2}, {1}});  // its halves
  if (options.sinks != nullptr) visit(OptionTensor{"s_aux", options.sinks, 1, {num_heads}, {1}});
  if (options.alibi)
    visit(OptionTensor{
        "alibi_slopes", options.alibi->data, 2, {shape.batch, num_heads}, {options.alibi->batch_stride, 1}});
  if (options.user) visit_user_tensors(*options.user, shape, visit);
}

// Throws ArgumentError or UnsupportedError, which names the option. `num_heads` are q's.
void require_options(const AttentionOptions& options, const ProblemShape& shape, std::int64_t num_heads);

// The spec of a problem, but for its kind and tile. Throws UnsupportedError where no tile can make it legal.
KernelSpec problem_spec(const TensorView& q, const TensorView& k, const TensorView& v, const AttentionOptions& options,
                        GlobalAccess access);

// How many of 2^kDropoutDigits pairs dropout keeps.
int kept_pairs(double p);

// All zeros without a user's functions. `rows` of the kernel's blocks: its lists of a block mask are theirs.
UserParams user_params(const TensorView& q, const TensorView& k, const AttentionOptions& options, RowSide rows);

// All zeros without dropout.
DropoutParams dropout_params(const AttentionOptions& options);

// Of the same problem.
AttentionParams attention_params(const TensorView& q, const TensorView& k, const AttentionOptions& options);

TensorStrides strides_of(const TensorView& view);

}  // namespace flash_attn_jit
