#include "attention_reference.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "fp16.h"
#include "runtime/tuner/dropout_bits.h"

namespace flash_attn_jit::testing {
namespace {

constexpr std::uint16_t kPattern = 0x7e5a;  // a NaN that arithmetic does not make
constexpr std::uint16_t kUnwritten = 0x7fff;
constexpr std::int64_t kMargin = 64;  // elements on each side

std::array<std::int64_t, 4> strides_of(const std::array<std::int64_t, 4>& shape, Layout layout) {
  const auto [batch, seqlen, heads, dim] = shape;
  switch (layout) {
    case Layout::kContiguous:
    case Layout::kMisaligned:
      return {seqlen * heads * dim, heads * dim, dim, 1};
    case Layout::kTransposed:
      return {heads * seqlen * dim, dim, seqlen * dim, 1};
    case Layout::kRowGaps: {
      const std::int64_t head = (dim + 7) / 8 * 8 + 8, row = heads * head + 24;
      return {seqlen * row + 16, row, head, 1};
    }
    case Layout::kOddStrides: {
      const std::int64_t head = dim + 1 + dim % 2 * 2, row = heads * head + 5;
      return {seqlen * row + 3, row, head, 1};
    }
  }
  return {};
}

template <class Number>
Number dot(const Number* x, const Number* y, std::int64_t n) {
  Number sum = 0;
  for (std::int64_t i = 0; i < n; ++i) sum += x[i] * y[i];
  return sum;
}

struct ExactRounding {
  double probability(double p) const { return p; }
  double out(double x) const { return x; }
};

// Rounds probabilities 2^lag times as large as they are, as does a running maximum that lags behind the row's.
struct Fp16Rounding {
  float lag_factor;
  DType dtype;  // of out
  float probability(float p) const { return static_cast<float>(rounded_to_fp16(p * lag_factor)) / lag_factor; }
  double out(float x) const { return rounded_to(dtype, x); }
};

template <class Number, class Rounding>
class Attention {
 public:
  Attention(const AttentionProblem& problem, Rounding rounding)
      : problem_(problem), rounding_(rounding), shape_(problem.q->shape()), value_dim_(problem.v->shape()[3]) {
    result_.out.resize(shape_[0] * shape_[1] * shape_[2] * value_dim_);
    result_.lse.resize(shape_[0] * shape_[2] * shape_[1]);
  }

  AttentionResult run() {
    const std::int64_t heads_k = problem_.k->shape()[2], group = heads_k > 0 ? shape_[2] / heads_k : 1;
    for (const SequenceRows& sequence : sequences_of(problem_))
      for (std::int64_t h = 0; h < shape_[2]; ++h) {
        if (h % group == 0) {
          k_ = problem_.k->template rows<Number>(sequence.b, sequence.k_begin, sequence.seqlen_k, h / group);
          v_ = problem_.v->template rows<Number>(sequence.b, sequence.k_begin, sequence.seqlen_k, h / group);
        }
        q_ = problem_.q->template rows<Number>(sequence.b, sequence.q_begin, sequence.seqlen_q, h);
        for (std::int64_t i = 0; i < sequence.seqlen_q; ++i) row(sequence, h, i);
      }
    return std::move(result_);
  }

