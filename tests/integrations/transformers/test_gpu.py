"""On a GPU: a Llama and a Gemma 2 of ordinary lengths beside eager attention in float32."""

import inspect
from typing import Any

import pytest
import torch
import transformers
from comparison import NAME, assert_close, assert_gradients_close, gradients_of, logits_of

from flash_attn_jit.integrations import transformers as turing

pytestmark = pytest.mark.gpu

CHOICES = [("eager", torch.float32), ("eager", torch.float16), (NAME, torch.float16)]
LENGTH, TOKENS = 300, 16
_SIZE = {
    "vocab_size": 512,
    "hidden_size": 512,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "pad_token_id": 0,
    "eos_token_id": None,
}


def _build(family: str, implementation: str, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    if family == "llama":
        model, config = transformers.LlamaForCausalLM, transformers.LlamaConfig(**_SIZE)
    else:
        model = transformers.Gemma2ForCausalLM
        config = transformers.Gemma2Config(**_SIZE, query_pre_attn_scalar=64, sliding_window=128)
    built = model._from_config(config, attn_implementation=implementation, dtype=torch.float16)
    return built.to("cuda", dtype).eval()


def _inputs(padding: bool) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 500, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    shown = torch.ones_like(ids)
    if padding:
        shown[1, :100] = 0
    return {"input_ids": ids.cuda(), "attention_mask": shown.cuda()}


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_training(family, padding):
    inputs, results = _inputs(padding), []
    shown = inputs["attention_mask"].bool()
    for implementation, dtype in CHOICES:
        model = _build(family, implementation, dtype).train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        turing.calls.reset()
        logits = logits_of(model(**inputs))
        logits[shown].square().sum().backward()
        results.append((logits.detach(), gradients_of(model)))
    assert turing.calls.counts == {"flash_attn_jit": 4, "torch": 0}
    (exact, exact_gradients), (eager, eager_gradients), (ours, our_gradients) = results
    assert_close(ours, exact, eager, shown)
    assert_gradients_close(our_gradients, exact_gradients, eager_gradients)


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_generate(family, padding, cache):
    results = []
    for implementation, dtype in CHOICES:
        turing.calls.reset()
        results.append(
            _build(family, implementation, dtype).generate(
                **_inputs(padding),
                max_new_tokens=TOKENS,
                do_sample=False,
                cache_implementation=cache,
                output_logits=True,
                return_dict_in_generate=True,
                disable_compile=True,
            )
        )
    assert turing.calls.counts == {"flash_attn_jit": 2 * TOKENS, "torch": 0}
    exact, eager, ours = (torch.stack(result.logits).float() for result in results)
    assert_close(ours[0], exact[0], eager[0])
    same = (results[0].sequences == results[2].sequences).all()
    if same:  # random weights: two tokens may be as likely as float16 can tell
        assert_close(ours, exact, eager)
    else:
        first = (results[0].sequences != results[2].sequences).any(0).nonzero()[0, 0] - LENGTH
        best = exact[first].topk(2).values
        assert (best[:, 0] - best[:, 1]).min() < 0.02


def test_generate_compiles_single_tokens():
    model, options = _build("llama", *CHOICES[2]), {"max_new_tokens": TOKENS, "do_sample": False}
    expected = model.generate(**_inputs(True), **options)
    config = transformers.CompileConfig(fullgraph=True)
    compiled = model.generate(**_inputs(True), **options, cache_implementation="static", compile_config=config)
    assert (compiled == expected).float().mean() > 0.97


def test_padding_waits_for_nothing():
    """Not in a training pass, and not where a cache grows."""
    model, inputs = _build("llama", *CHOICES[2]), _inputs(True)
    cache: Any = transformers.DynamicCache(config=model.config)
    cache_name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    with torch.no_grad():
        model(**inputs, **{cache_name: cache})
    longer = torch.cat([inputs["attention_mask"], inputs["attention_mask"][:, -1:]], 1)
    token = inputs["input_ids"][:, -1:]
    positions = longer.cumsum(-1)[:, -1:] - 1
    more = {cache_name: cache, "attention_mask": longer, "position_ids": positions}
    model(**inputs, use_cache=False).logits.sum().backward()  # compiles what is needed
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(**inputs, use_cache=False).logits.sum().backward()
        with torch.no_grad():
            model(token, **more)
    finally:
        torch.cuda.set_sync_debug_mode("default")
