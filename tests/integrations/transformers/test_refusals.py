"""What does not run here says so, and what to do."""

import pytest
import tiny_models
import torch
import transformers
from comparison import NAME

from flash_attn_jit.errors import UnsupportedError
from flash_attn_jit.integrations import transformers as turing
from flash_attn_jit.integrations.transformers._attention import turing_attention

OLD = transformers.__version__ < "5"


def _heads(head_dim: int = 64, dtype: torch.dtype = torch.float16) -> list[torch.Tensor]:
    return [torch.randn(1, 2, 8, head_dim, dtype=dtype) for _ in range(3)]


@pytest.mark.parametrize("name", ["flash_turing", "sdpa", "eager", "flash_attention_2", "", 5], ids=repr)
def test_a_name_that_is_not_free(name):
    before = dict(transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS)
    with pytest.raises(ValueError, match=f"name is {name!r}; accepted: a name of its own, without 'flash'"):
        turing.register(name)
    assert dict(transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS) == before


def test_registering_twice_and_by_another_name():
    assert turing.register() == turing.register() == "turing"
    assert turing.register("t4") == "t4"
    turing.calls.reset()
    tiny_models.build("llama", "t4")(**tiny_models.batch("llama"))
    assert turing.calls.counts["flash_attn_jit"] == 2


def test_a_model_of_another_dtype():
    model = tiny_models.build("llama", NAME, torch.float32)
    words = r"query has dtype torch.float32; accepted: torch.float16 or torch.bfloat16, all alike. .*dtype=torch"
    with pytest.raises(UnsupportedError, match=words):
        model(**tiny_models.batch("llama"))


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16(autocast):
    model = tiny_models.build("llama", NAME, torch.float32 if autocast else torch.bfloat16)
    turing.calls.reset()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = model(**tiny_models.batch("llama"))
    assert turing.calls.counts == {"flash_attn_jit": 2, "torch": 0} and out[0].isfinite().all()


def test_float16_under_autocast_to_bfloat16():
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = turing_attention(torch.nn.Module(), *_heads())
    assert out.dtype in (torch.float16, torch.bfloat16) and out.isfinite().all()


@pytest.mark.parametrize("name", ["head_mask", "indices", "block_indices", "sinks", "cache"])
def test_what_a_layer_gives_beside(name):
    with pytest.raises(NotImplementedError, match=f"{name} is given; accepted: None. "):
        turing_attention(torch.nn.Module(), *_heads(), **{name: torch.ones(1)})


def test_probabilities():
    with pytest.raises(NotImplementedError, match=r"output_attentions is True; .* attn_implementation=\"eager\""):
        turing_attention(torch.nn.Module(), *_heads(), output_attentions=True)
    turing_attention(torch.nn.Module(), *_heads(), output_attentions=False, head_mask=None)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float64])
def test_a_whole_mask_of_integers(dtype):
    with pytest.raises(ValueError, match=rf"attention_mask has dtype {dtype}; accepted: .*mask.bool\(\)"):
        turing_attention(torch.nn.Module(), *_heads(), attention_mask=torch.ones(1, 1, 8, 8, dtype=dtype))


def test_a_mask_of_three_dimensions():
    with pytest.raises(ValueError, match="attention_mask has 3 dimensions; accepted: None, or 2 or 4"):
        turing_attention(torch.nn.Module(), *_heads(), attention_mask=torch.ones(1, 8, 8))


def test_a_head_dim_that_neither_has():
    with pytest.raises(UnsupportedError, match=r"head_dim is 520, with softcap, .*; accepted: 1 to 512.*eager"):
        turing_attention(torch.nn.Module(), *_heads(520), softcap=30.0)
    with pytest.raises(
        UnsupportedError, match=r"head_dim is 264, and an input needs a gradient, with softcap, .*eager"
    ):
        turing_attention(torch.nn.Module(), *(x.requires_grad_() for x in _heads(264)), softcap=30.0)


def test_position_bias_of_packed_sequences():
    ends = torch.tensor([0, 3, 8], dtype=torch.int32)
    packed = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 5, "max_length_k": 5}
    with pytest.raises(NotImplementedError, match="position_bias is given for packed sequences"):
        turing_attention(torch.nn.Module(), *_heads(), position_bias=torch.zeros(1, 2, 8, 8), **packed)


def test_other_implementations_are_left_alone():
    with torch.no_grad():
        tiny_models.build("llama", "eager")(**tiny_models.batch("llama", "left"))
    if not OLD:
        from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager

        model = tiny_models.build("llama", NAME)
        model.config._attn_implementation = "unknown"
        with pytest.raises(ValueError, match="unknown is not supported for continuous batching"):
            ContinuousBatchingManager.switch_to_cb_friendly_attn(
                object.__new__(ContinuousBatchingManager), model, False
            )
