#include "generator/legality.h"

#include <algorithm>
#include <array>
#include <charconv>

#include "generator/errors.h"
#include "generator/families/families.h"
#include "generator/tile_layout.h"
#include "generator/tile_rules.h"

namespace flash_attn_jit {
namespace {

// CUDA C++ programming guide, "Technical Specifications per Compute Capability": shared memory a block may opt in to,
// threads of a multiprocessor.
constexpr std::array kArchitectures = {
    ArchLimits{.sm = 75, .max_shared_bytes_per_block = 65536, .max_threads_per_sm = 1024},
    ArchLimits{.sm = 80, .max_shared_bytes_per_block = 166912, .max_threads_per_sm = 2048},
    ArchLimits{.sm = 86, .max_shared_bytes_per_block = 101376, .max_threads_per_sm = 1536},
    ArchLimits{.sm = 87, .max_shared_bytes_per_block = 166912, .max_threads_per_sm = 1536},
    ArchLimits{.sm = 89, .max_shared_bytes_per_block = 101376, .max_threads_per_sm = 1536},
    ArchLimits{.sm = 90, .max_shared_bytes_per_block = 232448, .max_threads_per_sm = 2048},
    ArchLimits{.sm = 100, .max_shared_bytes_per_block = 232448, .max_threads_per_sm = 2048},
    ArchLimits{.sm = 120, .max_shared_bytes_per_block = 101376, .max_threads_per_sm = 1536},
};

std::string arch_name(const ArchLimits& arch) { return "sm_" + std::to_string(arch.sm); }

std::optional<std::string> check_head_dim(std::int64_t head_dim, const std::string& name = "head_dim") {
  if (head_dim >= 1 && head_dim <= kMostHeadDim) return std::nullopt;
  return name + " is " + std::to_string(head_dim) + "; accepted: " + accepted_head_dims();
}

// "128", or "192 (v's 128)".
std::string head_dims_text(const KernelSpec& spec) {
  const std::string of_v = spec.head_dim_v != 0 ? " (v's " + std::to_string(spec.head_dim_v) + ")" : "";
  return std::to_string(spec.head_dim) + of_v;
}

std::optional<std::string> check_problem(const KernelSpec& spec) {
  if (auto reason = check_head_dim(spec.kind, spec.head_dim)) return reason;
  if (auto reason = check_head_dim(spec.value_head_dim(), "v's head_dim")) return reason;
  if (auto reason = check_head_dim(spec.kind, spec.greatest_head_dim())) return reason;
  if (family_of(spec.kind).dim_splits > 1 && spec.head_dim_v != 0)
    return "head_dim is " + head_dims_text(spec) + " with kind " + std::string(to_text(spec.kind)) +
           "; accepted: one for q, k and v";
  if (!spec.features.go_together())
    return "the features of " + spec.text() +
           " do not go together; accepted: one of bias16, bias32 and boolmask, and unpaired and onerow with one of "
           "these";
  if (spec.features.are_users() != (spec.functions != 0))
    return "the functions of " + spec.text() +
           " stand alone; accepted: userscore, userbias or blockmask with the word of their code, and neither without "
           "it";
  if (spec.features.are_users() && family_of(spec.kind).warps_share_rows)
    return "kind " + std::string(to_text(spec.kind)) + " comes with a user's functions; accepted: kind fwd";
  if (spec.has(Feature::kBlockMask) &&
      (family_of(spec.kind).has_all_rows || family_of(spec.kind).dim_splits > 1 || spec.mask != Mask::kNone))
    return "kind " + std::string(to_text(spec.kind)) + " with mask " + std::string(to_text(spec.mask)) +
           " comes with a block_mask; accepted: kinds fwd, bwd_dkdv and bwd_dq with mask full";
  if (spec.features.forward_only() && !family_of(spec.kind).results.out)
    return "kind " + std::string(to_text(spec.kind)) +
           " comes with seqused_k, leftpad_k or a block_table; accepted: " + "the kinds of a forward pass";
  if (spec.has(Feature::kDropout) && family_of(spec.kind).warps_share_rows)
    return "kind " + std::string(to_text(spec.kind)) + " comes with dropout; accepted: kind fwd";
  if (spec.group_size < 1)
    return "group_size (num_heads / num_heads_k) is " + std::to_string(spec.group_size) + "; accepted: 1 or more";
  if (spec.access == GlobalAccess::kVector16B && (spec.head_dim % 8 != 0 || spec.value_head_dim() % 8 != 0))
    return "access is vec16 with head_dim " + head_dims_text(spec) +
           "; accepted: head dims that are multiples of 8, or access elem2";
  return std::nullopt;
}

std::optional<std::string> check_warps(const KernelSpec& spec) {
  const int warps = spec.tile.warps;
  if (warps >= 1 && warps <= 16) return std::nullopt;
  return tile_name(spec) + " has " + std::to_string(warps) + " warps; accepted: 1 to 16";
}

std::optional<std::string> check_resources(const KernelSpec& spec, const ArchLimits& arch) {
  const std::string name = tile_name(spec) + " at head_dim " + head_dims_text(spec);
  const KernelFamily& family = family_of(spec.kind);
  if (const int bytes = family.shared_bytes(spec); bytes > arch.max_shared_bytes_per_block)
    return name + " needs " + std::to_string(bytes) + " bytes of shared memory; " + arch_name(arch) + " has " +
           std::to_string(arch.max_shared_bytes_per_block) + " a block";
  if (const int registers = family.registers(spec); registers > arch.max_registers_per_thread)
    return name + " needs about " + std::to_string(registers) + " registers a thread; " + arch_name(arch) + " has " +
           std::to_string(arch.max_registers_per_thread);
  if (spec.tile.threads() * blocks_per_multiprocessor(spec.tile) > arch.max_threads_per_sm)
    return name + " has too many threads for " + arch_name(arch);
  return std::nullopt;
}

}  // namespace

std::optional<std::string> check_head_dim(KernelKind kind, int head_dim) {
  const KernelFamily& family = family_of(kind);
  if (auto reason = check_head_dim(head_dim); reason || family.has_head_dim(head_dim)) return reason;
  return "head_dim is " + std::to_string(head_dim) + " with kind " + std::string(family.word) +
         "; accepted: " + std::to_string(family.least_head_dim) + " to " + std::to_string(family.most_head_dim);
}

std::string accepted_head_dims() { return "1 to " + std::to_string(kMostHeadDim); }

void require_head_dims(std::int64_t head_dim, std::int64_t head_dim_v) {
  if (const auto reason = check_head_dim(head_dim)) throw UnsupportedError(*reason);
  if (const auto reason = check_head_dim(head_dim_v, "v's head_dim")) throw UnsupportedError(*reason);
  if (head_dim != head_dim_v && std::max(head_dim, head_dim_v) > kMostNarrowHeadDim)
    throw UnsupportedError({"v's head_dim", "is " + std::to_string(head_dim_v) + ", q's " + std::to_string(head_dim),
                            "q's, or both 1 to " + std::to_string(kMostNarrowHeadDim)});
}

void require_head_dim_of_gradients(std::int64_t head_dim) {
  if (head_dim <= kMostNarrowHeadDim) return;
  throw UnsupportedError(
      {"head_dim", "is " + std::to_string(head_dim) + ", and inputs need a gradient",
       "1 to " + std::to_string(kMostNarrowHeadDim) + " where they do, " + accepted_head_dims() + " where none does",
       "Detach them, or call under torch.no_grad()"});
}

ArchLimits arch_limits(int sm) {
  if (sm < kArchitectures.front().sm)
    throw UnsupportedError({"the GPU's architecture", "is sm_" + std::to_string(sm), kAcceptedGpu});
  ArchLimits limits = kArchitectures.front();
  for (const ArchLimits& known : kArchitectures)
    if (known.sm <= sm) limits = known;
  limits.sm = sm;
  return limits;
}

int parse_arch(std::string_view text) {
  const std::string_view digits = text.starts_with("sm_") ? text.substr(3) : text;
  int sm = 0;
  const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), sm);
  if (error != std::errc() || end != digits.data() + digits.size() || sm < 10)
    throw SpecError("arch is " + quoted(std::string(text)) + "; accepted: a text like 'sm_75'");
  return sm;
}

std::optional<std::string> check(const KernelSpec& spec, const ArchLimits& arch) {
  if (auto reason = check_problem(spec)) return reason;
  if (auto reason = check_warps(spec)) return reason;
  if (auto reason = family_of(spec.kind).check_tile(spec)) return reason;
  return check_resources(spec, arch);
}

}  // namespace flash_attn_jit
