// Models that people run, as the attention problems that they are made of.
#pragma once

#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "runtime/tuner/attention_case.h"

namespace flash_attn_jit {

struct PresetLayer {
  std::string_view preset;
  int num_heads, num_heads_k, head_dim;
  bool causal;
  int seqlen_q, seqlen_k;
  int batch;
};
std::span<const PresetLayer> preset_layers();

std::string preset_words();  // "llama-3-8b, qwen2.5-7b, ..."

// The kernels of a kind that a layer's problem takes.
AttentionCase case_of(const PresetLayer& layer, KernelKind kind);

// Problems as a user names them: a preset's, or those of head dims and sizes.
struct ProblemChoice {
  std::string preset;  // empty: what follows, up to the lengths
  std::vector<int> head_dims;
  std::vector<int> group_sizes = {1};
  bool full = true, causal = false;  // masks
  int num_heads = 16;
  std::vector<int> seqlens, batches;  // of queries and keys, decode: of keys; of a preset, empty: its own
  std::vector<std::string> kinds = {"fwd"};
};

inline constexpr int kMostTunedSeqlen = 1 << 20;
inline constexpr int kMostTunedBatch = 1 << 16;
inline constexpr int kMostTunedHeads = 1 << 16;

// The name that whoever asks knows an argument by, from Python's: "head_dims".
using ArgumentName = std::string (*)(std::string_view python_name);

// Every kernel of the problems. Throws ArgumentError.
std::vector<AttentionCase> problems_of(const ProblemChoice& choice, ArgumentName name);

}  // namespace flash_attn_jit
