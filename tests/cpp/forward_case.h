// One forward problem of the numerics tests: what it is, and how far the kernel's result lies from float64.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "attention_reference.h"
#include "generator/kernel_spec.h"

namespace flash_attn_jit::testing {

enum class Inputs {
  kNormal,    // N(0, 1)
  kRising,    // plus a score that grows by `rise` from each tile of keys to the one before, as the kernel walks
  kFalling,   // the other way round
  kThousand,  // scores of about +-1000
};

enum class AlibiCase { kOff, kHeads, kBatchAndHeads };  // the shape of the slopes

// An attn_bias: its numbers, and which of its dimensions are not broadcast. Those that are not paired have a gap
// between two keys.
enum class BiasCase { kOff, kHalf, kHalfUnpaired, kFloatUnpaired, kFloatKeys, kBool, kBoolUnpaired, kBoolKeys };

struct ForwardCase {
  DType dtype = DType::kFloat16;
  int head_dim = 64;
  int head_dim_v = 0;  // 0: the same
  Mask mask = Mask::kNone;
  int group_size = 1;
  std::int64_t batch = 1, num_heads_k = 1, seqlen_q = 64, seqlen_k = 64;
  Window window;       // where mask is kWindow
  double softcap = 0;  // 0: none
  AlibiCase alibi = AlibiCase::kOff;
  BiasCase bias = BiasCase::kOff;
  double dropout = 0;          // p
  std::optional<double> sink;  // of the first head; each has 0.5 more than the one before it
  std::int64_t sequences = 0;  // varlen: so many, the longest seqlen_q and seqlen_k long, some empty; 0: fixed lengths
  Layout layout = Layout::kContiguous;
  Inputs inputs = Inputs::kNormal;
  double rise = 0;                     // natural logarithm
  std::optional<float> softmax_scale;  // none: 1 / sqrt(head_dim)
  std::optional<TileConfig> tile;      // none: the library chooses
  std::int64_t splits = 0;  // the decode kernel, with at most so many; 0: the tile's kernel, or what is chosen
  unsigned seed = 1;

  // "bf16", "window5,-1" for a mask, "softcap15", "alibi" or "alibibatch", "bias16", "dropout0.3", "sink0.5",
  // "varlen4", ...: "hdim64 causal gqa2 batch1 headsk1 sq257 sk129 rowgaps rising9 scale-0.5 m128n32w4q64l2b8k8"
  std::string text() const;
  // Words in any order; those left out keep their defaults. Throws SpecError.
  static ForwardCase parse(std::string_view text);

  float scale() const;
  int value_head_dim() const { return head_dim_v > 0 ? head_dim_v : head_dim; }
};

struct ForwardOutcome {
  double out_error = 0, out_bound = 0;  // maxima over all elements
  double lse_error = 0, lse_bound = 0;
  std::string fault;  // empty where all is well, else what went wrong, with the case
};

// The kernel that a case runs, of the forward pass and without a tile.
KernelSpec spec_of(const ForwardCase& c);

// The inputs of a case, all freshly drawn.
struct ForwardTensors {
  explicit ForwardTensors(const ForwardCase& c);

  AttentionProblem problem() { return {&q, &k, &v, options}; }
  ForwardRequest request();

  ForwardTensors(const ForwardTensors&) = delete;  // options point into it

  std::vector<int> cu_seqlens_q, cu_seqlens_k;
  WatchedTensor q, k, v, out;
  std::vector<float> lse, alibi_slopes, sinks;
  std::vector<std::uint8_t> bias;  // bytes
  std::array<int, 2> dropout_seed;
  AttentionOptions options;
  std::optional<TileConfig> tile, decode_tile;
  std::int64_t splits;
};

// The tile space of a head dim: of both masks and of both kinds of access.
std::vector<TileConfig> tiles_of(int head_dim);

// The first of them with so many query rows and keys.
TileConfig find_tile(int head_dim, int block_m, int block_n);

// Runs a case in the interpreter. The bound is twice the error of attention_emulated(), plus 1e-5.
ForwardOutcome run_forward_case(const ForwardCase& c);

}  // namespace flash_attn_jit::testing
