// What a kernel is compiled for: always explicit, so that kernels for a T4 are built on a machine without a GPU.
#pragma once

#include <compare>
#include <string>

namespace flash_attn_jit {

enum class CodeKind {
  kCubin,  // machine code of exactly this architecture
  kPtx,    // PTX that the driver of any newer GPU translates
};

struct CompileTarget {
  int sm = 75;  // compute capability x 10
  CodeKind code = CodeKind::kCubin;

  // "sm_75" for machine code, "compute_75" for PTX
  std::string text() const { return (code == CodeKind::kPtx ? "compute_" : "sm_") + std::to_string(sm); }
  friend auto operator<=>(const CompileTarget&, const CompileTarget&) = default;
};

}  // namespace flash_attn_jit
