#include "runtime/library/templates_folder.h"

#include <algorithm>
#include <cctype>
#include <optional>
#include <string_view>
#include <vector>

#include "runtime/system/files.h"

namespace flash_attn_jit {
namespace {

struct Token {
  std::string_view text;
  int line;
};

// Words and signs, without comments and space.
std::vector<Token> tokens_of(std::string_view text) {
  std::vector<Token> tokens;
  const auto is_word = [](char c) { return std::isalnum(static_cast<unsigned char>(c)) || c == '_'; };
  int line = 1;
  for (std::size_t at = 0; at < text.size();) {
    std::size_t end = at + 1;
    const std::string_view rest = text.substr(at);
    if (rest.starts_with("//")) {
      end = std::min(text.find('\n', at), text.size());
    } else if (rest.starts_with("/*")) {
      end = std::min(text.find("*/", at + 2), text.size() - 2) + 2;
    } else if (!std::isspace(static_cast<unsigned char>(text[at]))) {
      while (is_word(text[at]) && end < text.size() && is_word(text[end])) ++end;
      tokens.push_back({text.substr(at, end - at), line});
    }
    line += static_cast<int>(std::count(text.begin() + at, text.begin() + end, '\n'));
    at = end;
  }
  return tokens;
}

// The first line of `text` that does not say what `built_in` says; nothing where all do.
std::optional<int> first_line_that_differs(std::string_view text, std::string_view built_in) {
  const std::vector<Token> ours = tokens_of(text), theirs = tokens_of(built_in);
  const auto [our, their] = std::mismatch(ours.begin(), ours.end(), theirs.begin(), theirs.end(),
                                          [](const Token& a, const Token& b) { return a.text == b.text; });
  if (our == ours.end() && their == theirs.end()) return std::nullopt;
  if (our != ours.end()) return our->line;
  return ours.empty() ? 1 : ours.back().line;
}

// A kernel that is told of its problem in another layout than the host writes would read wrong values and addresses.
void require_the_hosts_layout(const TemplateSet& templates, const std::filesystem::path& folder) {
  for (const auto& [file, built_in] : embedded_templates()) {
    if (!is_shared_with_host(file)) continue;
    const auto found = templates.find(file);
    const std::string where = "FLASH_ATTN_JIT_TEMPLATES: " + (folder / file).string();
    if (found == templates.end())
      throw ConfigError(where + " is missing; accepted: a folder with all of the templates");
    if (const auto line = first_line_that_differs(found->second, built_in))
      throw ConfigError(where + " differs at line " + std::to_string(*line) +
                        " from the one that this library was built with, and its C++ side is compiled from that file; "
                        "accepted: any change in the other templates. Build the library anew from this folder's clone "
                        "(pip install .) to change this one");
  }
}

}  // namespace

bool is_shared_with_host(std::string_view file) { return file.ends_with("_params.cuh") || file == "host_engine.cuh"; }

TemplateSet load_templates(const Config& config) {
  if (!config.templates) return embedded_templates();
  TemplateSet templates;
  try {
    for (const auto& entry : std::filesystem::directory_iterator(*config.templates))
      if (entry.path().extension() == ".cuh")
        if (auto text = read_file(entry.path())) templates.emplace(entry.path().filename().string(), *std::move(text));
  } catch (const std::exception& error) {
    throw ConfigError("FLASH_ATTN_JIT_TEMPLATES: " + std::string(error.what()));
  }
  if (templates.empty())
    throw ConfigError("FLASH_ATTN_JIT_TEMPLATES is '" + config.templates->string() +
                      "', which holds no template; accepted: a folder with the *.cuh files");
  require_the_hosts_layout(templates, *config.templates);
  return templates;
}

}  // namespace flash_attn_jit
