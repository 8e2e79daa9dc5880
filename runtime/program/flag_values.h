// Texts of flags -> values. Every function throws UsageError, which names the flag, what came and what is
// accepted.
#pragma once

#include <array>
#include <cstdint>
#include <filesystem>
#include <limits>
#include <string>
#include <vector>

#include <CLI/CLI.hpp>

#include "generator/kernel_selection.h"
#include "generator/kernel_spec.h"
#include "generator/legality.h"
#include "runtime/system/config.h"

namespace flash_attn_jit::program {

inline constexpr int kMostInt = std::numeric_limits<int>::max();

// A whole number from `least` to `most`.
std::int64_t parse_number(const std::string& flag, const std::string& text, std::int64_t least, std::int64_t most);

// As parse_number(), for each element of a list. What is named twice counts once, here, in parse_kinds() and in
// parse_dtypes().
std::vector<int> parse_numbers(const std::string& flag, const std::vector<std::string>& texts, int least, int most);

ArchLimits parse_arch_flag(const std::string& flag, const std::string& text);  // "sm_75"
KernelKind parse_kind(const std::string& flag, const std::string& text);       // "fwd", "bwd_dq" and so on
std::vector<KernelKind> parse_kinds(const std::string& flag, const std::vector<std::string>& texts);  // "fwd", "bwd"

DType parse_dtype(const std::string& flag, const std::string& text);  // "fp16", "bf16"
std::vector<DType> parse_dtypes(const std::string& flag, const std::vector<std::string>& texts);

int parse_driver(const std::string& flag, const std::string& text);  // "12.4" -> 12040, as cuDriverGetVersion counts

Switch parse_switch(const std::string& flag, const std::string& text);  // "no", "yes", "both"

// The path of a file that there is.
std::filesystem::path existing_file(const std::string& flag, const std::string& path);

// The process's configuration, with the NVRTC that the flag names, if it names one.
Config config_with_nvrtc(const std::string& flag, const std::string& path);

// A kernel of one problem class with its tile: `tile_text` is "auto", the default for large problems, or a
// tile's text.
struct KernelFlags {
  std::string kind = "fwd";
  std::string dtype = "fp16";
  std::string head_dim, head_dim_v;
  bool causal = false, window = false;
  std::array<bool, kFeatures.size()> features{};
  std::string gqa = "1";
  std::string tile = "auto";
};
// `automatic` says which tile --tile auto is.
void add_kernel_flags(CLI::App& command, KernelFlags& flags, const std::string& automatic);
KernelSpec parse_kernel(const KernelFlags& flags, const ArchLimits& arch);

}  // namespace flash_attn_jit::program
