// Attention in float64 and in emulated fp16/fp32, and tensors whose surroundings are watched.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <vector>

#include "runtime/request/forward.h"

namespace flash_attn_jit::testing {

// How a (batch, seqlen, heads, head_dim) tensor lies in memory.
enum class Layout {
  kContiguous,  // (batch, seqlen, heads, head_dim)
  kTransposed,  // (batch, heads, seqlen, head_dim) seen with two dims swapped
  kRowGaps,     // rows, heads and batches apart, by multiples of 16 bytes
  kOddStrides,  // the same by odd numbers of elements
  kMisaligned,  // contiguous, from an address that is 2 bytes behind a multiple of 16
};

// Owns its memory. Elements start as NaN; gaps and some bytes on both sides hold a pattern that must stay.
class WatchedTensor {
 public:
  WatchedTensor(std::array<std::int64_t, 4> shape, Layout layout, DType dtype = DType::kFloat16);

  TensorView view();
  std::uint16_t& at(std::int64_t b, std::int64_t s, std::int64_t h, std::int64_t d) {
    return memory_[first_ + b * strides_[0] + s * strides_[1] + h * strides_[2] + d];
  }
  double value(std::int64_t b, std::int64_t s, std::int64_t h, std::int64_t d);
  void set(std::int64_t b, std::int64_t s, std::int64_t h, std::int64_t d, double value);  // rounded
  // A head's rows [begin, begin + count), widened.
  template <class Number>
  std::vector<Number> rows(std::int64_t b, std::int64_t begin, std::int64_t count, std::int64_t h) {
    std::vector<Number> values;
    values.reserve(count * shape_[3]);
    for (std::int64_t s = begin; s < begin + count; ++s)
      for (std::int64_t d = 0; d < shape_[3]; ++d) values.push_back(static_cast<Number>(value(b, s, h, d)));
    return values;
  }
  const std::array<std::int64_t, 4>& shape() const { return shape_; }
  DType dtype() const { return dtype_; }

  // All memory, elements and what lies between and around them.
  const std::vector<std::uint16_t>& memory() const { return memory_; }

  // Whether everything but the elements still holds the pattern.
  bool surroundings_are_untouched() const;

 private:
  std::vector<bool> element_map() const;

  std::array<std::int64_t, 4> shape_, strides_;
  DType dtype_;
  std::int64_t first_ = 0;
  std::vector<std::uint16_t> memory_;
};

struct AttentionProblem {
  WatchedTensor* q;
  WatchedTensor* k;
  WatchedTensor* v;
  AttentionOptions options;
};

// Where one sequence lies: rows of batch entry `b`, which is 0 for varlen.
struct SequenceRows {
  std::int64_t index, b, q_begin, seqlen_q, k_begin, seqlen_k;
};
std::vector<SequenceRows> sequences_of(const AttentionProblem& problem);

// Whether query i of the sequence may see key j, by the definition of the masks.
bool sees(const AttentionOptions& options, const SequenceRows& sequence, std::int64_t i, std::int64_t j);

// Whether that of head h does, where attn_bias hides pairs, too.
bool sees(const AttentionOptions& options, const SequenceRows& sequence, std::int64_t h, std::int64_t i,
          std::int64_t j);

// What attn_bias adds to a score; -inf hides the pair, as False does.
double bias_of(const PairTensor& bias, const SequenceRows& sequence, std::int64_t h, std::int64_t i, std::int64_t j);

// What dropout multiplies a probability of query head h by, of `heads`: 1 where there is none.
double kept_share(const AttentionOptions& options, const SequenceRows& sequence, std::int64_t heads, std::int64_t h,
                  std::int64_t i, std::int64_t j);

// Of head h; -inf where there is none.
double sink_of(const AttentionOptions& options, std::int64_t h);

// What softcap, ALiBi and attn_bias make of a scaled score, and the derivative of that.
template <class Number>
struct Score {
  Number value, derivative;
};
template <class Number>
Score<Number> adjusted(const AttentionOptions& options, const SequenceRows& sequence, std::int64_t h, std::int64_t i,
                       std::int64_t j, Number scaled) {
  Score<Number> score{scaled, 1};
  if (options.softcap > 0) {
    const Number cap = options.softcap, tanh = std::tanh(scaled / cap);
    score = {cap * tanh, 1 - tanh * tanh};
  }
  if (options.alibi)
    score.value -= static_cast<Number>(options.alibi->data[sequence.index * options.alibi->batch_stride + h]) *
                   static_cast<Number>(std::llabs(i + sequence.seqlen_k - sequence.seqlen_q - j));
  if (options.bias) score.value += static_cast<Number>(bias_of(*options.bias, sequence, h, i, j));
  return score;
}

// out is (batch, seqlen_q, heads, v's head_dim), lse is (batch, heads, seqlen_q); both contiguous.
struct AttentionResult {
  std::vector<double> out, lse;
};

// In float64. A row that sees no key: out 0, lse +inf, or the sink.
AttentionResult attention_float64(const AttentionProblem& problem);

// In float32, with out rounded to q's dtype, and probabilities to fp16, relative to a running maximum that lags behind
// the row's by `lag` log2 units: the error that any kernel with fp16 operands has to make.
AttentionResult attention_emulated(const AttentionProblem& problem, double lag);

// The elements, widened, as in a contiguous tensor.
std::vector<double> values_of(WatchedTensor& tensor);

// max |x - exact|, where both infinite and of one sign counts as equal and any other NaN or infinity as infinite.
double max_error(const std::vector<double>& x, const std::vector<double>& exact);

}  // namespace flash_attn_jit::testing
