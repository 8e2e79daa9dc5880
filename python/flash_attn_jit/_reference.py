"""Attention in float64, the yardstick of the bench and the demo."""

from math import sqrt

import torch


def reference_heads(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    """q, k, v (heads, seqlen, head_dim) with as many key heads as query heads; the result is float64.

    Causal is aligned bottom-right; every query must see a key.
    """
    scores = q.double() @ k.double().transpose(-1, -2) / sqrt(q.shape[-1])
    if causal:
        seqlen_q, seqlen_k = scores.shape[-2:]
        hidden = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool, device=q.device).triu(
            1 + seqlen_k - seqlen_q
        )
        scores.masked_fill_(hidden, float("-inf"))
    return torch.softmax(scores, -1) @ v.double()
