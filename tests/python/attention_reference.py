"""Attention in float64, and what float32 with fp16 probabilities would make of it: the bound of every numeric test."""

from math import exp
from typing import Any, Optional, Sequence, Tuple

import torch


def _probabilities(
    q: torch.Tensor, k: torch.Tensor, scale: float, causal: bool, dtype: torch.dtype
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(exp(s - max), its sum, log-sum-exp), each over (batch, num_heads, seqlen_q, ...)."""
    group_size = q.shape[2] // k.shape[2]
    keys = k.to(dtype).permute(0, 2, 3, 1).repeat_interleave(group_size, 1)
    scores = q.to(dtype).permute(0, 2, 1, 3) @ keys * scale
    seqlen_q, seqlen_k = scores.shape[-2:]
    if causal:
        i = torch.arange(seqlen_q, device=q.device)[:, None]
        j = torch.arange(seqlen_k, device=q.device)[None, :]
        scores = scores.masked_fill(j > i + seqlen_k - seqlen_q, float("-inf"))
    if seqlen_k == 0:
        return (
            scores,
            scores.sum(-1, keepdim=True),
            torch.full(scores.shape[:-1], float("inf"), dtype=dtype, device=q.device),
        )
    row_max = scores.amax(-1, keepdim=True)
    row_max = torch.where(row_max == float("-inf"), 0.0, row_max)
    p = torch.exp(scores - row_max)
    row_sum = p.sum(-1, keepdim=True)
    lse = (row_max + torch.log(row_sum)).squeeze(-1)
    return p, row_sum, torch.where(row_sum.squeeze(-1) == 0, float("inf"), lse)


def _times_v(p: torch.Tensor, row_sum: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    group_size = p.shape[1] // v.shape[2]
    values = v.to(p.dtype).permute(0, 2, 1, 3).repeat_interleave(group_size, 1)
    out = (p @ values) / torch.where(row_sum == 0, 1.0, row_sum)
    return out.permute(0, 2, 1, 3)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    causal: bool = False,
    softmax_scale: Optional[float] = None,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """(out, softmax_lse) in float64; q, k, v (batch, seqlen, heads, head_dim)."""
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    p, row_sum, lse = _probabilities(q, k, scale, causal, torch.float64)
    return _times_v(p, row_sum, v), lse


# By how much the maximum that is subtracted lies below the row's, as a kernel's running maximum does. The bound
# takes the worst of several, because in a small tensor the roundings of any single one are small by luck.
_LAGS = (0.0, 0.1, 0.3, 0.6)


def error_bound(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    causal: bool = False,
    softmax_scale: Optional[float] = None,
) -> float:
    """Twice the greatest error of float32 arithmetic that rounds P and out to fp16, plus 1e-5."""
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    p, row_sum, _ = _probabilities(q, k, scale, causal, torch.float32)
    exact, _ = attention(q, k, v, causal, softmax_scale)
    if exact.numel() == 0:
        return 1e-5
    errors = []
    for lag in _LAGS:
        emulated = _times_v((p * exp(lag)).half().float(), row_sum * exp(lag), v).half()
        errors.append((emulated.double() - exact).abs().max().item())
    return 2 * max(errors) + 1e-5


def check_attention(
    out: torch.Tensor,
    softmax_lse: Optional[torch.Tensor],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    causal: bool = False,
    softmax_scale: Optional[float] = None,
) -> None:
    """Asserts that out is within the bound, and softmax_lse within float32's reach of float64."""
    assert out.shape == q.shape and out.dtype == torch.float16 and out.device == q.device
    expected, expected_lse = attention(q, k, v, causal, softmax_scale)
    if out.numel():
        error = (out.double() - expected).abs().max().item()
        assert error <= error_bound(q, k, v, causal, softmax_scale)
    if softmax_lse is not None:
        assert softmax_lse.shape == (q.shape[0], q.shape[2], q.shape[1])
        assert softmax_lse.dtype == torch.float32
        torch.testing.assert_close(
            softmax_lse.double(), expected_lse.to(softmax_lse.device), atol=2e-5, rtol=1e-5
        )


def exact_gradients(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor, **arguments: Any
) -> Sequence[torch.Tensor]:
    """(dq, dk, dv) in float64, by autograd through attention()."""
    inputs = [x.detach().double().requires_grad_() for x in (q, k, v)]
    out, _ = attention(*inputs, **arguments)
    return torch.autograd.grad(out, inputs, dout.double())


def check_gradients(gradients: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> None:
    for got, exact in zip(gradients, expected):
        assert got.shape == exact.shape and got.dtype == torch.float16
        # P, dS and the gradients are rounded to fp16, 11 bits; a gradient sums some of them.
        bound = 4 * 2**-11 * exact.abs().max().item() + 1e-4
        assert (got.double() - exact).abs().max().item() <= bound


def normal(*shape: int, seed: int = 0, device: str = "cpu") -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device, torch.float16)


def normal_qkv(
    batch: int,
    seqlen_q: int,
    seqlen_k: int,
    num_heads: int,
    num_heads_k: int,
    head_dim: int,
    device: str = "cpu",
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        normal(batch, seqlen_q, num_heads, head_dim, seed=1, device=device),
        normal(batch, seqlen_k, num_heads_k, head_dim, seed=2, device=device),
        normal(batch, seqlen_k, num_heads_k, head_dim, seed=3, device=device),
    )
