#include "runtime/tuner/presets.h"

#include <algorithm>
#include <array>
#include <limits>

#include "generator/errors.h"
#include "generator/families/families.h"
#include "generator/legality.h"

namespace flash_attn_jit {
namespace {

// Heads and head dims: the models' config.json (num_attention_heads, num_key_value_heads, hidden_size). Lengths:
// language models, prompts up to what a 16 GB card holds; diffusion models, the levels of their UNet for the image size
// that they were made for, against the image itself and against 77 words, twice for guidance; vision and speech models,
// their own.
constexpr std::array kLayers = {
    PresetLayer{"llama-3-8b", 32, 8, 128, true, 512, 512, 1},
    PresetLayer{"llama-3-8b", 32, 8, 128, true, 2048, 2048, 1},
    PresetLayer{"llama-3-8b", 32, 8, 128, true, 8192, 8192, 1},
    PresetLayer{"llama-2-7b", 32, 32, 128, true, 512, 512, 1},
    PresetLayer{"llama-2-7b", 32, 32, 128, true, 2048, 2048, 1},
    PresetLayer{"llama-2-7b", 32, 32, 128, true, 4096, 4096, 1},
    PresetLayer{"qwen2.5-7b", 28, 4, 128, true, 512, 512, 1},
    PresetLayer{"qwen2.5-7b", 28, 4, 128, true, 2048, 2048, 1},
    PresetLayer{"qwen2.5-7b", 28, 4, 128, true, 8192, 8192, 1},
    PresetLayer{"phi-3-mini", 32, 32, 96, true, 512, 512, 1},
    PresetLayer{"phi-3-mini", 32, 32, 96, true, 2048, 2048, 1},
    PresetLayer{"gemma-2b", 8, 1, 256, true, 512, 512, 1},
    PresetLayer{"gemma-2b", 8, 1, 256, true, 2048, 2048, 1},
    PresetLayer{"gpt2", 12, 12, 64, true, 1024, 1024, 1},
    PresetLayer{"gpt2", 12, 12, 64, true, 1024, 1024, 16},
    PresetLayer{"bert-base", 12, 12, 64, false, 128, 128, 32},
    PresetLayer{"bert-base", 12, 12, 64, false, 512, 512, 16},
    PresetLayer{"sdxl", 10, 10, 64, false, 4096, 4096, 2},
    PresetLayer{"sdxl", 10, 10, 64, false, 4096, 77, 2},
    PresetLayer{"sdxl", 20, 20, 64, false, 1024, 1024, 2},
    PresetLayer{"sdxl", 20, 20, 64, false, 1024, 77, 2},
    PresetLayer{"sd15", 8, 8, 40, false, 4096, 4096, 2},
    PresetLayer{"sd15", 8, 8, 40, false, 4096, 77, 2},
    PresetLayer{"sd15", 8, 8, 80, false, 1024, 1024, 2},
    PresetLayer{"sd15", 8, 8, 80, false, 1024, 77, 2},
    PresetLayer{"sd15", 8, 8, 160, false, 256, 256, 2},
    PresetLayer{"sd15", 8, 8, 160, false, 256, 77, 2},
    PresetLayer{"vit-b", 12, 12, 64, false, 197, 197, 1},
    PresetLayer{"vit-b", 12, 12, 64, false, 197, 197, 32},
    PresetLayer{"vit-l", 16, 16, 64, false, 197, 197, 1},
    PresetLayer{"vit-l", 16, 16, 64, false, 197, 197, 32},
    PresetLayer{"whisper-small", 12, 12, 64, false, 1500, 1500, 1},
};

[[noreturn]] void refuse(const std::string& argument, const std::string& came, const std::string& accepted) {
  throw ArgumentError({argument, "is '" + came + "'", accepted});
}

void require_range(const std::string& argument, const std::vector<int>& values, int most) {
  for (const int value : values)
    if (value < 1 || value > most)
      refuse(argument, std::to_string(value), "a whole number from 1 to " + std::to_string(most));
}

void require_ranges(const ProblemChoice& choice, ArgumentName name) {
  require_range(name("head_dims"), choice.head_dims, kMostNarrowHeadDim);
  require_range(name("gqa"), choice.group_sizes, std::numeric_limits<int>::max());
  require_range(name("heads"), {choice.num_heads}, kMostTunedHeads);
  require_range(name("seqlens"), choice.seqlens, kMostTunedSeqlen);
  require_range(name("batch"), choice.batches, kMostTunedBatch);
}

std::vector<PresetLayer> layers_of_preset(const ProblemChoice& choice, ArgumentName name) {
  std::vector<PresetLayer> layers;
  for (const PresetLayer& layer : kLayers)
    if (layer.preset == choice.preset) layers.push_back(layer);
  if (layers.empty()) refuse(name("preset"), choice.preset, preset_words());
  return layers;
}

std::vector<PresetLayer> layers_of_sizes(const ProblemChoice& choice, ArgumentName name) {
  if (choice.seqlens.empty())
    throw ArgumentError({name("seqlens"), "is missing, which " + name("head_dims") + " takes", "512,2048"});
  std::vector<PresetLayer> layers;
  for (const int head_dim : choice.head_dims)
    for (const int group : choice.group_sizes) {
      if (choice.num_heads % group != 0)
        throw ArgumentError({name("gqa"),
                             "is '" + std::to_string(group) + "', which does not divide " + name("heads") + ", " +
                                 std::to_string(choice.num_heads),
                             "query heads for each head of keys"});
      for (const bool is_causal : {false, true})
        if (is_causal ? choice.causal : choice.full)
          layers.push_back({"", choice.num_heads, choice.num_heads / group, head_dim, is_causal, 0, 0, 1});
    }
  return layers;
}

// What is given instead of a layer's own lengths and batch.
std::vector<PresetLayer> with_sizes(const std::vector<PresetLayer>& layers, const ProblemChoice& choice) {
  std::vector<PresetLayer> sized;
  for (const PresetLayer& layer : layers)
    for (const int length : choice.seqlens.empty() ? std::vector<int>{0} : choice.seqlens)
      for (const int batch : choice.batches.empty() ? std::vector<int>{0} : choice.batches) {
        PresetLayer one = layer;
        if (length > 0) one.seqlen_q = one.seqlen_k = length;
        if (batch > 0) one.batch = batch;
        sized.push_back(one);
      }
  return sized;
}

std::vector<KernelKind> kinds_of(const ProblemChoice& choice, ArgumentName name) {
  std::vector<KernelKind> kinds;
  for (const std::string& word : choice.kinds) {
    const std::size_t before = kinds.size();
    for (const KernelKind kind : kKernelKinds)
      if (family_of(kind).is_tuned && family_of(kind).pack_group == word) kinds.push_back(kind);
    if (kinds.size() == before) refuse(name("kinds"), word, tuned_group_words());
  }
  return kinds;
}

// The layer's own, or where keys are there before the queries: one that is written, 16 that were guessed or asked more.
std::vector<int> query_counts(const PresetLayer& layer, KernelKind kind) {
  if (!family_of(kind).warps_share_rows) return {layer.seqlen_q};
  return {1, 16};
}

}  // namespace

std::span<const PresetLayer> preset_layers() { return kLayers; }

std::string preset_words() {
  std::string words;
  std::string_view last;
  for (const PresetLayer& layer : kLayers) {
    if (layer.preset != last) words += (words.empty() ? "" : ", ") + std::string(layer.preset);
    last = layer.preset;
  }
  return words;
}

AttentionCase case_of(const PresetLayer& layer, KernelKind kind) {
  AttentionCase attention;
  attention.spec.kind = kind;
  attention.spec.head_dim = layer.head_dim;
  attention.spec.mask = layer.causal ? Mask::kCausal : Mask::kNone;
  attention.spec.group_size = layer.num_heads / layer.num_heads_k;
  attention.spec.access = layer.head_dim % 8 == 0 ? GlobalAccess::kVector16B : GlobalAccess::kElement2B;
  attention.spec = normalized(attention.spec);
  attention.batch = layer.batch;
  attention.num_heads = layer.num_heads;
  // Of a kernel that reads no keys nothing is said of groups.
  attention.num_heads_k = layer.num_heads / attention.spec.group_size;
  attention.seqlen_q = layer.seqlen_q;
  attention.seqlen_k = layer.seqlen_k;
  return attention;
}

std::vector<AttentionCase> problems_of(const ProblemChoice& choice, ArgumentName name) {
  if (!choice.preset.empty() && !choice.head_dims.empty())
    throw ArgumentError({name("preset") + " and " + name("head_dims"), "are both given", "one of them",
                         "A preset has its own head dims"});
  if (choice.preset.empty() && choice.head_dims.empty())
    throw ArgumentError({name("preset") + " or " + name("head_dims"), "is missing", preset_words() + "; 64,128"});
  require_ranges(choice, name);
  const std::vector<KernelKind> kinds = kinds_of(choice, name);
  const std::vector<PresetLayer> layers =
      choice.preset.empty() ? layers_of_sizes(choice, name) : layers_of_preset(choice, name);
  std::vector<AttentionCase> cases;
  for (const PresetLayer& layer : with_sizes(layers, choice))
    for (const KernelKind kind : kinds)
      for (const int queries : query_counts(layer, kind)) {
        PresetLayer asked = layer;
        asked.seqlen_q = queries;
        cases.push_back(case_of(asked, kind));
      }
  return cases;
}

}  // namespace flash_attn_jit
