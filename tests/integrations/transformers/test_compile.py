"""torch.compile with fullgraph=True: the bits of the same model uncompiled."""

from typing import Any

import pytest
import tiny_models
import torch
import transformers
from comparison import NAME, gradients_of, logits_of, padded

OLD = transformers.__version__ < "5"
# Experts of gpt_oss in transformers 4.57 are not for torch.compile.
FAMILIES = ["llama", "mistral, window 8", "gemma3", "llama4", *([] if OLD else ["gpt_oss"])]


def _compiled(model: Any) -> Any:
    torch.compiler.reset()
    return torch.compile(model, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_forward(family, padding):
    model, inputs = tiny_models.build(family, NAME), tiny_models.batch(family, padding)
    with torch.no_grad():
        expected = logits_of(model(**inputs))
        ours = logits_of(_compiled(model)(**inputs))
    where = padded(family, padding)
    assert torch.equal(ours[where], expected[where])


@pytest.mark.parametrize("family", FAMILIES)
def test_training(family):
    inputs = tiny_models.batch(family, "right")
    gradients = []
    for compiled in (False, True):
        model = tiny_models.build(family, NAME).train()
        run = _compiled(model) if compiled else model
        logits = logits_of(run(**inputs, use_cache=False))
        logits[padded(family, "right")].square().sum().backward()
        gradients.append(gradients_of(model))
    expected, ours = gradients
    assert (ours - expected).norm() <= 1e-3 * expected.norm()


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_packed_sequences(family):
    model = tiny_models.build(family, NAME)
    positions = torch.cat([torch.arange(n) for n in (5, 9, 2)])[None]
    inputs = {"input_ids": tiny_models.batch(family, rows=1)["input_ids"], "position_ids": positions}
    with torch.no_grad():
        expected = logits_of(model(**inputs, use_cache=False))
        ours = logits_of(_compiled(model)(**inputs, use_cache=False))
    assert (ours - expected).abs().max() < 2e-3
    with torch.no_grad():
        together = logits_of(model(inputs["input_ids"], use_cache=False))
    assert (together - expected).abs().max() > 0.05


@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_generate_with_a_static_cache(family, padding):
    """transformers compiles the model for single tokens where it may, which on a CPU it may if it is told to."""
    model, inputs = tiny_models.build(family, NAME), tiny_models.batch(family, padding)
    options = {"max_new_tokens": 4, "do_sample": False, "cache_implementation": "static"}
    expected = model.generate(**inputs, **options, disable_compile=True)
    traced = []

    def remember(graph: Any, inputs: Any) -> Any:
        traced.append(graph)
        return graph.forward

    torch.compiler.reset()
    config = transformers.CompileConfig(fullgraph=True, backend=remember, mode=None)
    config._compile_all_devices = True
    assert torch.equal(model.generate(**inputs, **options, compile_config=config), expected)
    assert traced
