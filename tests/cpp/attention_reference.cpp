#include "attention_reference.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "fp16.h"

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

// One head's matrix, widened.
template <class Number>
std::vector<Number> matrix(WatchedTensor& tensor, std::int64_t b, std::int64_t h) {
  std::vector<Number> values;
  const auto [batch, seqlen, heads, dim] = tensor.shape();
  values.reserve(seqlen * dim);
  for (std::int64_t s = 0; s < seqlen; ++s)
    for (std::int64_t d = 0; d < dim; ++d)
      values.push_back(static_cast<Number>(from_fp16(tensor.at(b, s, h, d))));
  return values;
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
  float probability(float p) const { return static_cast<float>(rounded_to_fp16(p * lag_factor)) / lag_factor; }
  double out(float x) const { return rounded_to_fp16(x); }
};

template <class Number, class Rounding>
class Attention {
 public:
  Attention(const AttentionProblem& problem, Rounding rounding)
      : problem_(problem), rounding_(rounding), shape_(problem.q->shape()) {
    result_.out.resize(shape_[0] * shape_[1] * shape_[2] * shape_[3]);
    result_.lse.resize(shape_[0] * shape_[2] * shape_[1]);
  }

  AttentionResult run() {
    const std::int64_t group = shape_[2] / problem_.k->shape()[2];
    for (std::int64_t b = 0; b < shape_[0]; ++b)
      for (std::int64_t h = 0; h < shape_[2]; ++h) {
        if (h % group == 0) {
          k_ = matrix<Number>(*problem_.k, b, h / group);
          v_ = matrix<Number>(*problem_.v, b, h / group);
        }
        q_ = matrix<Number>(*problem_.q, b, h);
        for (std::int64_t i = 0; i < shape_[1]; ++i) row(b, h, i);
      }
    return std::move(result_);
  }

 private:
  void row(std::int64_t b, std::int64_t h, std::int64_t i) {
    const std::int64_t dim = shape_[3], seqlen_k = problem_.k->shape()[1];
    std::int64_t visible = seqlen_k;
    while (visible > 0 && !sees(problem_.mask, shape_[1], seqlen_k, i, visible - 1)) --visible;
    double* out = &result_.out[((b * shape_[1] + i) * shape_[2] + h) * dim];
    double& lse = result_.lse[(b * shape_[2] + h) * shape_[1] + i];
    if (visible == 0) {
      std::fill(out, out + dim, 0.0);
      lse = std::numeric_limits<double>::infinity();
      return;
    }
    std::vector<Number> p(visible), acc(dim, 0);
    Number maximum = -std::numeric_limits<Number>::infinity(), sum = 0;
    bool has_nan = false;
    for (std::int64_t j = 0; j < visible; ++j) {
      p[j] = dot(&q_[i * dim], &k_[j * dim], dim) * static_cast<Number>(problem_.softmax_scale);
      has_nan |= std::isnan(p[j]);
      maximum = std::max(maximum, p[j]);
    }
    if (has_nan) maximum = std::numeric_limits<Number>::quiet_NaN();
    for (std::int64_t j = 0; j < visible; ++j) {
      const Number each = std::exp(p[j] - maximum);
      sum += each;
      const Number rounded = rounding_.probability(each);
      for (std::int64_t d = 0; d < dim; ++d) acc[d] += rounded * v_[j * dim + d];
    }
    for (std::int64_t d = 0; d < dim; ++d) out[d] = rounding_.out(acc[d] / sum);
    lse = maximum + std::log(sum);
  }

  const AttentionProblem& problem_;
  const Rounding rounding_;
  std::array<std::int64_t, 4> shape_;
  std::vector<Number> q_, k_, v_;
  AttentionResult result_;
};

}  // namespace

WatchedTensor::WatchedTensor(std::array<std::int64_t, 4> shape, Layout layout)
    : shape_(shape), strides_(strides_of(shape, layout)) {
  std::int64_t span = 0;
  for (int i = 0; i < 4; ++i) span += (std::max<std::int64_t>(shape[i], 1) - 1) * strides_[i];
  memory_.assign(span + 1 + 2 * kMargin + 8, kPattern);
  const auto address = reinterpret_cast<std::uintptr_t>(memory_.data() + kMargin);
  first_ =
      kMargin + static_cast<std::int64_t>((16 - address % 16) % 16 / 2) + (layout == Layout::kMisaligned);
  const std::vector<bool> elements = element_map();
  for (std::size_t i = 0; i < memory_.size(); ++i)
    if (elements[i]) memory_[i] = kUnwritten;
}

TensorView WatchedTensor::view() { return {memory_.data() + first_, shape_, strides_}; }

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

bool sees(Mask mask, std::int64_t seqlen_q, std::int64_t seqlen_k, std::int64_t row, std::int64_t key) {
  return mask == Mask::kNone || key <= row + seqlen_k - seqlen_q;
}

AttentionResult attention_float64(const AttentionProblem& problem) {
  return Attention<double, ExactRounding>(problem, {}).run();
}

AttentionResult attention_emulated(const AttentionProblem& problem, double lag) {
  return Attention<float, Fp16Rounding>(problem, {static_cast<float>(std::exp2(lag))}).run();
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
        for (std::int64_t d = 0; d < dim; ++d) values.push_back(from_fp16(tensor.at(b, s, h, d)));
  return values;
}

}  // namespace flash_attn_jit::testing
