"""What a forward pass of transformers' models tells its layers: made once for all of them, and a tensor that models may
slice, move and pass on. By its dtype:

| what the layers are given | what it says |
| --- | --- |
| None | all keys are seen, but for causality and a window, which the layers know of |
| int8, (batch, 1, 1, keys) | the same of the first `keys` keys |
| uint8, (batch, 1, 1, keys) | the same, and keys that are 0 are hidden |
| int32, (batch, 1, 1, 1) | the same of as many keys as it says of each sequence |
| int32, (1, 1, longest, sequences + 1) | the same within each of some packed sequences: a row is cu_seqlens |
| bool or floats, (batch, 1 or heads, queries, keys) | all that there is to say: no causality, no window besides |
| two dimensions | padding, as the user gave it: of a model that makes no other mask |

Where bool would do it is not taken: what a user or a model made to say all has to be told from what does not.
"""

from typing import Any

import torch

from ...errors import Refusal

FIRST_KEYS = torch.int8
SHOWN_KEYS = torch.uint8
LENGTHS = torch.int32


def read_mask(
    mask: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None, options: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor, int | None]:
    """Puts into a call's options what a mask says.

    Args:
        k: (batch, keys, heads_k, head_dim).
        v: like k.
        window: the layer's.

    Returns:
        k, v and the window, as far as the mask leaves them.
    """
    if mask.dim() == 2:
        mask = mask.to(torch.bool).view(SHOWN_KEYS)[:, None, None, :]
    if mask.dim() != 4:
        raise Refusal("attention_mask", f"has {mask.dim()} dimensions", "None, or 2 or 4").exception()
    kind, last, keys = mask.dtype, mask.shape[3], k.shape[1]
    if kind is LENGTHS:
        options.update({"seqused_k": mask.flatten()} if last == 1 else packed_options(mask[0, 0, 0], mask.shape[2]))
        return k, v, window
    if last > keys:
        mask = mask[..., :keys]
    if kind is SHOWN_KEYS:
        options["attn_bias"] = mask.view(torch.bool)
    elif kind is not FIRST_KEYS:
        options.update(attn_bias=mask, causal=False)
        return k, v, None
    return (k[:, :last], v[:, :last], window) if last < keys else (k, v, window)


def packed_options(cu_seqlens: torch.Tensor, longest: int) -> dict[str, Any]:
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
