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

}  // namespace flash_attn_jit
