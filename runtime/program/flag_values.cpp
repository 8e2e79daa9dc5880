#include "runtime/program/flag_values.h"

#include <algorithm>
#include <charconv>
#include <limits>
#include <system_error>

#include "generator/errors.h"
#include "generator/families/families.h"
#include "generator/tile_chooser.h"
#include "runtime/launch/process.h"
#include "runtime/program/command.h"

namespace flash_attn_jit::program {
namespace {

[[noreturn]] void refuse(const std::string& flag, const std::string& came, const std::string& accepted) {
  throw UsageError(flag + " is '" + came + "'; accepted: " + accepted);
}

// The rule and its reason are check()'s.
void require_legal(const std::string& flag, const std::string& came, const KernelSpec& spec, const ArchLimits& arch) {
  if (const auto reason = check(spec, arch)) throw UsageError(flag + " is '" + came + "': " + *reason);
}

}  // namespace

std::int64_t parse_number(const std::string& flag, const std::string& text, std::int64_t least, std::int64_t most) {
  std::int64_t value = 0;
  const char* const end = text.data() + text.size();
  const auto [stop, error] = std::from_chars(text.data(), end, value);
  if (error != std::errc() || stop != end || value < least || value > most)
    refuse(flag, text, "a whole number from " + std::to_string(least) + " to " + std::to_string(most));
  return value;
}

std::vector<int> parse_numbers(const std::string& flag, const std::vector<std::string>& texts, int least, int most) {
  std::vector<int> values;
  for (const std::string& text : texts) {
    const int value = static_cast<int>(parse_number(flag, text, least, most));
    if (std::find(values.begin(), values.end(), value) == values.end()) values.push_back(value);
  }
  return values;
}

ArchLimits parse_arch_flag(const std::string& flag, const std::string& text) {
  try {
    return arch_limits(parse_arch(text));
  } catch (const Error& error) {
    throw UsageError(flag + " is '" + text + "': " + error.what());
  }
}

KernelKind parse_kind(const std::string& flag, const std::string& text) {
  try {
    return flash_attn_jit::parse_kind(text);
  } catch (const SpecError&) {
    refuse(flag, text, kind_words());
  }
}

DType parse_dtype(const std::string& flag, const std::string& text) {
  for (const DType dtype : kDTypes)
    if (text == to_text(dtype)) return dtype;
  refuse(flag, text, "fp16, bf16");
}

std::vector<DType> parse_dtypes(const std::string& flag, const std::vector<std::string>& texts) {
  std::vector<DType> dtypes;
  for (const std::string& text : texts) {
    const DType dtype = parse_dtype(flag, text);
    if (std::find(dtypes.begin(), dtypes.end(), dtype) == dtypes.end()) dtypes.push_back(dtype);
  }
  return dtypes;
}

std::vector<KernelKind> parse_kinds(const std::string& flag, const std::vector<std::string>& texts) {
  std::vector<KernelKind> kinds;
  const auto add = [&kinds](KernelKind kind) {
    if (std::find(kinds.begin(), kinds.end(), kind) == kinds.end()) kinds.push_back(kind);
  };
  for (const std::string& text : texts) {
    bool known = false;
    for (const KernelKind kind : kKernelKinds)
      if (family_of(kind).pack_group == text) {
        known = true;
        add(kind);
      }
    if (!known) refuse(flag, text, pack_group_words());
  }
  return kinds;
}

int parse_driver(const std::string& flag, const std::string& text) {
  const std::size_t dot = text.find('.');
  int numbers[2] = {};
  for (int i = 0; i < 2; ++i) {
    const std::string part = i == 0 ? text.substr(0, dot) : dot == std::string::npos ? "0" : text.substr(dot + 1);
    const char* const end = part.data() + part.size();
    const auto [stop, error] = std::from_chars(part.data(), end, numbers[i]);
    if (error != std::errc() || stop != end || numbers[i] < (i == 0 ? 12 : 0) || numbers[i] > 99)
      refuse(flag, text, "the CUDA version of a driver, from 12.0 on, such as 12.4");
  }
  return numbers[0] * 1000 + numbers[1] * 10;
}

Switch parse_switch(const std::string& flag, const std::string& text) {
  if (text != "both" && text != "yes" && text != "no") refuse(flag, text, "both, yes, no");
  return {.off = text != "yes", .on = text != "no"};
}

Config config_with_nvrtc(const std::string& flag, const std::string& path) {
  Config settings = config();
  if (path.empty()) return settings;
  std::error_code ignored;
  if (!std::filesystem::exists(path, ignored))
    refuse(flag, path, "libnvrtc itself, or the folder that has it; there is none at that path");
  settings.nvrtc = path;
  return settings;
}

void add_kernel_flags(CLI::App& command, KernelFlags& flags, const std::string& automatic) {
  command.add_option("--kind", flags.kind, "Kind of kernel: " + kind_words())->capture_default_str();
  command.add_option("--dtype", flags.dtype, "Of q, k, v and out: fp16 or bf16")->capture_default_str();
  command.add_option("--head-dim", flags.head_dim, "Head dim, 1 to 512")->required();
  command.add_option("--head-dim-v", flags.head_dim_v, "v's, where it is another one");
  command.add_flag("--causal", flags.causal, "With the causal mask");
  command.add_flag("--window", flags.window, "With a sliding window instead");
  for (std::size_t i = 0; i < kFeatures.size(); ++i)
    if (!kFeatures[i].is_users)
      command.add_flag("--" + std::string(kFeatures[i].word), flags.features[i],
                       "The kernel " + std::string(kFeatures[i].phrase));
  command.add_option("--gqa", flags.gqa, "Group size: num_heads / num_heads_k")->capture_default_str();
  command.add_option("--tile", flags.tile, "auto (the default: " + automatic + ") or a tile like m256n16w8q80l2b4k7")
      ->capture_default_str();
}

std::filesystem::path existing_file(const std::string& flag, const std::string& path) {
  std::error_code ignored;
  if (std::filesystem::is_directory(path, ignored))
    throw UsageError(flag + " is '" + path + "', a folder; accepted: a file");
  if (!std::filesystem::exists(path, ignored))
    throw UsageError(flag + " is '" + path + "', and there is no such file; accepted: one that there is");
  return path;
}

KernelSpec parse_kernel(const KernelFlags& flags, const ArchLimits& arch) {
  KernelSpec spec;
  spec.kind = parse_kind("--kind", flags.kind);
  spec.dtype = parse_dtype("--dtype", flags.dtype);
  spec.head_dim = static_cast<int>(parse_number("--head-dim", flags.head_dim, 1, kMostHeadDim));
  if (flags.causal && flags.window)
    throw UsageError("--causal and --window are both given; accepted: one of them. A causal window is a window");
  spec.mask = flags.causal ? Mask::kCausal : flags.window ? Mask::kWindow : Mask::kNone;
  for (std::size_t i = 0; i < kFeatures.size(); ++i) spec.features.set(kFeatures[i].feature, flags.features[i]);
  spec.group_size = static_cast<int>(parse_number("--gqa", flags.gqa, 1, std::numeric_limits<int>::max()));
  if (!flags.head_dim_v.empty())
    spec.set_head_dims(spec.head_dim,
                       static_cast<int>(parse_number("--head-dim-v", flags.head_dim_v, 1, kMostHeadDim)));
  spec.access =
      spec.head_dim % 8 == 0 && spec.value_head_dim() % 8 == 0 ? GlobalAccess::kVector16B : GlobalAccess::kElement2B;

  spec = normalized(spec);
  const std::vector<TileConfig> tiles = default_tiles(spec);
  if (!tiles.empty()) spec.tile = tiles.front();
  require_legal("--head-dim", flags.head_dim, spec, arch);
  if (flags.tile == "auto") return spec;

  try {
    spec.tile = TileConfig::parse(flags.tile);
  } catch (const SpecError& error) {
    throw UsageError("--tile is '" + flags.tile + "'; accepted: auto, or a tile's text: " + error.what());
  }
  require_legal("--tile", flags.tile, spec, arch);
  return spec;
}

}  // namespace flash_attn_jit::program
