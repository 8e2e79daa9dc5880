// The problem that stands for a problem class while it is tuned: sizes, options, and the numbers in its tensors.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "generator/families/families.h"
#include "generator/kernel_spec.h"
#include "runtime/request/attention_options.h"
#include "runtime/tuner/dropout_bits.h"
#include "runtime/tuner/record.h"

namespace flash_attn_jit {

// Tensors are contiguous, (batch, seqlen, heads, head_dim); varlen, (1, batch x seqlen, heads, head_dim), with
// sequences of one length. Of keys with lengths all are used; pages lie in the order of their keys.
struct AttentionCase {
  KernelSpec spec;  // the tile says nothing
  std::int64_t batch = 0, num_heads = 0, num_heads_k = 0, seqlen_q = 0, seqlen_k = 0;

  Window window() const;  // a quarter of the keys, up to the diagonal

  // What features read of each query head: a number, two at least. Their first 8 bytes are the seed of dropout. On the
  // device they lie at `head_numbers`.
  std::vector<float> head_numbers() const;
  // And of each pair: rows that overlap in memory, so that it takes little. On the device it lies at `pairs`. (What
  // reading them from DRAM would cost is not in a measurement.)
  std::vector<std::uint8_t> pair_bytes() const;
  AttentionOptions options(const float* head_numbers, const void* pairs) const;

  // What becomes of the product q k of query i of head h and key j, with the same options in float64.
  struct Score {
    double value, derivative;  // by the scaled product
  };
  Score score(double product, std::int64_t h, std::int64_t i, std::int64_t j) const;
  std::optional<DropoutBits> dropout() const;
  std::optional<double> sink(std::int64_t h) const;  // of head h, where heads have one
  double softmax_scale() const { return default_softmax_scale(spec.head_dim); }

  bool is_backward() const { return !family_of(spec.kind).results.out; }
  std::int64_t rows_q() const { return batch * seqlen_q; }
  std::int64_t rows_k() const { return batch * seqlen_k; }
  std::int64_t page_size() const;  // where keys lie in pages: the greatest up to 256 that divides their number
  std::int64_t statistics() const { return rows_q() * num_heads; }  // numbers of softmax_lse and of delta
  // Where softmax_lse and delta have the row of query i.
  std::int64_t statistic_at(std::int64_t b, std::int64_t h, std::int64_t i) const;

  // Whether query i sees key j.
  bool sees(std::int64_t i, std::int64_t j) const;

  // What is said of that pair, and where it lies in pair_bytes().
  double pair_number(std::int64_t i, std::int64_t j) const;
  std::int64_t pair_at(std::int64_t i, std::int64_t j) const;

  friend bool operator==(const AttentionCase&, const AttentionCase&) = default;
};

// As many keys or some more, of the same class: a multiple of 16, as pages have them that are the fast ones, and as
// rows of pairs do that are read several at once.
std::int64_t keys_of_fast_pages(std::int64_t keys);

// What its class follows from.
Problem problem_of(const AttentionCase& attention, int multiprocessors);

// Like `whole`, but small enough for float64 on the CPU, and with more rows than any tile has, none of them full.
AttentionCase small_case(const AttentionCase& whole);

// Normal random numbers, rounded to fp16; they come again after a prime, so that rows differ.
enum class CaseTensor { kQ, kK, kV, kDout };
class CaseNumbers {
 public:
  explicit CaseNumbers(std::uint64_t seed);

  std::uint16_t bits(CaseTensor tensor, std::int64_t index) const { return bits_[at(tensor, index)]; }
  double value(CaseTensor tensor, std::int64_t index) const { return values_[at(tensor, index)]; }

  // The values from `index` on, as many as a head has dims.
  const float* row(CaseTensor tensor, std::int64_t index) const { return &values_[at(tensor, index)]; }

  // `count` of them from `index` on, as many as lie together in memory.
  const std::uint16_t* run(CaseTensor tensor, std::int64_t index, std::int64_t& count) const;

 private:
  static std::size_t at(CaseTensor tensor, std::int64_t index);

  std::vector<std::uint16_t> bits_;
  std::vector<float> values_;  // the same, and the first of them once more behind the last
};

}  // namespace flash_attn_jit
