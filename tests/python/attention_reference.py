"""Attention in float64, and what float32 with fp16 probabilities would make of it: the bound of every numeric test. out
and gradients are of the inputs' dtype."""

from collections.abc import Iterator, Sequence
from math import exp, isfinite
from typing import Any

import torch

from flash_attn_jit._options import Options

NO_OPTIONS = Options()


def _visible(seqlen_q: int, seqlen_k: int, causal: bool, window_size: Sequence[int]) -> torch.Tensor:
    """(seqlen_q, seqlen_k), bool. Both masks are aligned bottom-right."""
    distance = _distance(seqlen_q, seqlen_k)
    left, right = window_size
    right = 0 if causal else right
    visible = torch.ones_like(distance, dtype=torch.bool)
    if left >= 0:
        visible &= distance <= left
    if right >= 0:
        visible &= distance >= -right
    return visible


def _distance(seqlen_q: int, seqlen_k: int) -> torch.Tensor:
    """i + seqlen_k - seqlen_q - j of query i and key j."""
    return torch.arange(seqlen_q)[:, None] + seqlen_k - seqlen_q - torch.arange(seqlen_k)[None, :]


def _probabilities(
    q: torch.Tensor,
    k: torch.Tensor,
    dtype: torch.dtype,
    causal: bool = False,
    softmax_scale: float | None = None,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    attn_bias: torch.Tensor | None = None,
    s_aux: torch.Tensor | None = None,
    kept: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(exp(s - max), as dropout keeps it, its sum without dropout, log-sum-exp), each over (batch, num_heads, seqlen_q,
    ...)."""
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    group_size = q.shape[2] // k.shape[2]
    keys = k.to(dtype).permute(0, 2, 3, 1).repeat_interleave(group_size, 1)
    scores = q.to(dtype).permute(0, 2, 1, 3) @ keys * scale
    seqlen_q, seqlen_k = scores.shape[-2:]
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        distance = _distance(seqlen_q, seqlen_k).to(q.device)
        scores = scores - alibi_slopes.to(dtype)[..., None, None] * distance.abs()
    if attn_bias is not None:
        scores = (
            scores.masked_fill(~attn_bias, float("-inf"))
            if attn_bias.dtype is torch.bool
            else scores + attn_bias.to(dtype)
        )
    scores = scores.masked_fill(~_visible(seqlen_q, seqlen_k, causal, window_size).to(q.device), float("-inf"))
    if s_aux is not None:  # a key with a v of 0
        sinks = s_aux.to(dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks], -1)
    elif seqlen_k == 0:
        return (
            scores,
            scores.sum(-1, keepdim=True),
            torch.full(scores.shape[:-1], float("inf"), dtype=dtype, device=q.device),
        )
    row_max = scores.amax(-1, keepdim=True)
    row_max = torch.where(row_max == float("-inf"), 0.0, row_max)
    p = torch.exp(scores - row_max)
    row_sum = p.sum(-1, keepdim=True)
    lse = (row_max + torch.log(torch.where(row_sum == 0, 1.0, row_sum))).squeeze(-1)  # differentiable in all rows
    if kept is not None:
        p = p[..., :seqlen_k] * kept.to(dtype)
    return p, row_sum, torch.where(row_sum.squeeze(-1) == 0, float("inf"), lse)


def _times_v(p: torch.Tensor, row_sum: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    p = p[..., : v.shape[1]]  # without the sink's
    group_size = p.shape[1] // v.shape[2]
    values = v.to(p.dtype).permute(0, 2, 1, 3).repeat_interleave(group_size, 1)
    out = (p @ values) / torch.where(row_sum == 0, 1.0, row_sum)
    return out.permute(0, 2, 1, 3)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    causal: bool = False,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, softmax_lse) in float64; q, k, v (batch, seqlen, heads, head_dim), v with its own. Options: softmax_scale,
    window_size, softcap, alibi_slopes, attn_bias, s_aux; kept, what dropout multiplies each probability by."""
    p, row_sum, lse = _probabilities(q, k, torch.float64, causal, **options)
    return _times_v(p, row_sum, v), lse


# By how much the maximum that is subtracted lies below the row's, as a kernel's running maximum does. The bound
# takes the worst of several, because in a small tensor the roundings of any single one are small by luck.
_LAGS = (0.0, 0.1, 0.3, 0.6)


def error_bound(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    causal: bool = False,
    **options: Any,
) -> float:
    """Twice the greatest error of float32 arithmetic that rounds P to fp16 and out to its dtype, plus 1e-5."""
    p, row_sum, _ = _probabilities(q, k, torch.float32, causal, **options)
    exact, _ = attention(q, k, v, causal, **options)
    if exact.numel() == 0:
        return 1e-5
    errors = []
    for lag in _LAGS:
        emulated = _times_v((p * exp(lag)).half().float(), row_sum * exp(lag), v).to(q.dtype)
        errors.append((emulated.double() - exact).abs().max().item())
    return 2 * max(errors) + 1e-5


def check_attention(
    out: torch.Tensor,
    softmax_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    causal: bool = False,
    **options: Any,
) -> None:
    """Asserts that out is within the bound, and softmax_lse within float32's reach of float64."""
    assert out.shape == (*q.shape[:-1], v.shape[-1]) and out.dtype == q.dtype and out.device == q.device
    expected, expected_lse = attention(q, k, v, causal, **options)
    bound = error_bound(q, k, v, causal, **options)
    assert isfinite(bound)
    if out.numel():
        assert (out.double() - expected).abs().max().item() <= bound
    if softmax_lse is not None:
        assert softmax_lse.shape == (q.shape[0], q.shape[2], q.shape[1])
        assert softmax_lse.dtype == torch.float32
        torch.testing.assert_close(softmax_lse.double(), expected_lse.to(softmax_lse.device), atol=2e-5, rtol=1e-5)


def exact_gradients(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor, **arguments: Any
) -> Sequence[torch.Tensor]:
    """(dq, dk, dv) in float64, by autograd through attention()."""
    q, k, v = (x.detach().double().requires_grad_() for x in (q, k, v))
    out, _ = attention(q, k, v, **arguments)
    return torch.autograd.grad(out, (q, k, v), dout.double())


def _of_sequence(bias: torch.Tensor, number: int, seqlen_q: int, seqlen_k: int) -> torch.Tensor:
    """Of a bias for the longest sequences, what one of them sees."""
    bias = bias[(None,) * (4 - bias.dim())]
    bias = bias[number if bias.shape[0] > 1 else 0]
    return bias[:, : seqlen_q if bias.shape[1] > 1 else 1, : seqlen_k if bias.shape[2] > 1 else 1]


def sequences(
    cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor, **options: Any
) -> Iterator[tuple[slice, slice, dict[str, Any]]]:
    """(rows of q, rows of k and v, options) of each sequence of a varlen batch."""
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for b in range(len(starts_q) - 1):
        own = dict(options)
        slopes = own.get("alibi_slopes")
        if slopes is not None and slopes.dim() == 2:
            own["alibi_slopes"] = slopes[b]
        bias = own.get("attn_bias")
        if bias is not None:
            lengths = starts_q[b + 1] - starts_q[b], starts_k[b + 1] - starts_k[b]
            own["attn_bias"] = _of_sequence(bias, b, *lengths)
        kept = own.get("kept")
        if kept is not None:
            lengths = starts_q[b + 1] - starts_q[b], starts_k[b + 1] - starts_k[b]
            own["kept"] = _of_sequence(kept, b, *lengths)
        yield slice(starts_q[b], starts_q[b + 1]), slice(starts_k[b], starts_k[b + 1]), own


def varlen_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """attention() of each sequence: out (total_q, heads, head_dim), softmax_lse (heads, total_q)."""
    parts = [
        attention(q[rows][None], k[keys][None], v[keys][None], **own)
        for rows, keys, own in sequences(cu_seqlens_q, cu_seqlens_k, **options)
    ]
    return torch.cat([out[0] for out, _ in parts]), torch.cat([lse[0] for _, lse in parts], 1)


def check_varlen_attention(
    out: torch.Tensor,
    softmax_lse: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    **options: Any,
) -> None:
    assert out.shape == (*q.shape[:-1], v.shape[-1]) and softmax_lse.shape == (q.shape[1], q.shape[0])
    for rows, keys, own in sequences(cu_seqlens_q, cu_seqlens_k, **options):
        check_attention(out[rows][None], softmax_lse[:, rows][None], q[rows][None], k[keys][None], v[keys][None], **own)


def exact_varlen_gradients(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dout: torch.Tensor,
    *cu_seqlens: torch.Tensor,
    **options: Any,
) -> Sequence[torch.Tensor]:
    """(dq, dk, dv) in float64, by autograd through varlen_attention()."""
    inputs = [x.detach().double().requires_grad_() for x in (q, k, v)]
    out, _ = varlen_attention(*inputs, *cu_seqlens, **options)
    return torch.autograd.grad(out, inputs, dout.double())


def delta_errors(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor, **arguments: Any
) -> Sequence[float]:
    """How far dq, dk and dv are off, at most, because delta is made of out as it was rounded to q's dtype."""
    dtype = q.dtype
    q, k, v = (x.detach().double().requires_grad_() for x in (q, k, v))
    out, lse = attention(q, k, v, **arguments)
    error = ((out.to(dtype).double() - out) * dout.double()).sum(-1).transpose(1, 2).detach()
    # P is the derivative of lse by the scores.
    dq, dk = torch.autograd.grad((lse.where(lse.isfinite(), 0.0) * error).sum(), (q, k))
    return dq.abs().max().item(), dk.abs().max().item(), 0.0


def check_gradients(
    gradients: Sequence[torch.Tensor],
    expected: Sequence[torch.Tensor],
    dtype: torch.dtype = torch.float16,
    of_delta: Sequence[float] = (0.0, 0.0, 0.0),
) -> None:
    """`of_delta`: delta_errors()."""
    for got, exact, error in zip(gradients, expected, of_delta):
        assert got.shape == exact.shape and got.dtype == dtype
        if not exact.numel():
            continue
        # P, dS and the gradients are rounded to fp16, 11 bits; a gradient sums some of them. bfloat16 has 8.
        largest = exact.abs().max().item()
        bound = 4 * 2**-11 * largest + 1e-4 + 2 * error + (0 if dtype is torch.float16 else 2**-8 * largest)
        assert (got.double() - exact).abs().max().item() <= bound


def head_dims() -> Sequence[int]:
    """The least and the greatest head dim of every class that the kernels tell apart: rows that can be read 16 bytes at
    a time (8), how many of an operand load's 32 dims are left in the last one, a last dim alone in its pair, and above
    128, where gradients are split and their halves have a rest of their own."""
    classes: dict[tuple[bool, bool, bool, int], list[int]] = {}
    for d in range(1, 257):
        eights = -(-d // 8)
        rest = eights % 2 if d % 8 else eights % 8 if d > 128 else eights % 4
        key = (d % 8 == 0, d % 2 == 0, d > 128, rest)
        classes.setdefault(key, []).append(d)
    return sorted({d for members in classes.values() for d in (members[0], members[-1])})


def normal(*shape: int, seed: int = 0, device: str = "cpu") -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device, torch.float16)


def leaves(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Copies that need gradients."""
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


def normal_qkv(
    batch: int,
    seqlen_q: int,
    seqlen_k: int,
    num_heads: int,
    num_heads_k: int,
    head_dim: int,
    device: str = "cpu",
    head_dim_v: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        normal(batch, seqlen_q, num_heads, head_dim, seed=1, device=device),
        normal(batch, seqlen_k, num_heads_k, head_dim, seed=2, device=device),
        normal(batch, seqlen_k, num_heads_k, head_dim_v or head_dim, seed=3, device=device),
    )
