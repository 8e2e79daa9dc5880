// The templates in force.
#pragma once

#include <string_view>

#include "generator/render.h"
#include "runtime/system/config.h"

namespace flash_attn_jit {

// The templates that `config` names: its folder's *.cuh files, else those embedded. Throws ConfigError.
TemplateSet load_templates(const Config& config);

// Whether the host was compiled with the template, too: the kernels' arguments, and how interpreted kernels reach the
// interpreter. A folder's must say what the built-in one says.
bool is_shared_with_host(std::string_view file);

}  // namespace flash_attn_jit
