#include "runtime/tuner/reference.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <optional>

#include "runtime/tuner/half.h"

namespace flash_attn_jit {
namespace {

constexpr double kHalfUnit = 0x1p-11;   // of fp16: the most that rounding changes a number of 1
constexpr double kLeastHalf = 0x1p-25;  // the same of numbers next to 0
constexpr double kMargin = 2;
constexpr double kFloat32Noise = 1e-5;

ReferenceRow row_of(std::int64_t dims) {
  const auto count = static_cast<std::size_t>(dims);
  return {std::vector<double>(count, 0), std::vector<double>(count, 0)};
}

// `magnitude`: the sum of the magnitudes of the products that make the row, `count` of them.
void finish(ReferenceRow& row, double scale, std::int64_t count, double largest) {
  for (std::size_t d = 0; d < row.value.size(); ++d) {
    row.value[d] *= scale;
    const double rounded_products =
        kHalfUnit * row.bound[d] * scale + kLeastHalf * static_cast<double>(count) * largest * scale;
    row.bound[d] = kMargin * (rounded_products + kHalfUnit * std::fabs(row.value[d])) + kFloat32Noise;
  }
}

constexpr double kLargestNumber = 6;  // no normal number of a million is larger

}  // namespace

const float* CaseReference::query_row(CaseTensor tensor, std::int64_t b, std::int64_t h, std::int64_t i) const {
  return numbers_.row(tensor, ((b * attention_.seqlen_q + i) * attention_.num_heads + h) * attention_.spec.head_dim);
}

const float* CaseReference::key_row(CaseTensor tensor, std::int64_t b, std::int64_t head_k, std::int64_t j) const {
  return numbers_.row(tensor,
                      ((b * attention_.seqlen_k + j) * attention_.num_heads_k + head_k) * attention_.spec.head_dim);
}

double CaseReference::dot(const float* x, const float* y) const {
  // Some sums side by side, so that none waits for the one before it.
  std::array<double, 4> sums{};
  for (int d = 0; d < attention_.spec.head_dim; ++d)
    sums[static_cast<std::size_t>(d % 4)] += static_cast<double>(x[d]) * static_cast<double>(y[d]);
  return sums[0] + sums[1] + sums[2] + sums[3];
}

CaseReference::Score CaseReference::score(std::int64_t b, std::int64_t h, std::int64_t i, std::int64_t j) const {
  return attention_.score(dot(query_row(CaseTensor::kQ, b, h, i), key_row(CaseTensor::kK, b, h / group(), j)), h, i, j);
}

double CaseReference::kept(std::int64_t b, std::int64_t h, std::int64_t i, std::int64_t j) const {
  if (!dropout_) return 1;
  return dropout_->keep(b * attention_.num_heads + h, i, j) ? dropout_->scale() : 0;
}

ForwardRow CaseReference::forward(std::int64_t b, std::int64_t h, std::int64_t i) const {
  const std::int64_t dims = attention_.spec.head_dim;
  ForwardRow row{row_of(dims)};
  std::vector<std::pair<std::int64_t, double>> scores;
  double greatest = -std::numeric_limits<double>::infinity(), sum = 0;
  for (std::int64_t j = 0; j < attention_.seqlen_k; ++j) {
    if (!attention_.sees(i, j)) continue;
    scores.emplace_back(j, score(b, h, i, j).value);
    greatest = std::max(greatest, scores.back().second);
  }
  const std::optional<double> sink = attention_.sink(h);
  if (sink) {
    greatest = std::max(greatest, *sink);
    sum = std::exp(*sink - greatest);
  }
  for (const auto& [j, value] : scores) {
    const double probability = std::exp(value - greatest);
    sum += probability;
    const double weight = probability * kept(b, h, i, j);
    const float* const v = key_row(CaseTensor::kV, b, h / group(), j);
    for (std::int64_t d = 0; d < dims; ++d) {
      const double product = weight * v[d];
      row.out.value[static_cast<std::size_t>(d)] += product;
      row.out.bound[static_cast<std::size_t>(d)] += std::fabs(product);
    }
  }
  row.lse = scores.empty() && !sink ? std::numeric_limits<double>::infinity() : greatest + std::log(sum);
  row.lse_bound = 1e-3 + 1e-5 * std::fabs(greatest);
  if (!scores.empty()) finish(row.out, 1 / sum, static_cast<std::int64_t>(scores.size()), kLargestNumber);
  return row;
}

double CaseReference::delta(std::int64_t b, std::int64_t h, std::int64_t i, const std::vector<double>& out) const {
  double sum = 0;
  const float* const dout = query_row(CaseTensor::kDout, b, h, i);
  for (std::size_t d = 0; d < out.size(); ++d) sum += dout[d] * out[d];
  return sum;
}

ReferenceRow CaseReference::dq(std::int64_t b, std::int64_t h, std::int64_t i, const GivenStatistics& given) const {
  const std::int64_t dims = attention_.spec.head_dim, at = attention_.statistic_at(b, h, i);
  const float* const dout = query_row(CaseTensor::kDout, b, h, i);
  ReferenceRow row = row_of(dims);
  std::int64_t seen = 0;
  for (std::int64_t j = 0; j < attention_.seqlen_k; ++j) {
    if (!attention_.sees(i, j)) continue;
    ++seen;
    const float* const k = key_row(CaseTensor::kK, b, h / group(), j);
    const Score s = score(b, h, i, j);
    const double gradient =
        std::exp(s.value - given.lse[at]) * s.derivative *
        (kept(b, h, i, j) * dot(dout, key_row(CaseTensor::kV, b, h / group(), j)) - given.delta[at]);
    for (std::int64_t d = 0; d < dims; ++d) {
      const double product = gradient * k[d];
      row.value[static_cast<std::size_t>(d)] += product;
      row.bound[static_cast<std::size_t>(d)] += std::fabs(product);
    }
  }
  finish(row, attention_.softmax_scale(), seen, kLargestNumber);
  return row;
}

KeyGradientRow CaseReference::dkdv(std::int64_t b, std::int64_t head_k, std::int64_t j,
                                   const GivenStatistics& given) const {
  const std::int64_t dims = attention_.spec.head_dim;
  const float* const v = key_row(CaseTensor::kV, b, head_k, j);
  KeyGradientRow row{row_of(dims), row_of(dims)};
  std::int64_t seen = 0;
  for (std::int64_t h = head_k * group(); h < (head_k + 1) * group(); ++h)
    for (std::int64_t i = 0; i < attention_.seqlen_q; ++i) {
      if (!attention_.sees(i, j)) continue;
      ++seen;
      const std::int64_t at = attention_.statistic_at(b, h, i);
      const float *const q = query_row(CaseTensor::kQ, b, h, i), *const dout = query_row(CaseTensor::kDout, b, h, i);
      const Score s = score(b, h, i, j);
      const double probability = std::exp(s.value - given.lse[at]);
      const double keep = kept(b, h, i, j);
      const double gradient = probability * s.derivative * (keep * dot(dout, v) - given.delta[at]);
      for (std::int64_t d = 0; d < dims; ++d) {
        const auto at_dim = static_cast<std::size_t>(d);
        const double of_k = gradient * q[d];
        const double of_v = keep * probability * dout[d];
        row.dk.value[at_dim] += of_k;
        row.dk.bound[at_dim] += std::fabs(of_k);
        row.dv.value[at_dim] += of_v;
        row.dv.bound[at_dim] += std::fabs(of_v);
      }
    }
  finish(row.dk, attention_.softmax_scale(), seen, kLargestNumber);
  finish(row.dv, 1, seen, kLargestNumber);
  return row;
}

bool WorstError::is_outdone_by(const WorstError& other) const {
  if (std::isnan(other.error)) return true;
  return !std::isnan(error) && other.error * std::max(allowed, 1e-300) > error * std::max(other.allowed, 1e-300);
}

WorstError worst_error(const ReferenceRow& row, const std::uint16_t* got) {
  WorstError worst{0, row.bound.empty() ? 0 : row.bound.front()};
  for (std::size_t d = 0; d < row.value.size(); ++d) {
    const WorstError here{std::fabs(half_to_double(got[d]) - row.value[d]), row.bound[d]};
    if (worst.is_outdone_by(here)) worst = here;
  }
  return worst;
}

}  // namespace flash_attn_jit
