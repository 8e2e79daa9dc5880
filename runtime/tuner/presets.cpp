#include "runtime/tuner/presets.h"

#include <array>

#include "generator/families/families.h"

namespace flash_attn_jit {
namespace {

// Heads and head dims: the models' config.json (num_attention_heads, num_key_value_heads, hidden_size). Lengths: language
// models, prompts up to what a 16 GB card holds; diffusion models, the levels of their UNet for the image size that they
// were made for, against the image itself and against 77 words, twice for guidance; vision and speech models, their own.
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

}  // namespace flash_attn_jit
