#include "backward_case.h"

#include <algorithm>
#include <cmath>
#include <random>
#include <sstream>

#include "fp16.h"
#include "generator/errors.h"
#include "runtime/launch/backward_launch.h"

namespace flash_attn_jit::testing {
namespace {

// 0 to n - 1 in the order that sums are made in: what lies `step` apart, then what is beside that.
template <class Visit>
void visit_apart(std::int64_t n, std::int64_t step, Visit visit) {
  for (std::int64_t first = 0; first < step; ++first)
    for (std::int64_t i = first; i < n; i += step) visit(i);
}

template <class Number>
Number dot(const double* x, const double* y, std::int64_t n, std::int64_t step) {
  Number sum = 0;
  visit_apart(n, step, [&](std::int64_t i) { sum += static_cast<Number>(x[i]) * static_cast<Number>(y[i]); });
  return sum;
}

struct Gradients {
  std::vector<double> dq, dk, dv;  // like q, k, v, contiguous
  std::vector<double> dbias;       // like attn_bias, where that has numbers
};

// In float64, from q, k, v and dout alone.
struct Exact {
  using Number = double;
  double probability(double x) const { return x; }
  double ds(double x) const { return x; }
  double gradient(double x) const { return x; }
};

bool has_bias_gradient(const AttentionOptions& options) {
  return options.bias && options.bias->type != PairType::kBool;
}

std::int64_t elements_of(const std::array<std::int64_t, 4>& shape) { return shape[0] * shape[1] * shape[2] * shape[3]; }

// Where the element of attn_bias lies that a pair's score takes, if it were contiguous.
std::int64_t bias_element(const PairTensor& bias, const SequenceRows& sequence, std::int64_t h, std::int64_t i,
                          std::int64_t j) {
  const std::array<std::int64_t, 4> at = {sequence.index, h, i, j};
  std::int64_t element = 0;
  for (int d = 0; d < 4; ++d) element = element * bias.shape[d] + (bias.shape[d] > 1 ? at[d] : 0);
  return element;
}

// In float32 from the tensors' own out and softmax_lse, with P and dS rounded to fp16 and the gradients to the tensors'
// dtype: the error that any kernel with fp16 operands has to make. dS of bfloat16 tensors come in units that dout's
// size is about 100 of.
struct Emulated {
  using Number = float;
  explicit Emulated(const BackwardCase& c)
      : dtype(c.forward.dtype), unit(dtype == DType::kFloat16 ? 1 : c.dout_factor / 100) {}

  float probability(float x) const { return static_cast<float>(rounded_to_fp16(x)); }
  float ds(float x) const { return static_cast<float>(rounded_to_fp16(x / unit) * unit); }
  float gradient(float x) const { return static_cast<float>(rounded_to(dtype, x)); }

  DType dtype;
  double unit;
};

// Its errors but for the last, which by luck makes up for the others.
struct EmulatedInFloat : Emulated {
  using Emulated::Emulated;
  float gradient(float x) const { return x; }
};

template <class Rounding>
class Backward {
  using Number = typename Rounding::Number;

 public:
  explicit Backward(BackwardTensors& t, Rounding rounding, std::int64_t sum_step = 1, Number delta_factor = 1)
      : t_(t),
        rounding_(rounding),
        sum_step_(sum_step),
        delta_factor_(delta_factor),
        problem_(t.forward.problem()),
        shape_(t.forward.q.shape()),
        value_dim_(t.forward.v.shape()[3]),
        rows_k_(t.forward.k.shape()[1]) {}

  Gradients run() {
    const std::int64_t heads_k = t_.forward.k.shape()[2], group = heads_k > 0 ? shape_[2] / heads_k : 1;
    const std::int64_t dim = shape_[3];
    Gradients result;
    result.dq.resize(shape_[0] * shape_[1] * shape_[2] * dim);
    result.dk.resize(shape_[0] * rows_k_ * heads_k * dim);
    result.dv.resize(shape_[0] * rows_k_ * heads_k * value_dim_);
    if (has_bias_gradient(problem_.options)) dbias_.assign(elements_of(problem_.options.bias->shape), 0);
    for (const SequenceRows& sequence : sequences_of(problem_))
      for (std::int64_t hk = 0; hk < heads_k; ++hk) {
        k_ = t_.forward.k.rows<double>(sequence.b, sequence.k_begin, sequence.seqlen_k, hk);
        v_ = t_.forward.v.rows<double>(sequence.b, sequence.k_begin, sequence.seqlen_k, hk);
        dk_.assign(sequence.seqlen_k * dim, 0);
        dv_.assign(sequence.seqlen_k * value_dim_, 0);
        for (std::int64_t h = hk * group; h < (hk + 1) * group; ++h) {
          query_head(sequence, h);
          place(dq_, result.dq, dim, sequence.b * shape_[1] + sequence.q_begin, h, shape_[2]);
        }
        place(dk_, result.dk, dim, sequence.b * rows_k_ + sequence.k_begin, hk, heads_k);
        place(dv_, result.dv, value_dim_, sequence.b * rows_k_ + sequence.k_begin, hk, heads_k);
      }
    for (const Number sum : dbias_)
      result.dbias.push_back(bytes_of(problem_.options.bias->type) == 2 ? rounding_.gradient(sum) : sum);
    return result;
  }

