"""Attention and its gradients in float64, the yardstick of the bench, the demo and the check."""

from dataclasses import dataclass
from math import sqrt
from typing import NamedTuple

import torch


def _biased(scores: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """With a bias that broadcasts to them, numbers or what is seen; -inf where it hides."""
    if bias is None:
        return scores
    return scores.masked_fill(~bias, float("-inf")) if bias.dtype is torch.bool else scores + bias.double()


def _probabilities(q: torch.Tensor, k: torch.Tensor, causal: bool, bias: torch.Tensor | None) -> torch.Tensor:
    scores = _biased(q.double() @ k.double().transpose(-1, -2) / sqrt(q.shape[-1]), bias)
    if causal:
        seqlen_q, seqlen_k = scores.shape[-2:]
        hidden = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool, device=q.device).triu(1 + seqlen_k - seqlen_q)
        scores = scores.masked_fill(hidden, float("-inf"))
    return torch.softmax(scores, -1)


def reference_heads(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """q, k, v (heads, seqlen, head_dim) with as many key heads as query heads; a bias, numbers or what is seen, that
    broadcasts to (heads, seqlen_q, seqlen_k); the result is float64.

    Causal is aligned bottom-right; every query must see a key.
    """
    return _probabilities(q, k, causal, bias) @ v.double()


def reference_gradients(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dout: torch.Tensor,
    causal: bool,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq, dk, dv) of reference_heads() for the output's gradient `dout`, head by head."""
    q, k, v, dout = (tensor.double() for tensor in (q, k, v, dout))
    p = _probabilities(q, k, causal, bias)
    dv = p.transpose(-1, -2) @ dout
    dp = dout @ v.transpose(-1, -2)
    ds = p * (dp - (p * dp).sum(-1, keepdim=True)) / sqrt(q.shape[-1])
    return ds @ k, ds.transpose(-1, -2) @ q, dv


class Exact(NamedTuple):
    """A result in float64, and by how much float16 and float32 arithmetic may miss each of its elements."""

    value: torch.Tensor
    allowed: torch.Tensor


@dataclass(frozen=True)
class Scores:
    """What is done to the scores. Masks and distances are aligned bottom-right; a negative width of a
    window is no bound."""

    causal: bool = False
    window: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    alibi_slopes: torch.Tensor | None = None  # (num_heads)
    bias: torch.Tensor | None = None  # broadcasts to (num_heads, seqlen_q, seqlen_k): numbers, or what is seen
    s_aux: torch.Tensor | None = None  # (num_heads)
    kept: torch.Tensor | None = None  # (num_heads, seqlen_q, seqlen_k): what dropout multiplies the probabilities by

    def hidden(self, distance: torch.Tensor) -> torch.Tensor:
        """Of a query and a key that are so far apart (the key behind, where it is positive)."""
        left, right = self.window[0], 0 if self.causal else self.window[1]
        hidden = torch.zeros_like(distance, dtype=torch.bool)
        if left >= 0:
            hidden |= distance > left
        if right >= 0:
            hidden |= distance < -right
        return hidden


_HALF = 2.0**-11  # half a unit in the last place of a float16, relative
_BRAIN = 2.0**-9  # of a bfloat16
_LEAST_HALF = 2.0**-24  # twice that of a float16 near 0, absolute
_SCORE = 2.0**-15  # of a probability, for what float32 does to its score
_SAFETY = 2.0  # several roundings come together


def exact_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor, scores: Scores
) -> dict[str, Exact]:
    """out, dq, dk and dv of one sequence, (seqlen, heads, head_dim) each; "dbias", (num_heads, seqlen_q, seqlen_k), of
    which summed_bias() makes a bias's gradient; and ds_aux (heads) where there is s_aux. A query that sees no key has
    out 0.

    What is allowed follows the roundings that the kernels cannot avoid: P and dS become float16, the results the
    inputs' dtype, out before it is multiplied with dout.
    """
    group_size, scale, last_bit = q.shape[1] // k.shape[1], q.shape[2] ** -0.5, _last_bit(q.dtype)
    q, k, v, dout = (x.double().transpose(0, 1) for x in (q, k, v, dout))
    k, v = (x.repeat_interleave(group_size, 0) for x in (k, v))
    s = q @ k.transpose(1, 2) * scale
    slope = torch.ones_like(s)  # of the softcap: what a change of the score makes of one before it
    if scores.softcap:
        bent = torch.tanh(s / scores.softcap)
        s, slope = scores.softcap * bent, 1 - bent * bent
    queries, keys = s.shape[1:]
    distance = (torch.arange(queries)[:, None] + keys - queries - torch.arange(keys)).to(q.device)
    if scores.alibi_slopes is not None:
        s = s - scores.alibi_slopes.double()[:, None, None] * distance.abs()
    s = _biased(s, scores.bias)
    s = s.masked_fill(scores.hidden(distance), float("-inf"))
    if scores.s_aux is not None:  # one key more, whose v is 0
        s = torch.cat([s, scores.s_aux.double()[:, None, None].expand(-1, queries, 1)], -1)
    p, p_sink = torch.softmax(s, -1).nan_to_num(0.0).tensor_split([keys], -1)  # NaN: a row without keys
    seen = (p > 0).double()

    kept = torch.ones_like(p) if scores.kept is None else scores.kept.double()
    out, dv = (p * kept) @ v, (p * kept).transpose(1, 2) @ dout
    dp = kept * (dout @ v.transpose(1, 2))
    delta = (dout * out).sum(-1, keepdim=True)
    dbias = p * (dp - delta)
    ds = dbias * slope
    dq, dk = ds @ k * scale, ds.transpose(1, 2) @ q * scale

    p_error = kept * ((_HALF + _SCORE) * p + _LEAST_HALF * seen)
    delta_error = last_bit * (dout.abs() * out.abs()).sum(-1, keepdim=True)
    dbias_error = p * (delta_error + _SCORE * (dp.abs() + delta.abs()))
    ds_error = _HALF * ds.abs() + slope * dbias_error + _LEAST_HALF * seen
    errors = {
        "out": (out, p_error @ v.abs()),
        "dq": (dq, ds_error @ k.abs() * scale),
        "dk": (dk, ds_error.transpose(1, 2) @ q.abs() * scale),
        "dv": (dv, p_error.transpose(1, 2) @ dout.abs()),
    }
    found = {
        name: _summed(value, error, last_bit, group_size if name in ("dk", "dv") else 1)
        for name, (value, error) in errors.items()
    }
    found["dbias"] = Exact(dbias, dbias_error)
    if scores.s_aux is not None:
        found["ds_aux"] = _of_sinks(p_sink.squeeze(-1), dout * out, p * dp, last_bit)
    return found


