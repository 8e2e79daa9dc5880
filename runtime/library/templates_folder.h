// The templates in force.
#pragma once

#include "generator/render.h"
#include "runtime/system/config.h"

namespace flash_attn_jit {

// The templates that `config` names: its folder's *.cuh files, else those embedded. Throws ConfigError.
TemplateSet load_templates(const Config& config);

}  // namespace flash_attn_jit
