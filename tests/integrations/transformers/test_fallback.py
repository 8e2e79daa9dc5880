"""Head dims over 512, and over 256 where a gradient is needed, which PyTorch's attention runs."""

import pytest
import tiny_models
import torch
import transformers
from comparison import NAME, assert_close, logits_of, padded
from tiny_models import TEXT

from flash_attn_jit.integrations import transformers as turing

REASON = "head_dim is 520; accepted: 1 to 512"


def _build(
    implementation: str, dtype: torch.dtype, window: int | None, head_dim: int = 520
) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.MistralConfig(**TEXT, head_dim=head_dim, sliding_window=window)
    make = transformers.MistralForCausalLM._from_config
    return make(config, attn_implementation=implementation, dtype=torch.float16).to(dtype).eval()


CHOICES = [(NAME, torch.float16), ("eager", torch.float32), ("eager", torch.float16)]


@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize("padding", [None, "left", "right"])
def test_forward(padding, window):
    inputs, results = tiny_models.batch("llama", padding), []
    turing.calls.reset()
    for choice in CHOICES:
        with torch.no_grad():
            results.append(logits_of(_build(*choice, window)(**inputs)))
    assert turing.calls.counts == {"flash_attn_jit": 0, "torch": 2}
    assert turing.calls.reasons == {REASON: 2}
    assert_close(*results, padded("llama", padding))


@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize("cache", [None, "static"])
def test_generate(cache, padding, window):
    options = {"max_new_tokens": 4, "do_sample": False, "cache_implementation": cache, "disable_compile": True}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    turing.calls.reset()
    results = [_build(*choice, window).generate(**tiny_models.batch("llama", padding), **options) for choice in CHOICES]
    assert turing.calls.reasons == {REASON: 8}
    assert torch.equal(results[0].sequences, results[1].sequences)
    assert_close(*(torch.stack(result.logits).float() for result in results))


def test_with_gradients_alone():
    inputs = tiny_models.batch("llama", None)
    turing.calls.reset()
    model = _build(NAME, torch.float16, None, head_dim=272)
    with torch.no_grad():
        here = logits_of(model(**inputs))
    assert turing.calls.counts["torch"] == 0
    there = logits_of(model(**inputs))
    assert turing.calls.reasons == {
        "head_dim is 272, and an input needs a gradient; accepted: 1 to 256 where one does": 2
    }
    exact = logits_of(_build("eager", torch.float32, None, head_dim=272)(**inputs))
    assert_close(here, there.detach(), exact.detach(), padded("llama", None))
