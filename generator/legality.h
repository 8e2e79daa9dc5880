// What an architecture can do and which specs are legal on it: the only copy of these rules.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "generator/kernel_spec.h"

namespace flash_attn_jit {

std::string accepted_head_dims();  // in words

// The oldest GPUs that there are kernels for, as compute capability x 10 and in words.
inline constexpr int kOldestSm = 75;
inline constexpr const char* kAcceptedGpu = "sm_75 (Turing: Tesla T4, RTX 20) or newer";

// Refuses what no tile can make legal, with check()'s reason: throws UnsupportedError.
void require_head_dims(std::int64_t head_dim, std::int64_t head_dim_v);

// Nothing when there are kernels of that kind, else the reason.
std::optional<std::string> check_head_dim(KernelKind kind, int head_dim);

// Of inputs that need a gradient there are fewer.
void require_head_dim_of_gradients(std::int64_t head_dim);

// Limits of one architecture, from the CUDA C programming guide, "Technical specifications per compute capability".
struct ArchLimits {
  int sm = 75;                         // compute capability x 10
  int max_shared_bytes_per_block = 0;  // with opt-in
  int max_registers_per_thread = 255;
  int max_threads_per_sm = 1024;
};

// The limits of sm_`sm`; throws UnsupportedError below sm_75. A newer, unknown one gets those of the nearest older.
ArchLimits arch_limits(int sm);

// Parses "sm_75" or "75"; throws SpecError.
int parse_arch(std::string_view text);

// Nothing when `spec` is legal on `arch`, else the reason, as the user reads it.
std::optional<std::string> check(const KernelSpec& spec, const ArchLimits& arch);

}  // namespace flash_attn_jit
