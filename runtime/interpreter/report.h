// What the interpreter saw in one kernel's run.
#pragma once

#include <cstdint>
#include <map>
#include <string>

namespace flash_attn_jit {

// Shared-memory traffic of one access kind ("ldmatrix_x4", "store_shared_16B", ...), one count a warp-wide
// access.
struct AccessCount {
  std::int64_t accesses = 0;
  std::int64_t cycles = 0;        // that the 32 banks need
  std::int64_t ideal_cycles = 0;  // that they would need without conflicts
  double factor() const { return ideal_cycles ? double(cycles) / double(ideal_cycles) : 1.0; }
};

struct InterpreterReport {
  std::string kernel;
  std::int64_t blocks = 0;
  std::map<std::string, AccessCount> shared;  // by access kind
  std::string text() const;                   // a few lines to print
  std::string json() const;
};

}  // namespace flash_attn_jit
