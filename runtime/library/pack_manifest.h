// The manifest of a pack: what is in it and what built it. A header of its own, so that only who reads or writes
// manifests needs the JSON library.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include <nlohmann/json.hpp>

#include "runtime/cache/kernel_file.h"

namespace flash_attn_jit {

inline constexpr const char* kPackFormat = "flash-attn-jit pack";
inline constexpr int kPackVersion = 1;

// What a manifest says of the kernel file `name`, whose content `bytes` are parsed as `file`.
nlohmann::ordered_json manifest_entry(const std::string& name, std::string_view bytes, const KernelFile& file);

// The whole text, of entries in the order of their files' names.
std::string manifest_text(const std::vector<nlohmann::ordered_json>& kernels);

}  // namespace flash_attn_jit
