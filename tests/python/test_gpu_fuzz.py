"""Random legal problems on a GPU, both passes, against float64, with watched memory around every tensor that a kernel
writes: `pytest -m gpu`. The problems are the same at every run."""

import random

import pytest
import torch
from attention_reference import (
    check_attention,
    check_gradients,
    check_varlen_attention,
    exact_gradients,
    exact_varlen_gradients,
    normal,
)

from flash_attn_jit import _core
from flash_attn_jit._options import Options

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no NVIDIA GPU"),
]

PATTERN = 0x7E5A  # a NaN that arithmetic does not make
MARGIN = 512  # elements on each side


class Watched:
    """A float16 tensor with `gap` elements between its heads, in memory whose every other element is watched."""

    def __init__(self, shape, gap):
        *rows, heads, dim = shape
        elements = torch.Size(rows).numel() * heads * (dim + gap)
        self.memory = torch.full((elements + 2 * MARGIN,), PATTERN, dtype=torch.int16, device="cuda")
        whole = self.memory[MARGIN : MARGIN + elements].view(torch.float16).view(*rows, heads, dim + gap)
        self.tensor = whole[..., :dim]

    def check(self):
        ours = self.tensor.clone()
        self.tensor.view(torch.int16).fill_(PATTERN)
        assert (self.memory == PATTERN).all(), "memory outside the tensor has changed"
        self.tensor.copy_(ours)


def draw(dice):
    step = dice.choice([1, 8, 16])
    problem = {
        "head_dim": step * dice.randint(1, 256 // step),
        "heads_k": dice.randint(1, 3),
        "group": dice.randint(1, 5),
        "gap": dice.choice([0, 0, 8, 3]),
        "softmax_scale": dice.choice([None, None, 0.25, -0.125]),
        "causal": dice.random() < 0.4,
        "window_size": dice.choice([(-1, -1), (-1, -1), (dice.randint(-1, 300), dice.randint(-1, 300))]),
        "softcap": dice.choice([0.0, 0.0, 5.0, 30.0]),
        "alibi": dice.random() < 0.3,
        "varlen": dice.random() < 0.4,
    }
    batch = dice.randint(1, 3)
    if problem["varlen"]:
        problem["lengths"] = [(dice.randint(0, 400), dice.randint(0, 400)) for _ in range(batch)]
    else:
        problem["lengths"] = [(dice.randint(1, 600), dice.randint(1, 600))] * batch
    problem["head_dim_v"] = dice.choice([problem["head_dim"], step * dice.randint(1, 256 // step)])
    return problem


@pytest.mark.parametrize("number", range(60))
def test_random_problem(number):
    dice = random.Random(number)
    p = draw(dice)
    heads, heads_k, dim, dim_v = p["heads_k"] * p["group"], p["heads_k"], p["head_dim"], p["head_dim_v"]
    rows_q, rows_k = ([sum(side)] if p["varlen"] else [len(side), side[0]] for side in zip(*p["lengths"]))
    shape_q, shape_k = (*rows_q, heads, dim), (*rows_k, heads_k, dim)
    shape_out, shape_v = (*rows_q, heads, dim_v), (*rows_k, heads_k, dim_v)
    out, dq, dk, dv = (Watched(shape, p["gap"]) for shape in (shape_out, shape_q, shape_k, shape_v))
    q, k, v, dout = (
        normal(*shape, seed=seed, device="cuda")
        for seed, shape in enumerate((shape_q, shape_k, shape_v, shape_out), 10 * number)
    )
    left, right = p["window_size"]
    right = 0 if p["causal"] else right
    slopes = torch.rand(len(p["lengths"]), heads, device="cuda") if p["alibi"] else None
    cu_seqlens, longest = (None, None), (0, 0)
    if p["varlen"]:
        cu_seqlens = tuple(
            torch.tensor([0, *side], dtype=torch.int32, device="cuda").cumsum(0, dtype=torch.int32)
            for side in zip(*p["lengths"])
        )
        longest = tuple(max(side) for side in zip(*p["lengths"]))
    options = Options(
        softmax_scale=p["softmax_scale"],
        causal=p["causal"],
        window_left=left,
        window_right=right,
        softcap=p["softcap"],
        alibi_slopes=slopes,
        cu_seqlens_q=cu_seqlens[0],
        cu_seqlens_k=cu_seqlens[1],
        max_seqlen_q=longest[0],
        max_seqlen_k=longest[1],
    )

    lse_shape = (heads, rows_q[0]) if p["varlen"] else (rows_q[0], heads, rows_q[1])
    softmax_lse = torch.full(lse_shape, float("nan"), device="cuda")
    _core.forward(q, k, v, out.tensor, softmax_lse, options)
    delta = torch.full_like(softmax_lse, float("nan"))
    gradients = dq.tensor, dk.tensor, dv.tensor
    _core.backward(dout, q, k, v, out.tensor, softmax_lse, None, *gradients, None, delta, None, options)

    named = {name: p[name] for name in ("softmax_scale", "causal", "window_size", "softcap")}
    named["alibi_slopes"] = slopes
    if p["varlen"]:
        check_varlen_attention(out.tensor, softmax_lse, q, k, v, *cu_seqlens, **named)
        exact = exact_varlen_gradients(q, k, v, dout, *cu_seqlens, **named)
    else:
        check_attention(out.tensor, softmax_lse, q, k, v, **named)
        exact = exact_gradients(q, k, v, dout, **named)
    check_gradients((dq.tensor, dk.tensor, dv.tensor), exact)
    for tensor in (out, dq, dk, dv):
        tensor.check()
