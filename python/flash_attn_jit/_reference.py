"""Attention and its gradients in float64, the yardstick of the bench and the demo."""

from math import sqrt

import torch


def _probabilities(q: torch.Tensor, k: torch.Tensor, causal: bool) -> torch.Tensor:
    scores = q.double() @ k.double().transpose(-1, -2) / sqrt(q.shape[-1])
    if causal:
        seqlen_q, seqlen_k = scores.shape[-2:]
        hidden = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool, device=q.device).triu(1 + seqlen_k - seqlen_q)
        scores = scores.masked_fill(hidden, float("-inf"))
    return torch.softmax(scores, -1)


def reference_heads(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    """q, k, v (heads, seqlen, head_dim) with as many key heads as query heads; the result is float64.

    Causal is aligned bottom-right; every query must see a key.
    """
    return _probabilities(q, k, causal) @ v.double()


def reference_gradients(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor, causal: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq, dk, dv) of reference_heads() for the output's gradient `dout`, head by head."""
    q, k, v, dout = (tensor.double() for tensor in (q, k, v, dout))
    p = _probabilities(q, k, causal)
    dv = p.transpose(-1, -2) @ dout
    dp = dout @ v.transpose(-1, -2)
    ds = p * (dp - (p * dp).sum(-1, keepdim=True)) / sqrt(q.shape[-1])
    return ds @ k, ds.transpose(-1, -2) @ q, dv