def _last_bit(dtype: torch.dtype) -> float:
    """Half of a unit in it, relative."""
    return _BRAIN if dtype is torch.bfloat16 else _HALF


def _of_sinks(p_sink: torch.Tensor, dout_out: torch.Tensor, p_dp: torch.Tensor, last_bit: float) -> Exact:
    """The gradient of each head's sink, of what makes a row's delta: products over dims, or over keys. The roundings of
    out and of P in all rows are many, and make up for each other: independent ones add up to their root sum square."""
    delta = dout_out.sum(-1)
    spread = last_bit * (p_sink.square() * (dout_out.square().sum(-1) + p_dp.square().sum(-1))).sum(-1).sqrt()
    allowed = _SAFETY * (4 * spread + _SCORE * (p_sink * delta.abs()).sum(-1) + _LEAST_HALF)
    return Exact(-(p_sink * delta).sum(-1), allowed)


def summed_bias(sequences: list[Exact], bias: torch.Tensor) -> Exact:
    """The gradient of a bias of 4 dimensions, out of each sequence's dbias."""
    ones = [d for d, size in enumerate(bias.shape) if size == 1]

    def summed(parts: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack(parts).sum(ones, keepdim=True) if ones else torch.stack(parts)

    value = summed([each.value for each in sequences])
    error = summed([each.allowed for each in sequences])
    return Exact(value, _SAFETY * (error + _last_bit(bias.dtype) * value.abs() + _LEAST_HALF))


def allowed_of_out(out: torch.Tensor, weighed: torch.Tensor) -> torch.Tensor:
    """By how much float16 and float32 arithmetic may miss `out`; `weighed` is out of v's absolute values. P is made
    relative to a row's greatest, so that its least numbers, which exact_attention() counts, do not matter."""
    return _SAFETY * ((_HALF + _SCORE) * weighed + _HALF * out.abs() + _LEAST_HALF)


def rounded(value: torch.Tensor) -> Exact:
    """What float16 keeps of sums of a few numbers around 1, which float32 rounds by up to 2^-22 before."""
    return Exact(value, _SAFETY * (_HALF * value.abs() + _LEAST_HALF + 2.0**-22))


def _summed(value: torch.Tensor, error: torch.Tensor, last_bit: float, group_size: int) -> Exact:
    """Over the query heads of each key head; back to (seqlen, heads, head_dim)."""
    value, error = (x.unflatten(0, (-1, group_size)).sum(1).transpose(0, 1) for x in (value, error))
    return Exact(value, _SAFETY * (error + last_bit * value.abs() + _LEAST_HALF))
