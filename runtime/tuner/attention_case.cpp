#include "runtime/tuner/attention_case.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <random>

#include "generator/integers.h"
#include "generator/legality.h"
#include "runtime/tuner/half.h"

namespace flash_attn_jit {
namespace {

constexpr std::int64_t kNumbers = 1048573;  // a prime
constexpr std::int64_t kTensorOffset = 262147;
constexpr double kSoftcap = 30;
constexpr double kDropout = 0.25;
constexpr std::int64_t kPairRowStride = 8;  // elements
constexpr std::int64_t kMostPageRows = 256, kFastPageRows = 16;

// More than the rows of two blocks, and more columns than three iterations have.
constexpr std::int64_t kSmallSeqlenQ = 277, kSmallSeqlenK = 333;
// Where a block has a group's query heads as rows, and some of the keys: more rows than a block, so few of them and so
// many keys that every tile has splits.
constexpr std::int64_t kSmallDecodeRows = 149, kSmallDecodeKeys = 4099;
constexpr std::int64_t kManyDims = 1024;  // heads x head_dim beyond which one batch entry has to do

// As models have them.
float alibi_slope(std::int64_t h, std::int64_t num_heads) {
  return static_cast<float>(std::exp2(-8.0 * static_cast<double>(h + 1) / static_cast<double>(num_heads)));
}

PairType pair_type(const KernelSpec& spec) {
  if (spec.has(Feature::kBias16)) return PairType::kFloat16;
  return spec.has(Feature::kBias32) ? PairType::kFloat32 : PairType::kBool;
}

double uniform(std::mt19937_64& random) { return (static_cast<double>(random() >> 11) + 0.5) * 0x1p-53; }

}  // namespace

Window AttentionCase::window() const {
  if (spec.mask != Mask::kWindow) return {};
  return {std::max<std::int64_t>(seqlen_k / 4, 1), 0};
}

std::int64_t AttentionCase::page_size() const { return std::gcd(seqlen_k, kMostPageRows); }

std::vector<float> AttentionCase::head_numbers() const {
  std::vector<float> slopes;
  for (std::int64_t h = 0; h < std::max<std::int64_t>(num_heads, 2); ++h) slopes.push_back(alibi_slope(h, num_heads));
  return slopes;
}

std::optional<DropoutBits> AttentionCase::dropout() const {
  if (!spec.has(Feature::kDropout)) return std::nullopt;
  return DropoutBits(head_numbers().data(), kDropout);
}

std::int64_t AttentionCase::pair_at(std::int64_t i, std::int64_t j) const {
  const std::int64_t query_stride = spec.has(Feature::kOneRow) ? 0 : kPairRowStride;
  return i * query_stride + j * (spec.has(Feature::kUnpaired) ? 2 : 1);
}

// Of 16 numbers in turn, or of bools, of which each fifth is False.
double AttentionCase::pair_number(std::int64_t i, std::int64_t j) const {
  const std::int64_t at = pair_at(i, j);
  if (spec.has(Feature::kBoolMask)) return at % 5 == 0 ? -INFINITY : 0;
  return static_cast<double>((at * 7 + 3) % 16 - 8) / 4;
}

std::vector<std::uint8_t> AttentionCase::pair_bytes() const {
  if (!spec.features.read_pairs()) return {};
  const int element = bytes_of(pair_type(spec));
  std::vector<std::uint8_t> bytes(static_cast<std::size_t>((pair_at(seqlen_q, seqlen_k) + 1) * element));
  const auto put = [&](std::int64_t i, std::int64_t j) {
    const double number = pair_number(i, j);
    const std::uint16_t half = double_to_half(number);
    const auto single = static_cast<float>(number);
    const std::uint8_t sees = number == 0 ? 1 : 0;
    const void* const from = element == 2 ? static_cast<const void*>(&half) : element == 4 ? &single : nullptr;
    std::memcpy(&bytes[static_cast<std::size_t>(pair_at(i, j) * element)], from ? from : &sees,
                static_cast<std::size_t>(element));
  };
  for (std::int64_t i = 0; i < seqlen_q; ++i)  // what the row before has not
    for (std::int64_t j = i == 0 ? 0 : std::max<std::int64_t>(seqlen_k - kPairRowStride, 0); j < seqlen_k; ++j)
      put(i, j);
  return bytes;
}

AttentionOptions AttentionCase::options(const float* head_numbers, const void* pairs) const {
  AttentionOptions options;
  options.softmax_scale = softmax_scale();
  options.mask = spec.mask;
  options.window = window();
  options.softcap = spec.has(Feature::kSoftcap) ? kSoftcap : 0;
  if (spec.has(Feature::kAlibi)) options.alibi = PerHead{head_numbers, 0};
  if (spec.features.read_pairs())
    options.bias = PairTensor{pairs,
                              pair_type(spec),
                              {1, 1, spec.has(Feature::kOneRow) ? 1 : seqlen_q, seqlen_k},
                              {0, 0, pair_at(1, 0), pair_at(0, 1)}};
  if (spec.has(Feature::kDropout)) options.dropout = Dropout{kDropout, reinterpret_cast<const int*>(head_numbers)};
  if (spec.has(Feature::kSink)) options.sinks = head_numbers;
  return options;
}

AttentionCase::Score AttentionCase::score(double product, std::int64_t h, std::int64_t i, std::int64_t j) const {
  const double scaled = softmax_scale() * product;
  Score score{scaled, 1};
  if (spec.has(Feature::kSoftcap)) {
    const double tanh = std::tanh(scaled / kSoftcap);
    score = {kSoftcap * tanh, 1 - tanh * tanh};
  }
  if (spec.has(Feature::kAlibi))
    score.value -= alibi_slope(h, num_heads) * static_cast<double>(std::abs(i + seqlen_k - seqlen_q - j));
  if (spec.features.read_pairs()) score.value += pair_number(i, j);
  return score;
}

std::optional<double> AttentionCase::sink(std::int64_t h) const {
  return spec.has(Feature::kSink) ? std::optional<double>(alibi_slope(h, num_heads)) : std::nullopt;
}

std::int64_t AttentionCase::statistic_at(std::int64_t b, std::int64_t h, std::int64_t i) const {
  if (spec.has(Feature::kVarlen)) return h * rows_q() + b * seqlen_q + i;
  return (b * num_heads + h) * seqlen_q + i;
}

bool AttentionCase::sees(std::int64_t i, std::int64_t j) const {
  if (spec.has(Feature::kBoolMask) && pair_number(i, j) != 0) return false;
  const std::int64_t ahead = j - (i + seqlen_k - seqlen_q);
  if (spec.mask == Mask::kNone) return true;
  return ahead <= 0 && (spec.mask == Mask::kCausal || ahead >= -window().left);
}

std::int64_t keys_of_fast_pages(std::int64_t keys) { return ceil_div(keys, kFastPageRows) * kFastPageRows; }

Problem problem_of(const AttentionCase& attention, int multiprocessors) {
  const auto width = [&](std::int64_t side) { return side < 0 ? attention.seqlen_k : side; };
  return {attention.seqlen_q, attention.seqlen_k, attention.batch * attention.num_heads, multiprocessors,
          width(attention.window().left) + width(attention.window().right) + 1};
}

AttentionCase small_case(const AttentionCase& whole) {
  AttentionCase small = whole;
  small.num_heads_k = 1;
  small.num_heads = whole.num_heads_k > 0 ? whole.num_heads / whole.num_heads_k : 1;
  small.batch = small.num_heads * whole.spec.head_dim > kManyDims ? 1 : 2;
  small.seqlen_q = kSmallSeqlenQ;
  small.seqlen_k = kSmallSeqlenK;
  const KernelFamily& family = family_of(whole.spec.kind);
  if (family.has_all_rows) small.seqlen_k = std::min(small.seqlen_k, whole.seqlen_k);
  if (family.warps_share_rows) {
    small.batch = 2;
    small.seqlen_q = ceil_div(kSmallDecodeRows, small.num_heads);
    small.seqlen_k = whole.spec.has(Feature::kPaged) ? keys_of_fast_pages(kSmallDecodeKeys) : kSmallDecodeKeys;
  }
  if (whole.spec.features.read_pairs() && !whole.spec.has(Feature::kUnpaired))
    small.seqlen_k = keys_of_fast_pages(small.seqlen_k);
  return small;
}

CaseNumbers::CaseNumbers(std::uint64_t seed) {
  std::mt19937_64 random(seed);
  bits_.reserve(kNumbers);
  values_.reserve(kNumbers + kMostHeadDim);
  while (static_cast<std::int64_t>(bits_.size()) < kNumbers) {
    const double radius = std::sqrt(-2 * std::log(uniform(random)));
    bits_.push_back(double_to_half(radius * std::cos(6.283185307179586 * uniform(random))));
    values_.push_back(static_cast<float>(half_to_double(bits_.back())));
  }
  for (std::size_t i = 0; i < kMostHeadDim; ++i) values_.push_back(values_[i]);
}

std::size_t CaseNumbers::at(CaseTensor tensor, std::int64_t index) {
  return static_cast<std::size_t>((index + static_cast<int>(tensor) * kTensorOffset) % kNumbers);
}

const std::uint16_t* CaseNumbers::run(CaseTensor tensor, std::int64_t index, std::int64_t& count) const {
  const std::size_t first = at(tensor, index);
  count = std::min(count, kNumbers - static_cast<std::int64_t>(first));
  return &bits_[first];
}

}  // namespace flash_attn_jit
