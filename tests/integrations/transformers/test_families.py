"""Every family in every mode: the results, and that each of the calls ran here."""

from functools import partial
from typing import Any

import pytest
import tiny_models
import torch
import transformers
from comparison import (
    NAME,
    assert_close,
    assert_gradients_close,
    cast,
    gradients_of,
    logits_of,
    padded,
    reference,
    run_here,
)
from peft import LoraConfig, get_peft_model
from tiny_models import FAMILIES

TOKENS = 4
OLD = transformers.__version__ < "5"

# In transformers 4.57 these do not call the attention interface.
_WITHOUT_INTERFACE = ("bert", "modernbert", "t5") if OLD else ()
HERE = [name for name in FAMILIES if name not in _WITHOUT_INTERFACE]


def families(names: list[str], *in_sample: str) -> Any:
    return pytest.mark.parametrize(
        "family", [pytest.param(name, marks=pytest.mark.sample) if name in in_sample else name for name in names]
    )


PADDED = [name for name in HERE if FAMILIES[name].pads]
GENERATING = [name for name in HERE if FAMILIES[name].generates]


def _forward(padding: str | None, family: str, implementation: str, dtype: torch.dtype) -> torch.Tensor:
    model = tiny_models.build(family, implementation, dtype)
    with torch.no_grad():
        return logits_of(model(**cast(tiny_models.batch(family, padding), dtype)))


_forwards = {padding: partial(_forward, padding) for padding in (None, "left", "right")}


@families(HERE, "llama", "t5")
def test_forward(family):
    exact, eager = reference(_forwards[None], family)
    assert_close(run_here(_forwards[None], family, FAMILIES[family].layers), exact, eager)


@pytest.mark.parametrize("padding", ["left", "right"])
@families(PADDED, "llama")
def test_padding(family, padding):
    exact, eager = reference(_forwards[padding], family)
    ours = run_here(_forwards[padding], family, FAMILIES[family].layers)
    assert_close(ours, exact, eager, padded(family, padding))


def _loss(model: Any, family: str, padding: str | None, dtype: torch.dtype) -> torch.Tensor:
    logits = logits_of(model(**cast(tiny_models.batch(family, padding), dtype)))
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    return (logits * weights)[padded(family, padding)].sum()


def _train(
    checkpointing: bool,
    padding: str | None,
    family: str,
    implementation: str,
    dtype: torch.dtype,
    reentrant: bool = False,
) -> Any:
    model = tiny_models.build(family, implementation, dtype).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    _loss(model, family, padding, dtype).backward()
    return gradients_of(model)


_trainings = {
    (checkpointing, padding): partial(_train, checkpointing, padding)
    for checkpointing in (False, True)
    for padding in (None, "left", "right")
}


@pytest.mark.parametrize("padding", [None, "left", "right"])
@families(HERE)
def test_training(family, padding):
    if padding and family not in PADDED:
        pytest.skip("it has no padding")
    run = _trainings[False, padding]
    exact, eager = reference(run, family)
    assert_gradients_close(run_here(run, family, FAMILIES[family].layers), exact, eager)


@families(HERE)
def test_checkpointing(family):
    run = _trainings[True, None]
    exact, eager = reference(run, family)
    assert_gradients_close(run_here(run, family, 2 * FAMILIES[family].layers), exact, eager)


@families(HERE, "llama")
def test_reentrant_checkpointing(family):
    if family == "whisper" and transformers.__version__ < "5":
        pytest.skip("transformers 4 cannot, with any attention")
    run = partial(_train, True, None, reentrant=True)
    exact, eager = reference(run, family)
    assert_gradients_close(run_here(run, family, 2 * FAMILIES[family].layers), exact, eager)


def _train_lora(family: str, implementation: str, dtype: torch.dtype) -> Any:
    """Adapters in float32 beside weights in float16, as PEFT makes them, and checkpoints."""
    model = tiny_models.build(family, implementation, dtype)
    torch.manual_seed(3)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with torch.autocast("cpu", torch.float16, enabled=dtype is torch.float16):
        loss = _loss(model, family, "left" if family in PADDED else None, torch.float32)
    loss.backward()
    return gradients_of(model)


@families(HERE, "llama")
def test_lora_under_autocast(family):
    exact, eager = reference(_train_lora, family)
    assert_gradients_close(run_here(_train_lora, family, 2 * FAMILIES[family].layers), exact, eager)


def _generate(cache: str | None, padding: str | None, family: str, implementation: str, dtype: torch.dtype) -> Any:
    inputs = cast(tiny_models.batch(family, padding), dtype)
    inputs.pop("decoder_input_ids", None)
    result = tiny_models.build(family, implementation, dtype).generate(
        **inputs,
        max_new_tokens=TOKENS,
        do_sample=False,
        cache_implementation=cache,
        output_logits=True,
        return_dict_in_generate=True,
        disable_compile=True,
    )
    return result.sequences, torch.stack(result.logits).float()


_generations = {
    (cache, padding): partial(_generate, cache, padding) for cache in (None, "static") for padding in (None, "left")
}


@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize("cache", [None, "static"])
@families(GENERATING, "llama")
def test_generate(family, cache, padding):
    if padding and family not in PADDED:
        pytest.skip("it has no padding")
    run = _generations[cache, padding]
    (tokens, exact), (_, eager) = reference(run, family)
    _, layers, once = FAMILIES[family].config, FAMILIES[family].layers, FAMILIES[family].encoder_layers
    our_tokens, ours = run_here(run, family, once + TOKENS * (layers - once))
    assert torch.equal(our_tokens, tokens)
    assert_close(ours, exact, eager)


@pytest.mark.parametrize("family", _WITHOUT_INTERFACE)
def test_a_model_without_the_interface_is_refused(family):
    with pytest.raises(
        ValueError, match=r"does not call it; accepted: models whose layers call .*flash_attn_jit\.route_sdpa\(\)"
    ):
        tiny_models.build(family, NAME)
