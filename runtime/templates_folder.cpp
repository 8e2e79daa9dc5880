// The templates in force.
#include "runtime/files.h"
#include "runtime/kernel_library.h"

namespace flash_attn_jit {

TemplateSet load_templates(const Config& config) {
  if (!config.templates) return embedded_templates();
  TemplateSet templates;
  try {
    for (const auto& entry : std::filesystem::directory_iterator(*config.templates))
      if (entry.path().extension() == ".cuh")
        if (auto text = read_file(entry.path()))
          templates.emplace(entry.path().filename().string(), *std::move(text));
  } catch (const std::exception& error) {
    throw ConfigError("FLASH_ATTN_JIT_TEMPLATES: " + std::string(error.what()));
  }
  if (templates.empty())
    throw ConfigError("FLASH_ATTN_JIT_TEMPLATES is '" + config.templates->string() +
                      "', which holds no template; accepted: a folder with the *.cuh files");
  return templates;
}

}  // namespace flash_attn_jit
