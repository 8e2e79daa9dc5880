"""Tiny random models, one of each family, and batches for them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers

VOCABULARY = 128
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_TWO_HEADS = {k: v for k, v in TEXT.items() if k != "num_key_value_heads"} | {"num_attention_heads": 2}
_LOCAL = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
_IMAGE = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}


class Family(NamedTuple):
    model: str
    config: str
    options: dict[str, Any]
    layers: int = 2  # calls of attention in a forward pass
    encoder_layers: int = 0  # of them, those that run once where tokens are generated
    generates: bool = True
    pads: bool = True


def _gemma(**options: Any) -> dict[str, Any]:
    return {**TEXT, "head_dim": 256, "query_pre_attn_scalar": 256, **_LOCAL, **options}


_CLIP = {"text_config": {**_TWO_HEADS, "eos_token_id": 2}, "vision_config": _IMAGE}
_GPT2 = {"n_positions": 128, "n_embd": 128, "n_layer": 2, "n_head": 2, "bos_token_id": 1, "eos_token_id": None}
_WHISPER = {
    "num_mel_bins": 16,
    "d_model": 128,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "max_source_positions": 16,
    "max_target_positions": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}
_T5 = {
    "d_model": 128,
    "d_kv": 64,
    "d_ff": 128,
    "num_layers": 2,
    "num_heads": 2,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": None,
}
_MODERNBERT = {**_TWO_HEADS, "num_hidden_layers": 3, "local_attention": 8, "cls_token_id": 1, "sep_token_id": 2}
_OPT = {**_TWO_HEADS, "activation_function": "gelu", "ffn_dim": 128, "word_embed_proj_dim": 128}
_GPT_OSS = {**TEXT, "head_dim": 64, "num_local_experts": 2, "num_experts_per_tok": 1, **_LOCAL}
_QWEN_VL = {
    "text_config": {**TEXT, "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]}},
    "vision_config": {
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_heads": 2,
        "patch_size": 4,
        "window_size": 16,
        "fullatt_block_indexes": [1],
        "out_hidden_size": 128,
    },
    "image_token_id": 100,
    "vision_start_token_id": 101,
    "vision_end_token_id": 102,
}
_LLAMA4 = {
    **TEXT,
    "head_dim": 64,
    "intermediate_size_mlp": 128,
    "num_local_experts": 2,
    "num_experts_per_tok": 1,
    "attention_chunk_size": 8,
    "layer_types": ["chunked_attention", "full_attention"],
    "no_rope_layers": [1, 0],
    "moe_layers": [],
}

FAMILIES = {
    "llama": Family("LlamaForCausalLM", "LlamaConfig", TEXT),
    "qwen2": Family("Qwen2ForCausalLM", "Qwen2Config", TEXT),
    "qwen3": Family("Qwen3ForCausalLM", "Qwen3Config", {**TEXT, "head_dim": 64}),
    "phi3": Family("Phi3ForCausalLM", "Phi3Config", TEXT),
    "mistral, window 8": Family("MistralForCausalLM", "MistralConfig", {**TEXT, "sliding_window": 8}),
    "mistral, window 4096": Family("MistralForCausalLM", "MistralConfig", {**TEXT, "sliding_window": 4096}),
    "gemma2": Family("Gemma2ForCausalLM", "Gemma2Config", _gemma()),
    "gemma3": Family("Gemma3ForCausalLM", "Gemma3TextConfig", _gemma()),
    "gpt2": Family("GPT2LMHeadModel", "GPT2Config", {"vocab_size": VOCABULARY, "pad_token_id": 0, **_GPT2}),
    "gpt_oss": Family("GptOssForCausalLM", "GptOssConfig", _GPT_OSS),
    "opt": Family("OPTForCausalLM", "OPTConfig", _OPT),
    "bert": Family("BertForMaskedLM", "BertConfig", _TWO_HEADS, generates=False),
    "modernbert": Family("ModernBertForMaskedLM", "ModernBertConfig", _MODERNBERT, 3, generates=False),
    "vit": Family("ViTForImageClassification", "ViTConfig", _IMAGE, generates=False, pads=False),
    "clip": Family("CLIPModel", "CLIPConfig", _CLIP, 4, generates=False),
    "whisper": Family(
        "WhisperForConditionalGeneration", "WhisperConfig", {"vocab_size": VOCABULARY, **_WHISPER}, 6, 2, pads=False
    ),
    "t5": Family("T5ForConditionalGeneration", "T5Config", {"vocab_size": VOCABULARY, **_T5}, 6, 2),
    "qwen2.5-vl": Family(
        "Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLConfig", _QWEN_VL, 8, generates=False, pads=False
    ),
    "llama4": Family("Llama4ForCausalLM", "Llama4TextConfig", _LLAMA4),
}


def config_of(name: str, dropout: float = 0.0) -> Any:
    family = FAMILIES[name]
    config = getattr(transformers, family.config)(**family.options)
    parts = [config, *(getattr(config, part) for part in type(config).sub_configs)]
    for part in parts:
        for option, value in vars(part).items():
            if ("dropout" in option or "pdrop" in option) and isinstance(value, float):
                setattr(part, option, dropout if "att" in option else 0.0)
    return config


def build(name: str, implementation: str, dtype: torch.dtype = torch.float16, dropout: float = 0.0) -> Any:
    """The same weights, whatever their dtype: those of float16. dropout: of attention."""
    torch.manual_seed(0)
    make: Callable[..., Any] = getattr(transformers, FAMILIES[name].model)._from_config
    return make(config_of(name, dropout), attn_implementation=implementation, dtype=torch.float16).to(dtype).eval()


def batch(name: str, padding: str | None = None, rows: int = 2, length: int = 16) -> dict[str, Any]:
    torch.manual_seed(1)
    images = torch.randn(rows, 3, 32, 32)
    if name == "vit":
        return {"pixel_values": images}
    ids = torch.randint(3, 99, (rows, length))
    inputs: dict[str, Any] = {"input_ids": ids}
    if padding:
        shown = torch.ones(rows, length, dtype=torch.long)
        shown[1, {"left": slice(None, 5), "right": slice(-5, None)}[padding]] = 0
        ids[shown == 0] = 0
        inputs["attention_mask"] = shown
    if name == "whisper":
        return {"input_features": torch.randn(rows, 16, 32), "decoder_input_ids": ids[:, :12]}
    if name == "t5":
        inputs["decoder_input_ids"] = torch.randint(3, 99, (rows, 12))
    if name == "clip":
        inputs["pixel_values"] = images
    if name == "qwen2.5-vl":
        inputs |= _two_images(ids)
    return inputs


def _two_images(ids: torch.Tensor) -> dict[str, Any]:
    """One of 8 x 4 patches in each row, which 2 x 2 patches make a token of."""
    ids[:, 2] = 101
    ids[:, 3:11] = 100
    ids[:, 11] = 102
    patches = ids.shape[0] * 32
    return {
        "pixel_values": torch.randn(patches, 3 * 2 * 4 * 4),
        "image_grid_thw": torch.tensor([[1, 8, 4]] * ids.shape[0]),
    }
