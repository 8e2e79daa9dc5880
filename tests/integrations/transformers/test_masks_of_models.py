"""Models that make more of masks, values and windows than most."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from comparison import NAME, assert_close, cast
from tiny_models import TEXT, VOCABULARY

from flash_attn_jit.integrations import transformers as turing

OLD = transformers.__version__ < "5"


def _qwen2_moe() -> Any:
    """Its layers do not say that they have a window."""
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 64}
    window = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}
    return transformers.Qwen2MoeConfig(**TEXT, **experts, **window, shared_expert_intermediate_size=64)


def _deepseek_v3() -> Any:
    """Its values are shorter than its keys."""
    return transformers.DeepseekV3Config(
        **{**TEXT, "num_key_value_heads": 4},
        q_lora_rank=32,
        kv_lora_rank=32,
        qk_rope_head_dim=16,
        qk_nope_head_dim=32,
        v_head_dim=32,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=2,
        moe_intermediate_size=64,
    )


def _doge() -> Any:
    """Its layers make a mask of their own of the model's."""
    return transformers.DogeConfig(**TEXT, keep_window_size=4)


def _both_ways() -> Any:
    config = transformers.LlamaConfig(**TEXT)
    config.is_causal = False
    return config


def _three(model: str, make_config: Callable[[], Any], calls: int, **inputs: Any) -> list[torch.Tensor]:
    """Logits here, of eager float32 and of eager float16."""
    results = []
    for implementation, dtype in ((NAME, torch.float16), ("eager", torch.float32), ("eager", torch.float16)):
        torch.manual_seed(0)
        make = getattr(transformers, model)._from_config
        built = make(make_config(), attn_implementation=implementation, dtype=torch.float16).to(dtype).eval()
        turing.calls.reset()
        with torch.no_grad():
            results.append(built(**cast(inputs, dtype)).logits.float())
        if implementation == NAME:
            assert turing.calls.counts == {"flash_attn_jit": calls, "torch": 0}
    return results


def _ids() -> torch.Tensor:
    return torch.randint(3, 99, (2, 16), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize(
    ("model", "make_config"),
    [
        ("DeepseekV3ForCausalLM", _deepseek_v3),
        ("DogeForCausalLM", _doge),
        *([] if OLD else [("Qwen2MoeForCausalLM", _qwen2_moe), ("LlamaForCausalLM", _both_ways)]),
    ],
)
def test_text(model, make_config, padding):
    shown = torch.ones(2, 16, dtype=torch.long)
    if not padding:
        assert_close(*_three(model, make_config, 2, input_ids=_ids()))
        return
    shown[1, :5] = 0
    assert_close(*_three(model, make_config, 2, input_ids=_ids(), attention_mask=shown), shown.bool())


def _gemma3_with_images() -> Any:
    layers = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
    image = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    return transformers.Gemma3Config(
        text_config={**TEXT, "head_dim": 32, "query_pre_attn_scalar": 32, **layers},
        vision_config={**image, "image_size": 32, "patch_size": 8},
        mm_tokens_per_image=4,
        image_token_index=100,
        image_token_id=100,
        boi_token_index=101,
        eoi_token_index=102,
    )


@pytest.mark.parametrize("padding", [False, True])
def test_tokens_of_an_image_see_each_other(padding):
    ids = _ids()
    ids[:, 3:7] = 100
    assert VOCABULARY > 102
    inputs = {"input_ids": ids, "token_type_ids": (ids == 100).long()}
    inputs["pixel_values"] = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    shown = torch.ones(2, 16, dtype=torch.long)
    if padding:
        shown[1, :2] = 0
        inputs["attention_mask"] = shown
    assert_close(*_three("Gemma3ForConditionalGeneration", _gemma3_with_images, 3, **inputs), shown.bool())
