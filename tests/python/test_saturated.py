"""Scores so large that one key takes nearly all of a row: as exact as PyTorch's flash kernel, forward and backward,
whatever their size. A softmax_scale that is a power of 2 is a case of its own: that kernel's log-sum-exp is then the
greatest score without rounding, and its dv as exact as fp16."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from attention_reference import attention, exact_gradients, normal

from flash_attn_jit import flash_attn_func

NAMES = ("out", "dq", "dk", "dv")
BATCH = 16  # in a single sequence either error may be small by luck


def problem(amplitude: float, device: str = "cpu", seqlen: int = 64) -> Sequence[torch.Tensor]:
    """(q, k, v, dout): q and k of N(0, 1) times `amplitude`, one head of 64."""
    factors = (amplitude, amplitude, 1, 1)
    return [
        (torch.randn(BATCH, seqlen, 1, 64, generator=torch.Generator().manual_seed(i)) * factor).to(
            device, torch.float16
        )
        for i, factor in enumerate(factors)
    ]


def ours(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor, scale: float) -> Sequence[torch.Tensor]:
    q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
    out = flash_attn_func(q, k, v, softmax_scale=scale)
    assert isinstance(out, torch.Tensor)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), dout)]


def flash(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor, scale: float
) -> Sequence[torch.Tensor]:
    """What PyTorch's flash kernel rounds, in float32: the maximum is subtracted from the product with the scale, both
    rounded, so that its p is 1; p and dS are rounded to fp16, the log-sum-exp to float32."""
    q, k, v, dout = (t[:, :, 0].float() for t in (q, k, v, dout))
    scores = torch.zeros(len(q), q.shape[1], k.shape[1])
    for d in range(64):  # the interpreter's order
        scores += q[..., d : d + 1] * k[..., d : d + 1].mT
    scaled = scores * torch.tensor(scale * math.log2(math.e), dtype=torch.float32)
    row_max = scaled.amax(-1, keepdim=True)
    p = torch.exp2(scaled - row_max)
    row_sum = p.sum(-1, keepdim=True)
    out = (p.half().float() @ v / row_sum).half()
    lse = scores.amax(-1, keepdim=True) * scale + torch.log(row_sum)
    p = torch.exp2(scaled - lse * math.log2(math.e))
    delta = (dout * out.float()).sum(-1, keepdim=True)
    ds = (p * (dout @ v.mT - delta)).half().float()
    gradients = (ds @ k * scale, ds.mT @ q * scale, p.half().float().mT @ dout)
    return [t.half()[:, :, None] for t in (out, *gradients)]


def errors(results: Sequence[torch.Tensor], exact: Sequence[torch.Tensor]) -> dict[str, float]:
    """The greatest error of each over its greatest true value, or over 1 where that is less."""
    return {
        name: (got.double() - true).abs().max().item() / max(1.0, true.abs().max().item())
        for name, got, true in zip(NAMES, results, exact)
    }


def check(amplitude: float, scale: float, theirs: Any, device: str = "cpu", seqlen: int = 64) -> None:
    """The greatest errors here, against twice those of `theirs`."""
    q, k, v, dout = problem(amplitude, device, seqlen)
    out, _ = attention(q, k, v, softmax_scale=scale)
    exact = [out, *exact_gradients(q, k, v, dout, softmax_scale=scale)]
    got, bound = (errors(run(q, k, v, dout, scale), exact) for run in (ours, theirs))
    print(f"amplitude {amplitude}, scale {scale}:", {name: (got[name], bound[name]) for name in NAMES})
    for name in NAMES:
        assert got[name] <= 2 * bound[name], (name, got[name], bound[name])


AMPLITUDES = [1, 10, 40, 70, 100, 200, 500]


@pytest.mark.parametrize("scale", [0.125, 0.11])
@pytest.mark.parametrize("amplitude", AMPLITUDES)
def test_as_exact_as_flash(amplitude, scale):
    check(amplitude, scale, flash)


@pytest.mark.parametrize("value", [1e3, 3e3])
def test_equal_scores(value):
    """Of 8e6 and 7e7: no key is preferred, however coarse the rounding of all."""
    q = torch.full((1, 4, 1, 64), value, dtype=torch.float16)
    v = normal(1, 4, 1, 64)
    out = flash_attn_func(q, q, v)
    assert (out.double() - v.double().mean(1, keepdim=True)).abs().max() <= 2**-11 * v.abs().max()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no NVIDIA GPU")
@pytest.mark.parametrize("scale", [0.125, 0.11])
@pytest.mark.parametrize("amplitude", [a for a in AMPLITUDES if a <= 200])  # scores to 100,000
@pytest.mark.parametrize("seqlen", [64, 500])
def test_as_exact_as_pytorchs_flash_kernel(amplitude, scale, seqlen):
    def theirs(q, k, v, dout, scale):
        inputs = [t.detach().requires_grad_() for t in (q, k, v)]
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
            out = torch.nn.functional.scaled_dot_product_attention(*(t.transpose(1, 2) for t in inputs), scale=scale)
        out = out.transpose(1, 2)
        return [out.detach(), *torch.autograd.grad(out, inputs, dout)]

    check(amplitude, scale, theirs, "cuda", seqlen)