 private:
  void row(const SequenceRows& sequence, std::int64_t h, std::int64_t i) {
    const std::int64_t dim = shape_[3], query = sequence.q_begin + i;
    double* out = &result_.out[((sequence.b * shape_[1] + query) * shape_[2] + h) * value_dim_];
    double& lse = result_.lse[(sequence.b * shape_[2] + h) * shape_[1] + query];
    std::vector<Number> scores;
    std::vector<std::int64_t> keys;
    Number maximum = -std::numeric_limits<Number>::infinity(), sum = 0;
    bool has_nan = false;
    for (std::int64_t j = 0; j < sequence.seqlen_k; ++j) {
      if (!sees(problem_.options, sequence, h, i, j)) continue;
      const Number dot_product = dot(&q_[i * dim], &k_[j * dim], dim);
      const Number scaled = dot_product * static_cast<Number>(problem_.options.softmax_scale);
      keys.push_back(j);
      scores.push_back(adjusted(problem_.options, sequence, h, i, j, scaled).value);
      has_nan |= std::isnan(scores.back());
      maximum = std::max(maximum, scores.back());
    }
    const Number sink = sink_of(problem_.options, h);
    const bool has_sink = !(sink == -std::numeric_limits<Number>::infinity());
    if (keys.empty()) {
      std::fill(out, out + value_dim_, 0.0);
      lse = has_sink ? sink : std::numeric_limits<double>::infinity();
      return;
    }
    if (has_nan) maximum = std::numeric_limits<Number>::quiet_NaN();
    std::vector<Number> acc(value_dim_, 0);
    for (std::size_t n = 0; n < keys.size(); ++n) {
      const Number each = std::exp(scores[n] - maximum);
      sum += each;
      const auto share = static_cast<Number>(kept_share(problem_.options, sequence, shape_[2], h, i, keys[n]));
      const Number rounded = share * rounding_.probability(each);
      for (std::int64_t d = 0; d < value_dim_; ++d) acc[d] += rounded * v_[keys[n] * value_dim_ + d];
    }
    Number weight = 1;
    if (has_sink) {
      const Number raised = std::max(maximum, sink);
      weight = std::exp(maximum - raised);
      sum = sum * weight + std::exp(sink - raised);
      maximum = raised;
    }
    for (std::int64_t d = 0; d < value_dim_; ++d) out[d] = rounding_.out(acc[d] * weight / sum);
    lse = maximum + std::log(sum);
  }

