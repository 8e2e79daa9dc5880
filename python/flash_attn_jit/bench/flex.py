"""A user's functions inside of the kernel beside what is built in: the same attention, asked for in two ways."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch

from .. import flash_attn_func, flex_attention
from . import timing
from .problem import BACKWARD, FORWARD, Inputs, Problem

_WINDOW = 1024
_SOFTCAP = 30.0
_MOST_ERROR = 2**-7  # of the greatest number: a few roundings of P to float16, and of out to bfloat16

_Call = Callable[..., Any]


class Pair(NamedTuple):
    """``built_in`` and ``users`` take q, k and v, (batch, seqlen, heads, head_dim), and give the same."""

    name: str
    built_in: _Call
    users: _Call


def _flex(score_mod: Any, block_mask: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    out: Any = flex_attention(heads_first[0], heads_first[1], heads_first[2], score_mod, block_mask)
    transposed: torch.Tensor = out.transpose(1, 2)
    return transposed


def _pairs(problem: Problem, device: torch.device) -> Iterator[Pair]:
    from torch.nn.attention.flex_attention import create_block_mask

    slopes = torch.tensor([2.0 ** (-8 * (i + 1) / problem.num_heads) for i in range(problem.num_heads)], device=device)
    mask_of = partial(create_block_mask, B=None, H=None, Q_LEN=problem.seqlen, KV_LEN=problem.seqlen, device=device)
    window = mask_of(lambda b, h, q, k: (q - k <= _WINDOW) & (k - q <= _WINDOW))
    causal = mask_of(lambda b, h, q, k: q >= k)
    yield Pair(
        "alibi",
        partial(flash_attn_func, alibi_slopes=slopes),
        partial(_flex, lambda score, b, h, q, k: score - slopes[h] * (q - k).abs(), None),
    )
    yield Pair(
        "softcap",
        partial(flash_attn_func, softcap=_SOFTCAP),
        partial(_flex, lambda score, b, h, q, k: _SOFTCAP * torch.tanh(score / _SOFTCAP), None),
    )
    yield Pair("causal", partial(flash_attn_func, causal=True), partial(_flex, None, causal))
    yield Pair("window", partial(flash_attn_func, window_size=(_WINDOW, _WINDOW)), partial(_flex, None, window))


def _check(pair: Pair, inputs: Inputs) -> None:
    """That both are the same; the times of others are worth nothing."""
    built_in, users = (call(*(x.detach() for x in inputs.qkv)).float() for call in (pair.built_in, pair.users))
    error, most = (built_in - users).abs().max().item(), built_in.abs().max().item()
    if not error <= _MOST_ERROR * most:
        raise SystemExit(f"{pair.name} as functions of a user is WRONG: {error:.3e} off what is built in.")


def _calls(call: _Call, problem: Problem, which: str) -> list[Callable[[], object]]:
    inputs = problem.inputs(0, BACKWARD)
    if which == FORWARD:
        return [partial(call, *(x.detach() for x in inputs.qkv))]
    out = call(*inputs.qkv)
    return [partial(torch.autograd.grad, out, inputs.qkv, inputs.dout, retain_graph=True)]


def run(problem: Problem, passes: Sequence[str], rounds: int, burst_ms: float) -> Iterator[dict[str, Any]]:
    """A row for each pass and kind of attention: milliseconds of a user's functions, and how many times as long as what
    is built in they take."""
    inputs = problem.inputs(0, FORWARD)
    for pair in _pairs(problem, inputs.qkv[0].device):
        _check(pair, inputs)
        for which in passes:
            ways = {"built_in": pair.built_in, "users": pair.users}
            candidates = [
                timing.Candidate(name, nullcontext, _calls(call, problem, which)) for name, call in ways.items()
            ]
            samples = timing.time_interleaved(candidates, rounds, burst_ms)
            yield {
                "pass": which,
                "backend": pair.name,
                "batch": problem.batch,
                "num_heads": problem.num_heads,
                "head_dim": problem.head_dim,
                "seqlen": problem.seqlen,
                "ms_built_in": median(samples["built_in"]),
                "ms_users": median(samples["users"]),
                "ms_samples": samples,
                "times_as_long": median(samples["users"]) / median(samples["built_in"]),
            }
