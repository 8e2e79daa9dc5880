// The rule that makes the interpreter possible: device code reaches the machine through the primitives alone.
#include <doctest/doctest.h>

#include <regex>
#include <string>
#include <vector>

#include "generator/render.h"

using namespace flash_attn_jit;

namespace {

// Without comments: words in prose are no code.
std::string code_of(const std::string& text) { return std::regex_replace(text, std::regex("//[^\n]*"), ""); }

std::vector<std::string> matches(const std::string& text, const std::string& pattern) {
  const std::regex regex(pattern);
  std::vector<std::string> found;
  for (std::sregex_iterator match(text.begin(), text.end(), regex), end; match != end; ++match)
    found.push_back(match->str());
  return found;
}

// Inline assembly, CUDA's built-in variables and every function of CUDA, whose names begin with two
// underscores.
constexpr const char* kMachine =
    R"(\basm\b|\b(threadIdx|blockIdx|blockDim|gridDim|warpSize)\b|\b__(?!device__|forceinline__|global__|launch_bounds__|restrict__)\w+)";

}  // namespace

TEST_CASE("asm and intrinsics stand in primitives_cuda.cuh alone") {
  int others = 0;
  for (const auto& [name, text] : embedded_templates()) {
    if (name == "primitives_cuda.cuh") {
      CHECK(matches(code_of(text), kMachine).size() > 10);
      continue;
    }
    if (name == "primitives_host.cuh" || name == "host_engine.cuh") continue;
    ++others;
    for (const std::string& found : matches(code_of(text), kMachine)) FAIL_CHECK(name << " uses " << found);
  }
  CHECK(others >= 5);
}

TEST_CASE("only primitives.cuh asks which compiler it is") {
  for (const auto& [name, text] : embedded_templates()) {
    const auto found = matches(
        code_of(text), R"(FLASH_ATTN_JIT_HOST\b|__CUDA_ARCH__|__CUDACC\w*|__GNUC__|__clang__|_WIN32)");
    if (name == "primitives.cuh")
      CHECK(found == std::vector<std::string>{"FLASH_ATTN_JIT_HOST"});
    else if (name != "primitives_cuda.cuh")  // its instructions differ by architecture
      CHECK_MESSAGE(found.empty(), name);
    else
      CHECK(matches(code_of(text), "FLASH_ATTN_JIT_HOST").empty());
  }
}

TEST_CASE("templates include templates alone") {
  for (const auto& [name, text] : embedded_templates())
    for (const std::string& include : matches(code_of(text), "#\\s*include[^\n]*")) {
      std::smatch parts;
      REQUIRE_MESSAGE(std::regex_search(include, parts, std::regex("\"([^\"]+)\"")), name << ": " << include);
      CHECK_MESSAGE(embedded_templates().contains(parts[1].str()), name << ": " << include);
    }
}
