// The rule that makes the interpreter possible: device code reaches the machine through the primitives alone.
#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "generator/render.h"

using namespace flash_attn_jit;

namespace {

// Without comments: words in prose are no code.
std::string code_of(const std::string& text) {
  std::string code;
  for (std::size_t at = 0; at < text.size();) {
    const std::size_t comment = text.find("//", at);
    code += text.substr(at, comment - at);
    at = comment == std::string::npos ? text.size() : text.find('\n', comment);
  }
  return code;
}

std::vector<std::string> identifiers(const std::string& code) {
  std::vector<std::string> found;
  const auto part = [](char c) { return std::isalnum(static_cast<unsigned char>(c)) || c == '_'; };
  for (std::size_t at = 0; at < code.size();) {
    const std::size_t end = std::find_if_not(code.begin() + at, code.end(), part) - code.begin();
    if (end > at) found.push_back(code.substr(at, end - at));
    at = std::max(end, at + 1);
  }
  return found;
}

template <std::size_t n>
bool is_one_of(const std::string& word, const std::array<std::string_view, n>& words) {
  return std::find(words.begin(), words.end(), word) != words.end();
}

// Inline assembly, CUDA's built-in variables, and its functions, whose names begin with two underscores.
bool reaches_the_machine(const std::string& word) {
  constexpr std::array<std::string_view, 6> kWords = {"asm",      "threadIdx", "blockIdx",
                                                      "blockDim", "gridDim",   "warpSize"};
  constexpr std::array<std::string_view, 5> kKeywords = {"__device__", "__forceinline__", "__global__",
                                                         "__launch_bounds__", "__restrict__"};
  return is_one_of(word, kWords) || (word.starts_with("__") && !is_one_of(word, kKeywords));
}

bool asks_for_the_compiler(const std::string& word) {
  constexpr std::array<std::string_view, 4> kWords = {"FLASH_ATTN_JIT_HOST", "__CUDA_ARCH__", "__GNUC__", "__clang__"};
  return is_one_of(word, kWords) || word.starts_with("__CUDACC");
}

}  // namespace

TEST_CASE("asm and intrinsics stand in the two halves of the primitives alone") {
  int others = 0;
  for (const auto& file : embedded_templates()) {
    const std::string name = file.first;
    const auto words = identifiers(code_of(file.second));
    if (name == "primitives_cuda.cuh") CHECK(std::count(words.begin(), words.end(), "asm") > 10);
    if (name.starts_with("primitives_")) continue;
    ++others;
    for (const std::string& word : words)
      if (reaches_the_machine(word)) FAIL_CHECK(name << " uses " << word);
  }
  CHECK(others >= 5);
}

TEST_CASE("only primitives.cuh asks which compiler it is") {
  int askers = 0;
  for (const auto& file : embedded_templates())
    for (const std::string& word : identifiers(code_of(file.second))) {
      const std::string& name = file.first;
      if (!asks_for_the_compiler(word)) continue;
      ++askers;
      const bool allowed = (name == "primitives.cuh" && word == "FLASH_ATTN_JIT_HOST") ||
                           (name == "primitives_cuda.cuh" && word == "__CUDA_ARCH__");  // its instructions differ
      if (!allowed) FAIL_CHECK(name << " asks for " << word);
    }
  CHECK(askers >= 1);
}

TEST_CASE("every feature's trait is asked for") {
  std::set<std::string> words;
  for (const auto& file : embedded_templates())
    for (const std::string& word : identifiers(code_of(file.second))) words.insert(word);
  for (const FeatureInfo& info : kFeatures) {
    CAPTURE(info.word);
    CHECK(words.contains(std::string(info.trait)));
  }
}

TEST_CASE("templates include templates alone") {
  int includes = 0;
  for (const auto& file : embedded_templates()) {
    const std::string name = file.first, code = code_of(file.second), mark = "#include ";
    for (std::size_t at = code.find(mark); at != std::string::npos; at = code.find(mark, at + 1)) {
      const std::size_t begin = at + mark.size(), end = code.find_first_of("\">\n", begin + 1);
      const std::string included = code.substr(begin + 1, end - begin - 1);
      ++includes;
      CHECK_MESSAGE((code[begin] == '"' && embedded_templates().contains(included)), name << " includes " << included);
    }
  }
  CHECK(includes >= 5);
}
