#include "runtime/interpreter/report.h"

#include <cstdio>
#include <nlohmann/json.hpp>

namespace flash_attn_jit {

std::string InterpreterReport::text() const {
  std::string text = kernel + ", " + std::to_string(blocks) +
                     " blocks: no races, no read of unwritten shared memory, no access outside the tensors\n";
  char line[160];
  for (const auto& [kind, count] : shared) {
    std::snprintf(line, sizeof line,
                  "  %-18s %12lld warp accesses, bank conflict factor %.3f (%lld cycles, %lld without)\n", kind.c_str(),
                  static_cast<long long>(count.accesses), count.factor(), static_cast<long long>(count.cycles),
                  static_cast<long long>(count.ideal_cycles));
    text += line;
  }
  return text;
}

std::string InterpreterReport::json() const {
  nlohmann::json accesses = nlohmann::json::object();
  for (const auto& [kind, count] : shared)
    accesses[kind] = {{"accesses", count.accesses},
                      {"cycles", count.cycles},
                      {"ideal_cycles", count.ideal_cycles},
                      {"factor", count.factor()}};
  return nlohmann::json{{"kernel", kernel}, {"blocks", blocks}, {"shared", accesses}}.dump(2);
}

}  // namespace flash_attn_jit
