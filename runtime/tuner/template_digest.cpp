#include "runtime/tuner/template_digest.h"

#include "generator/errors.h"
#include "runtime/system/sha256.h"

namespace flash_attn_jit {

std::string template_digest(KernelKind kind, const TemplateSet& templates) {
  Sha256 hash;
  const auto add = [&hash](std::string_view text) {
    hash.update(std::to_string(text.size()) + " ");
    hash.update(text);
  };
  try {
    for (const std::string& file : templates_of(kind, templates)) {
      add(file);
      add(templates.find(file)->second);
    }
  } catch (const Error&) {
    return "";
  }
  return to_hex(hash.finish());
}

}  // namespace flash_attn_jit