  const AttentionProblem& problem_;
  const Rounding rounding_;
  std::array<std::int64_t, 4> shape_;  // of q
  std::int64_t value_dim_;
  std::vector<Number> q_, k_, v_;
  AttentionResult result_;
};

}  // namespace

WatchedTensor::WatchedTensor(std::array<std::int64_t, 4> shape, Layout layout, DType dtype)
    : shape_(shape), strides_(strides_of(shape, layout)), dtype_(dtype) {
  std::int64_t span = 0;
  for (int i = 0; i < 4; ++i) span += (std::max<std::int64_t>(shape[i], 1) - 1) * strides_[i];
  memory_.assign(span + 1 + 2 * kMargin + 8, kPattern);
  const auto address = reinterpret_cast<std::uintptr_t>(memory_.data() + kMargin);
  first_ = kMargin + static_cast<std::int64_t>((16 - address % 16) % 16 / 2) + (layout == Layout::kMisaligned);
  const std::vector<bool> elements = element_map();
  for (std::size_t i = 0; i < memory_.size(); ++i)
    if (elements[i]) memory_[i] = kUnwritten;
}

TensorView WatchedTensor::view() { return {memory_.data() + first_, shape_, strides_}; }

double WatchedTensor::value(std::int64_t b, std::int64_t s, std::int64_t h, std::int64_t d) {
  return from_stored(dtype_, at(b, s, h, d));
}

void WatchedTensor::set(std::int64_t b, std::int64_t s, std::int64_t h, std::int64_t d, double value) {
  at(b, s, h, d) = to_stored(dtype_, value);
}

std::vector<bool> WatchedTensor::element_map() const {
  std::vector<bool> elements(memory_.size(), false);
  for (std::int64_t b = 0; b < shape_[0]; ++b)
    for (std::int64_t s = 0; s < shape_[1]; ++s)
      for (std::int64_t h = 0; h < shape_[2]; ++h)
        for (std::int64_t d = 0; d < shape_[3]; ++d)
          elements[first_ + b * strides_[0] + s * strides_[1] + h * strides_[2] + d] = true;
  return elements;
}

bool WatchedTensor::surroundings_are_untouched() const {
  const std::vector<bool> elements = element_map();
  for (std::size_t i = 0; i < memory_.size(); ++i)
    if (!elements[i] && memory_[i] != kPattern) return false;
  return true;
}

std::vector<SequenceRows> sequences_of(const AttentionProblem& problem) {
  const std::int64_t rows_q = problem.q->shape()[1], rows_k = problem.k->shape()[1];
  std::vector<SequenceRows> sequences;
  if (const auto& varlen = problem.options.varlen) {
    for (std::int64_t b = 0; b < varlen->batch; ++b) {
      const int *q = varlen->cu_seqlens_q + b, *k = varlen->cu_seqlens_k + b;
      sequences.push_back({b, 0, q[0], q[1] - q[0], k[0], k[1] - k[0]});
    }
  } else {
    for (std::int64_t b = 0; b < problem.q->shape()[0]; ++b) sequences.push_back({b, b, 0, rows_q, 0, rows_k});
  }
  return sequences;
}

bool sees(const AttentionOptions& options, const SequenceRows& sequence, std::int64_t i, std::int64_t j) {
  const std::int64_t ahead = j - (i + sequence.seqlen_k - sequence.seqlen_q);
  switch (options.mask) {
    case Mask::kNone:
      return true;
    case Mask::kCausal:
      return ahead <= 0;
    case Mask::kWindow:
      return (options.window.left < 0 || ahead >= -options.window.left) &&
             (options.window.right < 0 || ahead <= options.window.right);
  }
  return false;
}

bool sees(const AttentionOptions& options, const SequenceRows& sequence, std::int64_t h, std::int64_t i,
          std::int64_t j) {
  return sees(options, sequence, i, j) &&
         !(options.bias && bias_of(*options.bias, sequence, h, i, j) == -std::numeric_limits<double>::infinity());
}

double bias_of(const PairTensor& bias, const SequenceRows& sequence, std::int64_t h, std::int64_t i, std::int64_t j) {
  std::int64_t at = 0;
  const std::int64_t place[] = {sequence.index, h, i, j};
  for (int d = 0; d < 4; ++d) at += bias.shape[d] == 1 ? 0 : place[d] * bias.strides[d];
  switch (bias.type) {
    case PairType::kFloat16:
      return from_fp16(static_cast<const std::uint16_t*>(bias.data)[at]);
    case PairType::kBFloat16:
      return Bf16Format::value_of(static_cast<const std::uint16_t*>(bias.data)[at]);
    case PairType::kFloat32:
      return static_cast<const float*>(bias.data)[at];
    case PairType::kBool:
      break;
  }
  return static_cast<const std::uint8_t*>(bias.data)[at] != 0 ? 0 : -std::numeric_limits<double>::infinity();
}

double kept_share(const AttentionOptions& options, const SequenceRows& sequence, std::int64_t heads, std::int64_t h,
                  std::int64_t i, std::int64_t j) {
  if (!options.dropout) return 1;
  const DropoutBits bits(options.dropout->seed, options.dropout->p);
  return bits.keep(sequence.index * heads + h, i, j) ? bits.scale() : 0;
}

double sink_of(const AttentionOptions& options, std::int64_t h) {
  return options.sinks != nullptr ? options.sinks[h] : -std::numeric_limits<double>::infinity();
}

AttentionResult attention_float64(const AttentionProblem& problem) {
  return Attention<double, ExactRounding>(problem, {}).run();
}

AttentionResult attention_emulated(const AttentionProblem& problem, double lag) {
  return Attention<float, Fp16Rounding>(problem, {static_cast<float>(std::exp2(lag)), problem.q->dtype()}).run();
}

double max_error(const std::vector<double>& x, const std::vector<double>& exact) {
  double worst = 0;
  for (std::size_t i = 0; i < x.size(); ++i) {
    if (x[i] == exact[i]) continue;
    const double error = std::fabs(x[i] - exact[i]);
    worst = std::isfinite(error) ? std::max(worst, error) : INFINITY;
  }
  return worst;
}

std::vector<double> values_of(WatchedTensor& tensor) {
  std::vector<double> values;
  const auto [batch, seqlen, heads, dim] = tensor.shape();
  for (std::int64_t b = 0; b < batch; ++b)
    for (std::int64_t s = 0; s < seqlen; ++s)
      for (std::int64_t h = 0; h < heads; ++h)
        for (std::int64_t d = 0; d < dim; ++d) values.push_back(tensor.value(b, s, h, d));
  return values;
}

}  // namespace flash_attn_jit::testing
