#include "forward_case.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <set>
#include <sstream>
#include <utility>

#include "fp16.h"
#include "generator/errors.h"
#include "generator/legality.h"
#include "generator/tile_chooser.h"
#include "runtime/launch/forward_launch.h"

namespace flash_attn_jit::testing {
namespace {

constexpr std::array<std::pair<Layout, const char*>, 5> kLayoutNames = {{{Layout::kContiguous, "contiguous"},
                                                                         {Layout::kTransposed, "transposed"},
                                                                         {Layout::kRowGaps, "rowgaps"},
                                                                         {Layout::kOddStrides, "oddstrides"},
                                                                         {Layout::kMisaligned, "misaligned"}}};

constexpr std::array<std::pair<Inputs, const char*>, 4> kInputNames = {{{Inputs::kNormal, "normal"},
                                                                        {Inputs::kRising, "rising"},
                                                                        {Inputs::kFalling, "falling"},
                                                                        {Inputs::kThousand, "thousand"}}};

// Which dimensions of an attn_bias have all sizes; the others are broadcast.
struct BiasLayout {
  const char* name;
  PairType type;
  bool batch, heads, queries, is_paired;
};
constexpr std::array<std::pair<BiasCase, BiasLayout>, 7> kBiasLayouts = {
    {{BiasCase::kHalf, {"bias16", PairType::kFloat16, true, true, true, true}},
     {BiasCase::kHalfUnpaired, {"bias16unpaired", PairType::kFloat16, false, true, true, false}},
     {BiasCase::kFloatUnpaired, {"bias32unpaired", PairType::kFloat32, true, false, true, false}},
     {BiasCase::kFloatKeys, {"bias32keys", PairType::kFloat32, true, false, false, true}},
     {BiasCase::kBool, {"boolmask", PairType::kBool, true, false, true, true}},
     {BiasCase::kBoolUnpaired, {"boolmaskunpaired", PairType::kBool, false, false, true, false}},
     {BiasCase::kBoolKeys, {"boolmaskkeys", PairType::kBool, true, true, false, true}}}};

const BiasLayout& layout_of(BiasCase bias) {
  for (const auto& [each, layout] : kBiasLayouts)
    if (each == bias) return layout;
  throw Error("no attn_bias");
}

template <class Names, class Value>
std::string name_of(const Names& names, Value value) {
  for (const auto& [each, name] : names)
    if (each == value) return name;
  return "";
}

std::string number_text(double x) {
  char text[32];
  std::snprintf(text, sizeof text, "%g", x);
  return text;
}

// "sq257" with prefix "sq" -> 257; false where the word is something else.
template <class Number>
bool take_number(std::string_view word, std::string_view prefix, Number& value) {
  if (!word.starts_with(prefix) || word.size() == prefix.size()) return false;
  const std::string digits(word.substr(prefix.size()));
  char* end = nullptr;
  const double parsed = std::strtod(digits.c_str(), &end);
  if (*end != '\0') return false;
  value = static_cast<Number>(parsed);
  return true;
}

// "5,-1"
bool take_window(std::string_view text, ForwardCase& c) {
  const std::size_t comma = text.find(',');
  if (comma == std::string_view::npos) return false;
  c.mask = Mask::kWindow;
  return take_number(std::string("l") + std::string(text.substr(0, comma)), "l", c.window.left) &&
         take_number(std::string("r") + std::string(text.substr(comma + 1)), "r", c.window.right);
}

std::string mask_text(const ForwardCase& c) {
  if (c.mask != Mask::kWindow) return std::string(to_text(c.mask));
  return "window" + std::to_string(c.window.left) + "," + std::to_string(c.window.right);
}

// Lengths of a varlen case: one as long as `longest`, one empty, others between; and where each sequence begins.
std::vector<int> cu_seqlens_of(std::int64_t sequences, std::int64_t longest, int turn) {
  std::vector<int> begins = {0};
  for (std::int64_t b = 0; b < sequences; ++b) {
    const std::int64_t choice = (b + turn) % 4;
    const std::int64_t length = b == 0 || choice == 0 ? longest : choice == 1 ? 0 : longest * choice / 4 + 1;
    begins.push_back(begins.back() + static_cast<int>(std::min(length, longest)));
  }
  return begins;
}

std::array<std::int64_t, 4> shape_of(const ForwardCase& c, const std::vector<int>& cu_seqlens, std::int64_t seqlen,
                                     std::int64_t heads) {
  if (c.sequences == 0) return {c.batch, seqlen, heads, c.head_dim};
  return {1, cu_seqlens.back(), heads, c.head_dim};
}

// The same with v's head dim.
std::array<std::int64_t, 4> of_values(std::array<std::int64_t, 4> shape, const ForwardCase& c) {
  shape[3] = c.value_head_dim();
  return shape;
}

PairTensor bias_tensor(const ForwardCase& c, const void* data) {
  const BiasLayout& layout = layout_of(c.bias);
  const PairType type = layout.type == PairType::kFloat16 ? pair_type_of(c.dtype) : layout.type;
  PairTensor bias{data, type, {}, {}};
  bias.shape = {layout.batch ? std::max(c.batch, c.sequences) : 1, layout.heads ? c.num_heads_k * c.group_size : 1,
                layout.queries ? c.seqlen_q : 1, c.seqlen_k};
  if (c.sequences > 0 && layout.batch) bias.shape[0] = c.sequences;
  std::int64_t stride = layout.is_paired ? 1 : 2;
  for (int d = 3; d >= 0; --d) {
    bias.strides[d] = stride;
    stride *= std::max<std::int64_t>(bias.shape[d], 1);
  }
  return bias;
}

// Numbers about as large as scores. Some hide their pair, all of some queries do, and all of whole tiles; and of some
// queries all are far below. False stands for what hides.
void fill_bias(const ForwardCase& c, std::vector<std::uint8_t>& bytes) {
  const PairTensor sizes = bias_tensor(c, nullptr);
  const int element = bytes_of(sizes.type);
  std::int64_t span = 1;
  for (int d = 0; d < 4; ++d) span += std::max<std::int64_t>(sizes.shape[d] - 1, 0) * sizes.strides[d];
  bytes.assign(span * element, 0);
  std::mt19937 random(c.seed + 2);
  std::normal_distribution<double> normal;
  for (std::int64_t b = 0; b < sizes.shape[0]; ++b)
    for (std::int64_t h = 0; h < sizes.shape[1]; ++h)
      for (std::int64_t i = 0; i < sizes.shape[2]; ++i)
        for (std::int64_t j = 0; j < sizes.shape[3]; ++j) {
          const bool many = sizes.shape[2] > 1, in_band = j / 64 % 3 == 1 && (!many || i / 96 % 2 == 0);
          const bool hidden = random() % 8 == 0 || (many && i % 11 == 3) || in_band;
          const double number = hidden ? -INFINITY : many && i % 11 == 5 ? -30.0 : 2 * normal(random);
          const std::int64_t at =
              b * sizes.strides[0] + h * sizes.strides[1] + i * sizes.strides[2] + j * sizes.strides[3];
          const std::uint16_t half = to_stored(c.dtype, number);
          const float single = static_cast<float>(number);
          const std::uint8_t sees = hidden ? 0 : 1;
          const void* const from = element == 2 ? static_cast<const void*>(&half) : element == 4 ? &single : nullptr;
          std::memcpy(&bytes[at * element], from ? from : &sees, element);
        }
}

AttentionOptions options_of(const ForwardCase& c, const ForwardTensors& t) {
  AttentionOptions options;
  options.dtype = c.dtype;
  options.softmax_scale = c.scale();
  options.mask = c.mask;
  options.window = c.window;
  options.softcap = static_cast<float>(c.softcap);
  if (c.alibi != AlibiCase::kOff)
    options.alibi = {t.alibi_slopes.data(), c.alibi == AlibiCase::kBatchAndHeads ? c.num_heads_k * c.group_size : 0};
  if (c.bias != BiasCase::kOff) options.bias = bias_tensor(c, t.bias.data());
  if (c.dropout > 0) options.dropout = Dropout{c.dropout, t.dropout_seed.data()};
  if (c.sink) options.sinks = t.sinks.data();
  if (c.sequences > 0)
    options.varlen = {t.cu_seqlens_q.data(), t.cu_seqlens_k.data(), c.sequences, c.seqlen_q, c.seqlen_k};
  return options;
}

bool take_word(std::string_view word, ForwardCase& c) {
  for (const auto& [layout, name] : kLayoutNames)
    if (word == name) return c.layout = layout, true;
  for (const auto& [inputs, name] : kInputNames) {
    if (word == name) return c.inputs = inputs, true;
    if (take_number(word, name, c.rise)) return c.inputs = inputs, true;
  }
  if (word == "bf16") return c.dtype = DType::kBFloat16, true;
  if (word == "causal" || word == "full") return c.mask = word == "causal" ? Mask::kCausal : Mask::kNone, true;
  if (word.starts_with("window")) return take_window(word.substr(6), c);
  if (word == "alibi" || word == "alibibatch")
    return c.alibi = word == "alibi" ? AlibiCase::kHeads : AlibiCase::kBatchAndHeads, true;
  for (const auto& [bias, layout] : kBiasLayouts)
    if (word == layout.name) return c.bias = bias, true;
  if (double sink; take_number(word, "sink", sink)) return c.sink = sink, true;
  if (take_number(word, "dropout", c.dropout) || take_number(word, "softcap", c.softcap) ||
      take_number(word, "varlen", c.sequences))
    return true;
  if (float scale; take_number(word, "scale", scale)) return c.softmax_scale = scale, true;
  return take_number(word, "hdim", c.head_dim) || take_number(word, "hdimv", c.head_dim_v) ||
         take_number(word, "gqa", c.group_size) || take_number(word, "batch", c.batch) ||
         take_number(word, "headsk", c.num_heads_k) || take_number(word, "sq", c.seqlen_q) ||
         take_number(word, "sk", c.seqlen_k) || take_number(word, "splits", c.splits) ||
         take_number(word, "seed", c.seed);
}

void fill_normal(WatchedTensor& tensor, std::mt19937& random, double factor) {
  std::normal_distribution<double> normal;
  const auto [batch, seqlen, heads, dim] = tensor.shape();
  for (std::int64_t b = 0; b < batch; ++b)
    for (std::int64_t s = 0; s < seqlen; ++s)
      for (std::int64_t h = 0; h < heads; ++h)
        for (std::int64_t d = 0; d < dim; ++d) tensor.set(b, s, h, d, normal(random) * factor);
}

// Sets the first element of each row of q to 16 and of each row of k so that the score has `score(key)`
// added.
template <class Score>
void add_scores(ForwardTensors& t, Score score) {
  const auto set_first = [](WatchedTensor& tensor, auto value) {
    const auto [batch, seqlen, heads, dim] = tensor.shape();
    for (std::int64_t b = 0; b < batch; ++b)
      for (std::int64_t s = 0; s < seqlen; ++s)
        for (std::int64_t h = 0; h < heads; ++h) tensor.set(b, s, h, 0, value(s));
  };
  set_first(t.q, [](std::int64_t) { return 16.0; });
  set_first(t.k, [&](std::int64_t key) { return score(key) / (16.0 * t.options.softmax_scale); });
}

void fill_inputs(const ForwardCase& c, ForwardTensors& t) {
  std::mt19937 random(c.seed);
  fill_normal(t.q, random, 1);
  fill_normal(t.k, random, 1);
  fill_normal(t.v, random, 1);
  if (c.softmax_scale == 0.0f) return;
  const std::int64_t keys = c.tile ? c.tile->block_n : 32, last = (c.seqlen_k - 1) / keys;
  std::normal_distribution<double> normal;
  switch (c.inputs) {
    case Inputs::kNormal:
      return;
    case Inputs::kRising:
      return add_scores(t, [&](std::int64_t key) { return c.rise * (last - key / keys); });
    case Inputs::kFalling:
      return add_scores(t, [&](std::int64_t key) { return c.rise * (key / keys); });
    case Inputs::kThousand:
      return add_scores(t, [&](std::int64_t) { return 1000 * std::copysign(1.0, normal(random)); });
  }
}

void add_fault(ForwardOutcome& outcome, const ForwardCase& c, const std::string& what) {
  outcome.fault += (outcome.fault.empty() ? c.text() + ": " : "; ") + what;
}

double largest_finite(const std::vector<double>& values) {
  double largest = 0;
  for (double x : values)
    if (std::isfinite(x)) largest = std::max(largest, std::fabs(x));
  return largest;
}

// Log2 units by which the emulation's running maximum lags, up to the kernel's kMaxRise. The bound takes the worst of
// them: where one key dominates, a maximum that does not lag makes its probability 1, which rounds to itself.
constexpr double kEmulatedLags[] = {0, 0.3, 0.7, 1.2, 1.7};

void compare(const ForwardCase& c, ForwardTensors& t, ForwardOutcome& outcome) {
  const AttentionProblem problem = t.problem();
  const AttentionResult exact = attention_float64(problem);
  double emulated_out_error = 0, emulated_lse_error = 0;
  for (const double lag : kEmulatedLags) {
    const AttentionResult emulated = attention_emulated(problem, lag);
    emulated_out_error = std::max(emulated_out_error, max_error(emulated.out, exact.out));
    emulated_lse_error = std::max(emulated_lse_error, max_error(emulated.lse, exact.lse));
  }
  outcome.out_error = max_error(values_of(t.out), exact.out);
  outcome.out_bound = 2 * emulated_out_error + 1e-5;
  outcome.lse_error = max_error({t.lse.begin(), t.lse.end()}, exact.lse);
  // lse is a float: near 1000 it is 6e-5 from the next one, which 1e-5 does not cover where the emulation is lucky.
  // Beyond 700 that of a row which one key has to itself is rounded down: see Softmax::log_sum_exp(). Of bfloat16 what
  // is below 2^-14 loses up to 2^-24 on its way into float16, in q and in k.
  const double largest = largest_finite(exact.lse), rounded_down = largest > 700 ? 0x3p-23 : 0;
  const double converted = c.dtype == DType::kBFloat16 ? 2 * c.head_dim * 0x1p-24 : 0;
  outcome.lse_bound = 2 * emulated_lse_error + 1e-5 + converted + largest * (0x1p-22 + rounded_down);
  if (!std::isfinite(outcome.out_bound) || !(outcome.out_error <= outcome.out_bound))
    add_fault(outcome, c,
              "out is off by " + number_text(outcome.out_error) + ", bound " + number_text(outcome.out_bound));
  if (!std::isfinite(outcome.lse_bound) || !(outcome.lse_error <= outcome.lse_bound))
    add_fault(outcome, c,
              "lse is off by " + number_text(outcome.lse_error) + ", bound " + number_text(outcome.lse_bound));
}

}  // namespace

std::string ForwardCase::text() const {
  std::string text = "hdim" + std::to_string(head_dim) + (head_dim_v > 0 ? " hdimv" + std::to_string(head_dim_v) : "") +
                     " " + mask_text(*this) + " gqa" + std::to_string(group_size) + " batch" + std::to_string(batch) +
                     " headsk" + std::to_string(num_heads_k) + " sq" + std::to_string(seqlen_q) + " sk" +
                     std::to_string(seqlen_k) + " " + name_of(kLayoutNames, layout) + " " +
                     name_of(kInputNames, inputs);
  if (inputs == Inputs::kRising || inputs == Inputs::kFalling) text += number_text(rise);
  if (dtype == DType::kBFloat16) text += " bf16";
  if (softcap > 0) text += " softcap" + number_text(softcap);
  if (alibi != AlibiCase::kOff) text += alibi == AlibiCase::kHeads ? " alibi" : " alibibatch";
  if (bias != BiasCase::kOff) text += std::string(" ") + layout_of(bias).name;
  if (dropout > 0) text += " dropout" + number_text(dropout);
  if (sink) text += " sink" + number_text(*sink);
  if (sequences > 0) text += " varlen" + std::to_string(sequences);
  if (softmax_scale) text += " scale" + number_text(*softmax_scale);
  if (splits > 0) text += " splits" + std::to_string(splits);
  if (seed != 1) text += " seed" + std::to_string(seed);
  if (tile) text += " " + tile->text();
  return text;
}

ForwardCase ForwardCase::parse(std::string_view text) {
  ForwardCase c;
  std::istringstream words{std::string(text)};
  for (std::string word; words >> word;)
    if (!take_word(word, c)) c.tile = TileConfig::parse(word);
  return c;
}

float ForwardCase::scale() const {
  return softmax_scale.value_or(static_cast<float>(1 / std::sqrt(static_cast<double>(head_dim))));
}

KernelSpec spec_of(const ForwardCase& c) {
  KernelSpec spec;
  spec.dtype = c.dtype;
  if (c.head_dim > kMostNarrowHeadDim) spec.kind = KernelKind::kForwardWide;
  spec.set_head_dims(c.head_dim, c.value_head_dim());
  spec.mask = c.mask;
  spec.features.set(Feature::kSoftcap, c.softcap > 0);
  spec.features.set(Feature::kAlibi, c.alibi != AlibiCase::kOff);
  if (c.bias != BiasCase::kOff) {
    const BiasLayout& layout = layout_of(c.bias);
    const bool single = layout.type == PairType::kFloat32;
    spec.features.set(single                           ? Feature::kBias32
                      : layout.type == PairType::kBool ? Feature::kBoolMask
                                                       : Feature::kBias16);
    const bool neighbours = layout.is_paired && c.seqlen_k % 8 == 0;
    spec.features.set(Feature::kUnpaired, !neighbours);
    spec.features.set(Feature::kOneRow, !layout.queries || c.seqlen_q == 1);
  }
  spec.features.set(Feature::kDropout, c.dropout > 0);
  spec.features.set(Feature::kVarlen, c.sequences > 0);
  spec.features.set(Feature::kSink, c.sink.has_value());
  spec.group_size = c.group_size;
  const bool aligned = c.layout != Layout::kOddStrides && c.layout != Layout::kMisaligned && c.head_dim % 8 == 0 &&
                       c.value_head_dim() % 8 == 0;
  spec.access = aligned ? GlobalAccess::kVector16B : GlobalAccess::kElement2B;
  return spec;
}

ForwardTensors::ForwardTensors(const ForwardCase& c)
    : cu_seqlens_q(cu_seqlens_of(c.sequences, c.seqlen_q, 0)),
      cu_seqlens_k(cu_seqlens_of(c.sequences, c.seqlen_k, 1)),
      q(shape_of(c, cu_seqlens_q, c.seqlen_q, c.num_heads_k * c.group_size), c.layout, c.dtype),
      k(shape_of(c, cu_seqlens_k, c.seqlen_k, c.num_heads_k), c.layout, c.dtype),
      v(of_values(k.shape(), c), c.layout, c.dtype),
      out(of_values(q.shape(), c), c.layout, c.dtype),
      lse(q.shape()[0] * q.shape()[2] * q.shape()[1], NAN),
      dropout_seed{-123456789, static_cast<int>(c.seed)},
      tile(c.tile),
      splits(c.splits) {
  const std::int64_t batch = c.sequences > 0 ? c.sequences : c.batch;
  for (std::int64_t i = 0; i < batch * c.num_heads_k * c.group_size; ++i)
    alibi_slopes.push_back(0.5f / static_cast<float>(1 + i % 5));
  for (std::int64_t h = 0; c.sink && h < c.num_heads_k * c.group_size; ++h)
    sinks.push_back(static_cast<float>(*c.sink + 0.5 * static_cast<double>(h)));
  if (splits > 0) {
    KernelSpec decode = spec_of(c);
    decode.kind = KernelKind::kDecode;
    decode_tile = tile.value_or(default_tiles(decode).front());
    tile.reset();
  }
  if (c.bias != BiasCase::kOff) fill_bias(c, bias);
  options = options_of(c, *this);
  fill_inputs(c, *this);
}

ForwardRequest ForwardTensors::request() {
  return {.q = q.view(),
          .k = k.view(),
          .v = v.view(),
          .out = out.view(),
          .softmax_lse = lse.data(),
          .options = options,
          .num_splits = splits,
          .tile = tile,
          .decode_tile = decode_tile};
}

std::vector<TileConfig> tiles_of(int head_dim) {
  std::set<TileConfig> tiles;
  KernelSpec spec;
  spec.head_dim = head_dim;
  for (const Mask mask : {Mask::kNone, Mask::kCausal})
    for (const GlobalAccess access : {GlobalAccess::kVector16B, GlobalAccess::kElement2B}) {
      spec.mask = mask;
      spec.access = head_dim % 8 ? GlobalAccess::kElement2B : access;
      for (const TileConfig& tile : tile_space(spec, arch_limits(75))) tiles.insert(tile);
    }
  return {tiles.begin(), tiles.end()};
}

TileConfig find_tile(int head_dim, int block_m, int block_n) {
  for (const TileConfig& tile : tiles_of(head_dim))
    if (tile.block_m == block_m && tile.block_n == block_n) return tile;
  throw Error("the tile space has no m" + std::to_string(block_m) + "n" + std::to_string(block_n));
}

ForwardOutcome run_forward_case(const ForwardCase& c) {
  ForwardOutcome outcome;
  try {
    ForwardTensors tensors(c);
    forward_in_interpreter(tensors.request());
    compare(c, tensors, outcome);
    for (WatchedTensor* tensor : {&tensors.q, &tensors.k, &tensors.v, &tensors.out})
      if (!tensor->surroundings_are_untouched()) add_fault(outcome, c, "memory outside a tensor has changed");
  } catch (const Error& error) {
    add_fault(outcome, c, error.what());
  }
  return outcome;
}

}  // namespace flash_attn_jit::testing
