"""What a forward pass of transformers' models tells its layers: made once for all of them, and a tensor that models may
slice, move and pass on. By its dtype:

| what the layers are given | what it says |
| --- | --- |
| None | all keys are seen, but for causality and a window, which the layers know of |
| uint8, (batch, 1, 1, keys) | of the first `keys` keys those that are 0 are hidden; causal, and the layer's window |
| int8, (batch, 1, 1, keys) | the same, not causal |
| int16, (batch, 1, 1, keys) | the first `keys` keys; causal, and the layer's window |
| int32, (batch, 1, 1, 1) | as many keys as it says of each sequence; causal, and the layer's window |
| int32, (1, 1, longest, sequences + 1) | the same in each of some packed sequences: a row is cu_seqlens |
| bool or floats, (batch, 1 or heads, queries, keys) | all that there is to say: no causality, no window besides |
| two dimensions | padding, as the user gave it: of a model that makes no other mask |

Where bool would do it is not taken: what a user or a model made to say all has to be told from what does not. They say
whether they are causal because layers do not: some say that they are not as soon as there is a mask.
"""

from typing import Any

import torch

from ..._dtypes import HALVES
from ...errors import Refusal

CAUSAL_SHOWN = torch.uint8
SHOWN = torch.int8
CAUSAL_FIRST = torch.int16
CAUSAL_LENGTHS = torch.int32
_MADE_HERE = (CAUSAL_SHOWN, SHOWN, CAUSAL_FIRST, CAUSAL_LENGTHS)
_WHOLE = (torch.bool, torch.float32, *HALVES)
_WHOLE_TEXT = "torch.bool, torch.float32 or query's dtype where it has 4 dimensions, (batch, 1 or heads, queries, keys)"


def read_mask(
    mask: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None, options: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor, int | None]:
    """Puts into a call's options what a mask says.

    Args:
        q: (batch, queries, heads, head_dim).
        k: (batch, keys, heads_k, head_dim).
        v: like k.
        window: the layer's.

    Returns:
        k, v and the window, as far as the mask leaves them.
    """
    if mask.dim() != 4:
        return (*_read_padding(mask, k, v, options), window)
    kind, last, keys = mask.dtype, mask.shape[3], k.shape[1]
    if kind not in _WHOLE and (kind not in _MADE_HERE or _is_of_pairs(mask, q, k)):
        raise Refusal("attention_mask", f"has dtype {kind}", _WHOLE_TEXT, "Cast it: mask.bool()").exception()
    if kind is CAUSAL_LENGTHS:
        options["causal"] = True
        options.update({"seqused_k": mask.flatten()} if last == 1 else packed_options(mask))
        return k, v, window
    if last > keys:
        mask = mask[..., :keys]
    if kind is CAUSAL_SHOWN or kind is SHOWN:
        options.update(attn_bias=mask.view(torch.bool), causal=kind is CAUSAL_SHOWN)
    elif kind is CAUSAL_FIRST:
        options["causal"] = True
    else:
        options.update(attn_bias=mask, causal=False)
        return k, v, None
    return (k[:, :last], v[:, :last], window) if last < keys else (k, v, window)


def _is_of_pairs(mask: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> bool:
    """Whether it is a user's, who has a number for each pair of the batch. Of those made here a mask of keys has one
    row, and one of packed sequences no batch, and fewer columns than there are keys where it has a row for each query.
    """
    queries = q.shape[1]
    return queries > 1 and mask.shape[0] == q.shape[0] and mask.shape[2:] == (queries, k.shape[1])


def _read_padding(
    mask: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    if mask.dim() != 2:
        raise Refusal("attention_mask", f"has {mask.dim()} dimensions", "None, or 2 or 4").exception()
    keys = min(mask.shape[1], k.shape[1])
    options["attn_bias"] = mask[:, None, None, :keys].to(torch.bool)
    return k[:, :keys], v[:, :keys]


def packed_options(mask: torch.Tensor) -> dict[str, Any]:
    cu_seqlens, longest = mask[0, 0, 0], mask.shape[2]
    return {
        "cu_seqlens_q": cu_seqlens,
        "cu_seqlens_k": cu_seqlens,
        "max_seqlen_q": longest,
        "max_seqlen_k": longest,
    }


def join_position_bias(position_bias: torch.Tensor, k: torch.Tensor, options: dict[str, Any]) -> None:
    """Puts it into a call's options, with the mask that is there."""
    if "cu_seqlens_q" in options:
        came = "is given for packed sequences"
        advice = "Give the sequences as a batch, with an attention_mask"
        raise Refusal("position_bias", came, "None", advice, NotImplementedError).exception()
    bias, mask = position_bias[..., : k.shape[1]], options.get("attn_bias")
    if mask is not None:
        bias = torch.where(mask, bias, -torch.inf) if mask.dtype is torch.bool else bias + mask
    options["attn_bias"] = bias
