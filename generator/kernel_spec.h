// What a kernel is: the only thing the generator reads. Plain values with a canonical text that parses back.
#pragma once

#include <algorithm>
#include <array>
#include <compare>
#include <cstdint>
#include <string>
#include <string_view>

#include "generator/features.h"

namespace flash_attn_jit {

// The backward pass takes three kernels, one after the other, or one alone where a block can have all keys; and behind
// them one more where attn_bias needs a gradient. A forward pass of head dims above 256 takes a kernel of its own; one
// of few queries the decode kernel, and behind it, where the keys are split over blocks, the one that puts their
// results together. What a cache of keys and values is to take comes before it.
enum class KernelKind : std::uint8_t {
  kForward,
  kForwardWide,
  kBackwardPreprocess,
  kBackwardDkDv,
  kBackwardDq,
  kBackwardAllKeys,
  kBackwardBias,
  kDecode,
  kDecodeCombine,
  kAppend,
};
inline constexpr std::array kKernelKinds = {
    KernelKind::kForward,      KernelKind::kForwardWide, KernelKind::kBackwardPreprocess,
    KernelKind::kBackwardDkDv, KernelKind::kBackwardDq,  KernelKind::kBackwardAllKeys,
    KernelKind::kBackwardBias, KernelKind::kDecode,      KernelKind::kDecodeCombine,
    KernelKind::kAppend};

// Of a forward pass, whose kernel above kMostNarrowHeadDim is kForwardWide; of all other kernels but kAppend.
inline constexpr int kMostHeadDim = 512, kMostNarrowHeadDim = 256;

// What q, k, v, out and their gradients are made of. Products are of float16 either way: see templates/stored.cuh.
enum class DType : std::uint8_t { kFloat16, kBFloat16 };
inline constexpr std::array kDTypes = {DType::kFloat16, DType::kBFloat16};

// Which keys a query sees: all, those up to its place on the diagonal, or a window around that place whose two widths
// are arguments of the launch.
enum class Mask : std::uint8_t { kNone, kCausal, kWindow };
inline constexpr std::array kAllMasks = {Mask::kNone, Mask::kCausal, Mask::kWindow};

// How q, k, v and out are read and written in global memory.
enum class GlobalAccess : std::uint8_t {
  kVector16B,  // 16-byte accesses: base pointers and all strides are multiples of 16 bytes, head_dim of 8
  kElement2B,  // one element at a time: anything whose last dimension is contiguous
};

// Where the main loop's memory work stands among the tensor instructions of what it accumulates (forward: O, backward:
// the gradients), in eighths of them. ptxas keeps to barriers and volatile loads and moves nearly all else, so these
// decide how it schedules the whole loop.
struct LoopSchedule {
  int load = 2;        // the next tile is loaded from global memory
  int barrier = 4;     // it is stored to shared memory, then the barrier
  int first_keys = 7;  // forward: the next iteration's first K fragments are read; backward has none: 8

  friend auto operator<=>(const LoopSchedule&, const LoopSchedule&) = default;
};

// How one thread block covers its part of the problem. Text: "m256n16w8q96l2b4k7".
struct TileConfig {
  int block_m = 0;  // rows of a block, queries or (dK and dV) keys; a warp owns block_m / warps of them (16 or 32);
                    // decode: which several warps may share
  int block_n = 0;  // keys, or (dK and dV) queries, of one iteration of the main loop; decode: of each warp's
  int warps = 0;    // warps of a block
  int register_dims = 0;  // head dims of the rows' matrices held in registers; the rest stays in shared memory
  LoopSchedule schedule;

  int threads() const { return warps * 32; }
  std::string text() const;
  static TileConfig parse(std::string_view text);  // throws SpecError

  friend auto operator<=>(const TileConfig&, const TileConfig&) = default;
};

struct KernelSpec {
  KernelKind kind = KernelKind::kForward;
  DType dtype = DType::kFloat16;
  int head_dim = 0;    // the caller's, 1 to kMostHeadDim; padded with zeros inside the kernel
  int head_dim_v = 0;  // that of v, out and their gradients where it is another one; 0: the same
  Mask mask = Mask::kNone;
  FeatureSet features = {};
  std::uint64_t functions = 0;  // the number of the user's code that is compiled in (render.h); 0: none
  int group_size = 1;           // num_heads / num_heads_k
  GlobalAccess access = GlobalAccess::kVector16B;
  TileConfig tile;

  bool has(Feature feature) const { return features.has(feature); }

  void set_head_dims(int q, int v) {
    head_dim = q;
    head_dim_v = v == q ? 0 : v;
  }
  int value_head_dim() const { return head_dim_v != 0 ? head_dim_v : head_dim; }
  int greatest_head_dim() const { return std::max(head_dim, head_dim_v); }

  // Canonical form: "fwd hdim128 fp16 causal gqa8 vec16 m256n16w8q96l2b4k7", where v's head dim is another one
  // "fwd hdim192v128 ..."; the words of the features that are on stand behind the mask, and behind them
  // "code0123456789abcdef", the user's functions'.
  std::string text() const;
  static KernelSpec parse(std::string_view text);  // throws SpecError

  // File-name form, without architecture: "flash_fwd_hdim128_fp16_causal_gqa8_vec16_m256n16w8q96l2b4k7".
  std::string name() const;

  friend auto operator<=>(const KernelSpec&, const KernelSpec&) = default;
};

KernelKind parse_kind(std::string_view text);  // throws SpecError
DType parse_dtype(std::string_view text);      // throws SpecError
std::string_view to_text(KernelKind);          // its family's word: "fwd", "bwd_dq"
std::string_view to_text(DType);               // "fp16", "bf16"
std::string_view to_text(Mask);                // "full", "causal", "window"
std::string_view to_text(GlobalAccess);        // "vec16", "elem2"

}  // namespace flash_attn_jit
