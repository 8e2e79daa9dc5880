"""What the kernels are given: the cheapest that says it. Results alone would also be right with a mask of all pairs."""

from typing import Any, NamedTuple

import pytest
import tiny_models
import torch
import transformers
from comparison import NAME

from flash_attn_jit import interface
from flash_attn_jit.integrations.transformers import _attention

# generate() of transformers 4.57 gives a mask of ones where nothing is padded. To see that takes a wait for the device.
GIVES_ONES = transformers.__version__ < "5"

TOKENS = 3


class Call(NamedTuple):
    queries: int
    keys: int
    options: dict[str, Any]

    def bias_shape(self) -> tuple[int, ...] | None:
        bias = self.options.get("attn_bias")
        return None if bias is None else tuple(bias.shape)


@pytest.fixture
def calls(monkeypatch):
    seen: list[Call] = []

    def watch(name: str) -> None:
        theirs = getattr(interface, name)

        def function(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
            seen.append(Call(q.shape[-3], k.shape[-3], options))
            return theirs(q, k, v, **options)

        monkeypatch.setattr(_attention, name, function)

    watch("flash_attn_func")
    watch("flash_attn_varlen_func")
    return seen


def _generate(family: str, padding: str | None, cache: str | None) -> None:
    options = {"max_new_tokens": TOKENS, "do_sample": False, "cache_implementation": cache, "disable_compile": True}
    tiny_models.build(family, NAME).generate(**tiny_models.batch(family, padding), **options)


@pytest.mark.parametrize("padding", [None, "left", "right"])
def test_padding_is_a_mask_of_keys(calls, padding):
    with torch.no_grad():
        tiny_models.build("llama", NAME)(**tiny_models.batch("llama", padding))
    assert [call.bias_shape() for call in calls] == [(2, 1, 1, 16) if padding else None] * 2
    assert all(call.options["causal"] is True for call in calls)


def test_a_window_is_one(calls):
    with torch.no_grad():
        tiny_models.build("mistral, window 8", NAME)(**tiny_models.batch("llama", "left"))
    assert [call.bias_shape() for call in calls] == [(2, 1, 1, 16)] * 2
    assert [call.options["window_size"] for call in calls] == [(7, 7)] * 2


def test_left_padding_in_a_cache_is_a_mask_of_keys(calls):
    _generate("llama", "left", None)
    assert [call.bias_shape() for call in calls[::2]] == [(2, 1, 1, keys) for keys in (16, 17, 18)]


def test_a_cache_without_padding_has_no_mask(calls):
    _generate("llama", None, None)
    expected = [(2, 1, 1, keys) if GIVES_ONES else None for keys in (16, 17, 18)]
    assert [call.bias_shape() for call in calls[::2]] == expected


@pytest.mark.skipif(GIVES_ONES, reason="generate() gives a mask")
def test_a_static_cache_has_lengths(calls):
    _generate("llama", None, "static")
    first, second, third = calls[::2]
    assert (first.queries, first.bias_shape()) == (16, None)
    assert first.keys == 16 or first.options["seqused_k"].tolist() == [16, 16]
    for call, length in ((second, 17), (third, 18)):
        assert (call.queries, call.bias_shape()) == (1, None)
        assert call.options["seqused_k"].tolist() == [length, length]


def test_left_padding_in_a_static_cache(calls):
    _generate("llama", "left", "static")
    first, second, _ = calls[::2]
    assert (first.queries, first.keys, first.bias_shape()) == (16, 16, (2, 1, 1, 16))
    assert second.queries == 1
    assert second.bias_shape() == (2, 1, 1, second.keys)
    assert second.options["attn_bias"].sum(-1).flatten().tolist() == [17, 12]


@pytest.mark.parametrize("use_cache", [False, True])
def test_packed_sequences_are_packed(calls, use_cache):
    positions = torch.cat([torch.arange(n) for n in (5, 9, 2)])[None]
    ids = tiny_models.batch("llama", rows=1)["input_ids"]
    with torch.no_grad():
        tiny_models.build("llama", NAME)(ids, position_ids=positions, use_cache=use_cache)
    for call in calls:
        assert call.options["cu_seqlens_q"].tolist() == [0, 5, 14, 16]
        assert call.options["max_seqlen_k"] == 9


def test_a_chunked_mask_is_of_all_pairs(calls):
    with torch.no_grad():
        tiny_models.build("llama4", NAME)(**tiny_models.batch("llama4"))
    assert [(call.bias_shape(), call.options["causal"]) for call in calls] == [
        ((2, 1, 16, 16), False),
        (None, True),
    ]
