"""PyTorch's attention, for head dims that the kernels do not have."""

from typing import Any

import torch
import torch.nn.functional as F

from ...errors import Refusal

# Of a call's options, those that PyTorch's attention has nothing for, in words.
_WITHOUT = {"softcap": "softcap", "s_aux": "sinks", "cu_seqlens_q": "packed sequences"}


def refuse_what_torch_lacks(refusal: Refusal, options: dict[str, Any]) -> None:
    """What is refused here, where PyTorch cannot run it in its place."""
    lacks = [words for name, words in _WITHOUT.items() if name in options]
    if lacks:
        came = f"{refusal.came}, with {' and '.join(lacks)}, which PyTorch's attention has not either"
        raise refusal._replace(came=came, advice='Load the model with attn_implementation="eager"').exception()


def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
    """flash_attn_func's result.

    Args:
        q: (batch, queries, heads, head_dim).
        k: (batch, keys, heads_k, head_dim).
        v: like k, with a head_dim of its own.
        options: flash_attn_func's.
    """
    groups = q.shape[2] // k.shape[2]  # expanded here: before torch 2.5 its attention takes no grouped heads
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2).repeat_interleave(groups, 1),
        v.transpose(1, 2).repeat_interleave(groups, 1),
        attn_mask=_mask(q, k, options),
        dropout_p=options["dropout_p"],
        scale=options["softmax_scale"],
    )
    return out.transpose(1, 2).contiguous()


def _mask(q: torch.Tensor, k: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
    queries, keys = q.shape[1], k.shape[1]
    lengths = options.get("seqused_k")
    seen: Any = keys if lengths is None else lengths.view(-1, 1, 1, 1)
    place = torch.arange(queries, device=q.device)[:, None] + seen - queries
    key = torch.arange(keys, device=q.device).expand(1, 1, queries, keys)
    shown: torch.Tensor = key < seen
    left, right = options.get("window_size", (-1, -1))
    if left >= 0:
        shown = shown & (key >= place - left)
    if options["causal"]:
        shown = shown & (key <= place)
    elif right >= 0:
        shown = shown & (key <= place + right)
    bias: torch.Tensor | None = options.get("attn_bias")
    if bias is None:
        return shown
    return shown & bias if bias.dtype is torch.bool else torch.where(shown, bias, -torch.inf).to(q.dtype)