 private:
  // Rows of head h, the first of them at row `begin` of the whole tensor.
  void place(const std::vector<Number>& from, std::vector<double>& to, std::int64_t dim, std::int64_t begin,
             std::int64_t h, std::int64_t heads) {
    const std::int64_t rows = static_cast<std::int64_t>(from.size()) / dim;
    for (std::int64_t s = 0; s < rows; ++s)
      for (std::int64_t d = 0; d < dim; ++d)
        to[((begin + s) * heads + h) * dim + d] = rounding_.gradient(from[s * dim + d]);
  }

  void query_head(const SequenceRows& sequence, std::int64_t h) {
    const std::int64_t dim = shape_[3];
    const auto queries = [&](WatchedTensor& tensor) {
      return tensor.rows<double>(sequence.b, sequence.q_begin, sequence.seqlen_q, h);
    };
    const std::vector<double> q = queries(t_.forward.q), out = queries(t_.forward.out), dout = queries(t_.dout);
    dq_.assign(sequence.seqlen_q * dim, 0);
    visit_apart(sequence.seqlen_q, sum_step_, [&](std::int64_t i) {
      const std::int64_t query = sequence.q_begin + i;
      const float lse = t_.forward.lse[(sequence.b * shape_[2] + h) * shape_[1] + query];
      const float dlse = t_.dlse.empty() ? 0 : t_.dlse[(sequence.b * shape_[2] + h) * shape_[1] + query];
      row(sequence, h, i, {&q[i * dim], &out[i * value_dim_], &dout[i * value_dim_], lse, dlse});
    });
  }

  struct QueryRow {
    const double *q, *out, *dout;
    float stored_lse, dlse;
  };

  void row(const SequenceRows& sequence, std::int64_t h, std::int64_t i, const QueryRow& query) {
    const std::int64_t dim = shape_[3];
    const Number scale = problem_.options.softmax_scale;
    std::vector<Score<Number>> s;
    std::vector<Number> dp, shares;
    std::vector<std::int64_t> keys;
    const Number sink = sink_of(problem_.options, h);
    Number maximum = sink;
    for (std::int64_t j = 0; j < sequence.seqlen_k; ++j)
      if (sees(problem_.options, sequence, h, i, j)) {
        const double *k = &k_[j * dim], *v = &v_[j * value_dim_];
        keys.push_back(j);
        s.push_back(adjusted(problem_.options, sequence, h, i, j, dot<Number>(query.q, k, dim, sum_step_) * scale));
        shares.push_back(static_cast<Number>(kept_share(problem_.options, sequence, shape_[2], h, i, j)));
        dp.push_back(shares.back() * dot<Number>(query.dout, v, value_dim_, sum_step_));
        maximum = std::max(maximum, s.back().value);
      }
    if (keys.empty()) return;
    Number lse = query.stored_lse, delta = 0;
    if constexpr (std::is_same_v<Number, double>) {  // nothing that a kernel made goes in
      double sum = std::exp(sink - maximum);
      for (const auto& each : s) sum += std::exp(each.value - maximum);
      lse = maximum + std::log(sum);
      for (std::size_t n = 0; n < s.size(); ++n) delta += std::exp(s[n].value - lse) * dp[n];
    } else {
      // Backwards: where a row sees one key, delta and dP are the same sum, and cancel but for the order of adding.
      visit_apart(value_dim_, sum_step_, [&](std::int64_t i) {
        const std::int64_t d = value_dim_ - 1 - i;
        delta += static_cast<Number>(query.dout[d]) * static_cast<Number>(query.out[d]);
      });
      delta *= delta_factor_;
    }
    delta -= static_cast<Number>(query.dlse);
    visit_apart(static_cast<std::int64_t>(s.size()), sum_step_, [&](std::int64_t n) {
      const Number p = std::exp(s[n].value - lse);
      const Number ds = rounding_.ds(p * (dp[n] - delta) * scale * s[n].derivative),
                   rounded_p = rounding_.probability(p);
      const std::int64_t j = keys[n];
      if (!dbias_.empty()) dbias_[bias_element(*problem_.options.bias, sequence, h, i, j)] += p * (dp[n] - delta);
      for (std::int64_t d = 0; d < dim; ++d) {
        dq_[i * dim + d] += ds * static_cast<Number>(k_[j * dim + d]);
        dk_[j * dim + d] += ds * static_cast<Number>(query.q[d]);
      }
      for (std::int64_t d = 0; d < value_dim_; ++d)
        dv_[j * value_dim_ + d] += shares[n] * rounded_p * static_cast<Number>(query.dout[d]);
    });
  }

