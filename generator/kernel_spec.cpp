#include "generator/kernel_spec.h"

#include <array>
#include <charconv>
#include <optional>
#include <vector>

#include "generator/errors.h"

namespace flash_attn_jit {
namespace {

// Reads "m256n16" piece by piece: a fixed prefix, then a decimal number without sign or leading zeros.
class Reader {
 public:
  explicit Reader(std::string_view text) : rest_(text) {}

  bool skip(std::string_view prefix) {
    if (!rest_.starts_with(prefix)) return false;
    rest_.remove_prefix(prefix.size());
    return true;
  }

  std::optional<int> number() {
    int value = 0;
    const auto [end, error] = std::from_chars(rest_.data(), rest_.data() + rest_.size(), value);
    const std::size_t digits = static_cast<std::size_t>(end - rest_.data());
    if (error != std::errc() || rest_[0] == '-' || (rest_[0] == '0' && digits > 1)) return std::nullopt;
    rest_.remove_prefix(digits);
    return value;
  }

  bool at_end() const { return rest_.empty(); }

 private:
  std::string_view rest_;
};

template <typename Enum, std::size_t N>
Enum parse_word(std::string_view word, const std::array<Enum, N>& values, std::string_view field) {
  std::string accepted;
  for (Enum value : values) {
    if (word == to_text(value)) return value;
    accepted += accepted.empty() ? "" : ", ";
    accepted += to_text(value);
  }
  throw SpecError("kernel spec: " + std::string(field) + " is '" + std::string(word) + "'; accepted: " + accepted);
}

int parse_numbered(std::string_view word, std::string_view prefix, std::string_view field) {
  Reader reader(word);
  if (reader.skip(prefix))
    if (const auto value = reader.number(); value && reader.at_end()) return *value;
  throw SpecError("kernel spec: " + std::string(field) + " is '" + std::string(word) + "'; accepted: '" +
                  std::string(prefix) + "' and a number");
}

// "hdim128", or with another one of v "hdim192v128".
void parse_head_dims(std::string_view word, KernelSpec& spec) {
  Reader reader(word);
  std::optional<int> q, v = 0;
  if (reader.skip("hdim")) q = reader.number();
  if (q && reader.skip("v")) v = reader.number();
  if (q && v && reader.at_end() && (word.find('v') == word.npos || (*v > 0 && *v != *q))) {
    spec.set_head_dims(*q, *v != 0 ? *v : *q);
    return;
  }
  throw SpecError("kernel spec: head_dim is '" + std::string(word) +
                  "'; accepted: 'hdim' and a number, then where v has another one 'v' and that");
}

std::vector<std::string_view> split(std::string_view text) {
  std::vector<std::string_view> words;
  for (std::size_t at = 0; at <= text.size();) {
    const std::size_t end = std::min(text.find(' ', at), text.size());
    words.push_back(text.substr(at, end - at));
    at = end + 1;
  }
  return words;
}

constexpr std::string_view kFunctionsPrefix = "code";
constexpr int kFunctionsDigits = 16;

std::string functions_word(std::uint64_t functions) {
  char digits[kFunctionsDigits];
  const auto [end, error] = std::to_chars(digits, digits + kFunctionsDigits, functions, 16);
  const std::string number(digits, end);
  return std::string(kFunctionsPrefix) + std::string(kFunctionsDigits - number.size(), '0') + number;
}

// Takes the functions' word out of `words` where it stands at `at`; 0 where there is none.
std::uint64_t take_functions(std::vector<std::string_view>& words, std::size_t at) {
  if (at >= words.size() || !words[at].starts_with(kFunctionsPrefix)) return 0;
  const std::string_view digits = words[at].substr(kFunctionsPrefix.size());
  std::uint64_t functions = 0;
  const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), functions, 16);
  if (error != std::errc() || functions_word(functions) != words[at])
    throw SpecError("kernel spec: functions are '" + std::string(words[at]) + "'; accepted: 'code' and 16 digits");
  words.erase(words.begin() + static_cast<std::ptrdiff_t>(at));
  return functions;
}

// The spec's words in canonical order.
std::vector<std::string> words_of(const KernelSpec& spec) {
  const std::string of_v = spec.head_dim_v != 0 ? "v" + std::to_string(spec.head_dim_v) : "";
  std::vector<std::string> words = {std::string(to_text(spec.kind)), "hdim" + std::to_string(spec.head_dim) + of_v,
                                    std::string(to_text(spec.dtype)), std::string(to_text(spec.mask))};
  for (const FeatureInfo& info : kFeatures)
    if (spec.has(info.feature)) words.emplace_back(info.word);
  if (spec.functions != 0) words.push_back(functions_word(spec.functions));
  words.push_back("gqa" + std::to_string(spec.group_size));
  words.emplace_back(to_text(spec.access));
  words.push_back(spec.tile.text());
  return words;
}

// Those of the table, with commas between.
std::string feature_words() {
  std::string words;
  for (const FeatureInfo& info : kFeatures) words += (words.empty() ? "" : ", ") + std::string(info.word);
  return words;
}

// Takes `word` out of `words` where it stands at `at`.
bool take(std::vector<std::string_view>& words, std::size_t at, std::string_view word) {
  if (at >= words.size() || words[at] != word) return false;
  words.erase(words.begin() + static_cast<std::ptrdiff_t>(at));
  return true;
}

}  // namespace

KernelKind parse_kind(std::string_view text) { return parse_word(text, kKernelKinds, "kind"); }
DType parse_dtype(std::string_view text) { return parse_word(text, kDTypes, "dtype"); }

std::string_view to_text(DType dtype) { return dtype == DType::kFloat16 ? "fp16" : "bf16"; }
std::string_view to_text(Mask mask) {
  switch (mask) {
    case Mask::kNone:
      return "full";
    case Mask::kCausal:
      return "causal";
    case Mask::kWindow:
      return "window";
  }
  return {};
}
std::string_view to_text(GlobalAccess access) { return access == GlobalAccess::kVector16B ? "vec16" : "elem2"; }

std::string TileConfig::text() const {
  return "m" + std::to_string(block_m) + "n" + std::to_string(block_n) + "w" + std::to_string(warps) + "q" +
         std::to_string(register_dims) + "l" + std::to_string(schedule.load) + "b" + std::to_string(schedule.barrier) +
         "k" + std::to_string(schedule.first_keys);
}

TileConfig TileConfig::parse(std::string_view text) {
  TileConfig tile;
  Reader reader(text);
  const auto field = [&](std::string_view prefix, int& value) {
    if (!reader.skip(prefix)) return false;
    const auto number = reader.number();
    value = number.value_or(0);
    return number.has_value();
  };
  if (field("m", tile.block_m) && field("n", tile.block_n) && field("w", tile.warps) &&
      field("q", tile.register_dims) && field("l", tile.schedule.load) && field("b", tile.schedule.barrier) &&
      field("k", tile.schedule.first_keys) && reader.at_end())
    return tile;
  throw SpecError(
      "tile is '" + std::string(text) +
      "'; accepted: a text like 'm256n16w8q96l2b4k7' (rows, columns an iteration, warps, head dims "
      "in registers, then where in eighths of the loop's accumulating products the next tile is loaded, stored "
      "and first read)");
}

std::string KernelSpec::text() const {
  std::string text;
  for (const std::string& word : words_of(*this)) text += (text.empty() ? "" : " ") + word;
  return text;
}

KernelSpec KernelSpec::parse(std::string_view text) {
  std::vector<std::string_view> words = split(text);
  KernelSpec spec;
  for (const FeatureInfo& info : kFeatures) spec.features.set(info.feature, take(words, 4, info.word));
  spec.functions = take_functions(words, 4);
  if (words.size() != 7)
    throw SpecError("kernel spec is '" + std::string(text) +
                    "'; accepted: seven words like 'fwd hdim128 fp16 causal gqa8 vec16 m256n16w8q96l2b4k7', with " +
                    feature_words() + " behind the mask where they are on, in this order");
  spec.kind = parse_kind(words[0]);
  parse_head_dims(words[1], spec);
  spec.dtype = parse_dtype(words[2]);
  spec.mask = parse_word(words[3], kAllMasks, "mask");
  spec.group_size = parse_numbered(words[4], "gqa", "group_size");
  spec.access = parse_word(words[5], std::array{GlobalAccess::kVector16B, GlobalAccess::kElement2B}, "access");
  spec.tile = TileConfig::parse(words[6]);
  return spec;
}

std::string KernelSpec::name() const {
  std::string name = "flash";
  for (const std::string& word : words_of(*this)) name += "_" + word;
  return name;
}

}  // namespace flash_attn_jit