  BackwardTensors& t_;
  const Rounding rounding_;
  const std::int64_t sum_step_;  // see visit_apart()
  const Number delta_factor_;
  const AttentionProblem problem_;
  std::array<std::int64_t, 4> shape_;  // of q
  std::int64_t value_dim_, rows_k_;
  std::vector<double> k_, v_;
  std::vector<Number> dq_, dk_, dv_, dbias_;
};

void fill_dout(const BackwardCase& c, WatchedTensor& dout) {
  std::mt19937 random(c.forward.seed + 1);
  std::normal_distribution<double> normal;
  const auto [batch, seqlen, heads, dim] = dout.shape();
  for (std::int64_t b = 0; b < batch; ++b)
    for (std::int64_t s = 0; s < seqlen; ++s)
      for (std::int64_t h = 0; h < heads; ++h)
        for (std::int64_t d = 0; d < dim; ++d) dout.set(b, s, h, d, normal(random) * c.dout_factor);
}

// That of a row that sees no key is NaN, which is to reach nothing.
void fill_dlse(const BackwardCase& c, const std::vector<float>& lse, std::vector<float>& dlse) {
  std::mt19937 random(c.forward.seed + 3);
  std::normal_distribution<double> normal;
  for (const float row : lse)
    dlse.push_back(row == INFINITY ? NAN : static_cast<float>(normal(random) * c.dout_factor));
}

// By luck of the order of adding, an emulation's error can be small: the bound takes the worst of a few orders, and of
// more where it is exceeded, as of thousands of cases some have luck with all of the few. Where every row sees one key,
// dP and delta cancel but for the order of adding, in all rows alike: then delta is off by as much as another order may
// make it.
constexpr std::int64_t kFewSumSteps[] = {1, 2, 8}, kMoreSumSteps[] = {1, 3, 4, 5, 7, 11, 16, 32};
constexpr float kDeltaFactors[] = {1 - 0x1p-22f, 1, 1 + 0x1p-22f};

std::string compare(const char* name, const std::vector<double>& got, std::vector<double> Gradients::* gradient,
                    const std::vector<Gradients>& emulated, const Gradients& exact, double unit, double share = 2) {
  double emulated_error = 0;
  for (const Gradients& each : emulated)
    emulated_error = std::max(emulated_error, max_error(each.*gradient, exact.*gradient));
  const double error = max_error(got, exact.*gradient), bound = share * emulated_error + 1e-5 * unit;
  if (std::isfinite(bound) && error <= bound) return "";
  return std::string(name) + " is off by " + std::to_string(error / unit) + ", bound " + std::to_string(bound / unit) +
         "; ";
}

}  // namespace

std::string BackwardCase::text() const {
  std::string text = forward.text();
  if (preprocess_tile) text += " preprocess:" + preprocess_tile->text();
  if (dkdv_tile) text += " dkdv:" + dkdv_tile->text();
  if (dq_tile) text += " dq:" + dq_tile->text();
  if (all_keys_tile) text += " allkeys:" + all_keys_tile->text();
  if (dbias_tile) text += " dbias:" + dbias_tile->text();
  if (shares_out) text += " sharesout";
  if (dout_layout == DoutLayout::kApart) text += " doutapart";
  if (dout_layout == DoutLayout::kExpanded) text += " doutexpanded";
  if (has_dlse) text += " dlse";
  if (dout_factor != 1) {
    std::ostringstream number;
    number << dout_factor;
    text += " dout" + number.str();
  }
  return text;
}

BackwardCase BackwardCase::parse(std::string_view text) {
  BackwardCase c;
  std::string rest;
  std::istringstream words{std::string(text)};
  for (std::string word; words >> word;) {
    if (word.starts_with("preprocess:"))
      c.preprocess_tile = TileConfig::parse(word.substr(11));
    else if (word.starts_with("dkdv:"))
      c.dkdv_tile = TileConfig::parse(word.substr(5));
    else if (word.starts_with("dq:"))
      c.dq_tile = TileConfig::parse(word.substr(3));
    else if (word.starts_with("allkeys:"))
      c.all_keys_tile = TileConfig::parse(word.substr(8));
    else if (word.starts_with("dbias:"))
      c.dbias_tile = TileConfig::parse(word.substr(6));
    else if (word == "sharesout")
      c.shares_out = true;
    else if (word == "doutapart" || word == "doutexpanded")
      c.dout_layout = word == "doutapart" ? DoutLayout::kApart : DoutLayout::kExpanded;
    else if (word == "dlse")
      c.has_dlse = true;
    else if (word.starts_with("dout"))
      c.dout_factor = std::stod(word.substr(4));
    else
      rest += " " + word;
  }
  c.forward = ForwardCase::parse(rest);
  return c;
}

BackwardTensors::BackwardTensors(const BackwardCase& c)
    : forward(c.forward),
      dout(forward.out.shape(), c.forward.layout, c.forward.dtype),
      dq(forward.q.shape(), c.forward.layout, c.forward.dtype),
      dk(forward.k.shape(), c.forward.layout, c.forward.dtype),
      dv(forward.v.shape(), c.forward.layout, c.forward.dtype),
      delta(forward.lse.size(), NAN),
      peaks(c.forward.dtype == DType::kFloat16 ? 0 : forward.lse.size(), NAN),
      preprocess_tile(c.preprocess_tile),
      dkdv_tile(c.dkdv_tile),
      dq_tile(c.dq_tile),
      all_keys_tile(c.all_keys_tile),
      dbias_tile(c.dbias_tile) {
  make_room_for_dbias(c.shares_out);
  fill_dout(c, dout);
  lay_out_dout(c.dout_layout);
  fill_results();
  if (c.has_dlse) fill_dlse(c, forward.lse, dlse);
}

// float16 where attn_bias is and nothing is shared out.
void BackwardTensors::make_room_for_dbias(bool shares_out) {
  if (!has_bias_gradient(forward.options)) return;
  const PairTensor& bias = *forward.options.bias;
  dbias = BiasGradient{nullptr, shares_out ? PairType::kFloat32 : bias.type, bias.shape};
  const std::int64_t sequences = forward.options.varlen ? forward.options.varlen->batch : forward.q.shape()[0];
  const std::array<std::int64_t, 2> all = {sequences, forward.q.shape()[2]};
  for (int d = 0; shares_out && d < 2; ++d)
    if (bias.shape[d] == 1) dbias->shape[d] = std::max<std::int64_t>((all[d] + 1) / 2, 1);
  dbias_bytes_.assign(elements_of(dbias->shape) * bytes_of(dbias->type), 0xff);  // NaN
  dbias->data = dbias_bytes_.data();
}

std::vector<double> BackwardTensors::dbias_values() const {
  if (!dbias) return {};
  const auto value = [&](std::int64_t i) -> double {
    if (dbias->type == PairType::kFloat32) return static_cast<const float*>(dbias->data)[i];
    return from_stored(forward.options.dtype, static_cast<const std::uint16_t*>(dbias->data)[i]);
  };
  const auto& of_bias = forward.options.bias->shape;
  const std::int64_t pairs = of_bias[2] * of_bias[3];
  std::vector<double> values(elements_of(of_bias), 0.0);
  for (std::int64_t b = 0; b < dbias->shape[0]; ++b)
    for (std::int64_t h = 0; h < dbias->shape[1]; ++h)
      for (std::int64_t i = 0; i < pairs; ++i) {
        const std::int64_t part = (of_bias[0] > 1 ? b : 0) * of_bias[1] + (of_bias[1] > 1 ? h : 0);
        values[part * pairs + i] += value((b * dbias->shape[1] + h) * pairs + i);
      }
  return values;
}

void BackwardTensors::fill_results() {
  const AttentionResult exact = attention_float64(forward.problem());
  const auto [batch, seqlen, heads, dim] = forward.out.shape();
  std::size_t next = 0;
  for (std::int64_t b = 0; b < batch; ++b)
    for (std::int64_t s = 0; s < seqlen; ++s)
      for (std::int64_t h = 0; h < heads; ++h)
        for (std::int64_t d = 0; d < dim; ++d) forward.out.set(b, s, h, d, exact.out[next++]);
  for (std::size_t i = 0; i < exact.lse.size(); ++i) forward.lse[i] = static_cast<float>(exact.lse[i]);
}

void BackwardTensors::lay_out_dout(DoutLayout layout) {
  dout_view = dout.view();
  if (layout == DoutLayout::kLikeQ) return;
  const auto [batch, seqlen, heads, dim] = dout.shape();
  if (layout == DoutLayout::kExpanded) {
    dout_copy = {to_stored(dout.dtype(), 0.75)};
    dout_view = {dout_copy.data(), dout.shape(), {0, 0, 0, 0}};
  } else {
    dout_copy.resize(static_cast<std::size_t>(batch * seqlen * heads * dim));
    dout_view = {dout_copy.data(), dout.shape(), {dim * seqlen * heads, 1, seqlen, heads * seqlen}};
  }
  for (std::int64_t b = 0; b < batch; ++b)
    for (std::int64_t s = 0; s < seqlen; ++s)
      for (std::int64_t h = 0; h < heads; ++h)
        for (std::int64_t d = 0; d < dim; ++d) {
          const auto& strides = dout_view.strides;
          std::uint16_t& copy = dout_copy[b * strides[0] + s * strides[1] + h * strides[2] + d * strides[3]];
          if (layout == DoutLayout::kExpanded)
            dout.at(b, s, h, d) = copy;
          else
            copy = dout.at(b, s, h, d);
        }
}

BackwardRequest BackwardTensors::request() {
  return {.q = forward.q.view(),
          .out = forward.out.view(),
          .dout = dout_view,
          .k = forward.k.view(),
          .v = forward.v.view(),
          .dq = dq.view(),
          .dkdv = KeyGradients{dk.view(), dv.view()},
          .dbias = dbias,
          .softmax_lse = forward.lse.data(),
          .dlse = dlse.empty() ? nullptr : dlse.data(),
          .delta = delta.data(),
          .peaks = peaks.empty() ? nullptr : peaks.data(),
          .options = forward.options,
          .preprocess_tile = preprocess_tile,
          .dkdv_tile = dkdv_tile,
          .dq_tile = dq_tile,
          .all_keys_tile = all_keys_tile,
          .dbias_tile = dbias_tile};
}

std::string run_backward_case(const BackwardCase& c) {
  std::string fault;
  try {
    BackwardTensors t(c);
    backward_in_interpreter(t.request());
    const Gradients exact = Backward<Exact>(t, {}).run();
    std::vector<Gradients> emulated;
    // Of float16 tensors errors that no dout is to blame for are the bound; of bfloat16 nothing depends on its size.
    const double unit = c.forward.dtype == DType::kFloat16 ? 1 : c.dout_factor;
    // Of those dS is cut off toward 0, which is off by up to twice as much as rounding to the nearest.
    const double of_ds = c.forward.dtype == DType::kFloat16 ? 2 : 4;
    const auto beyond_bound = [&] {
      return compare("dq", values_of(t.dq), &Gradients::dq, emulated, exact, unit, of_ds) +
             compare("dk", values_of(t.dk), &Gradients::dk, emulated, exact, unit, of_ds) +
             compare("dv", values_of(t.dv), &Gradients::dv, emulated, exact, unit) +
             compare("dbias", t.dbias_values(), &Gradients::dbias, emulated, exact, unit);
    };
    for (const std::int64_t step : kFewSumSteps) emulated.push_back(Backward<Emulated>(t, Emulated(c), step).run());
    fault = beyond_bound();
    if (!fault.empty()) {
      for (const std::int64_t step : kMoreSumSteps)
        for (const float factor : kDeltaFactors)
          emulated.push_back(Backward<EmulatedInFloat>(t, EmulatedInFloat(c), step, factor).run());
      fault = beyond_bound();
    }
    for (WatchedTensor* tensor :
         {&t.forward.q, &t.forward.k, &t.forward.v, &t.forward.out, &t.dout, &t.dq, &t.dk, &t.dv})
      if (!tensor->surroundings_are_untouched()) fault += "memory outside a tensor has changed; ";
  } catch (const Error& error) {
    fault = error.what();
  }
  return fault.empty() ? "" : c.text() + ": " + fault;
}

}  // namespace flash_attn_jit::testing
