"""The attention function of transformers' AttentionInterface."""

from typing import Any

import torch

from ..._call_counts import CallCounts
from ..._dtypes import HALVES
from ..._sdpa import ACCEPTED_WITH_GRADIENTS, MOST_HEAD_DIM, MOST_HEAD_DIM_OF_GRADIENTS, need_gradient
from ...errors import Refusal, UnsupportedError
from ...interface import flash_attn_func, flash_attn_varlen_func
from . import _fallback
from ._inputs import cast, refuse_others
from ._kinds import join_position_bias, packed_options, read_mask
from ._packed import find_packed

calls = CallCounts("transformers")


def turing_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    max_length_q: int | torch.Tensor | None = None,
    max_length_k: int | torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one layer.

    Args:
        module: the layer, whose is_causal holds where the argument is None.
        query: (batch, heads, queries, head_dim), float16 or bfloat16; or float32 where the layer's weights are one of
            these.
        key: (batch, heads_k, keys, head_dim).
        value: (batch, heads_k, keys, head_dim of its own).
        attention_mask: see _kinds.
        sliding_window: how many keys a query sees, with its own: to either side where not causal.
        s_aux: (heads): sinks.
        position_bias: (1 or batch, heads, queries, keys): added to the scores. Has a gradient.
        position_ids: (batch, queries): where they begin anew in a batch of 1, it is sequences that are packed.
        cu_seq_lens_q: of packed sequences, with those after it.

    Returns:
        out (batch, queries, heads, value's head_dim), of the dtype that was computed in, and None for the
        probabilities. Of head dims over 512, over 256 where an input needs a gradient, PyTorch's attention makes it,
        which is counted; not with softcap, sinks or packed sequences.

    Raises:
        ValueError, UnsupportedError, NotImplementedError: what cannot run here; says what to do.
    """
    if others:
        refuse_others(others)
    if not (query.dtype is key.dtype is value.dtype and query.dtype in HALVES):
        query, key, value = cast(module, query, key, value)
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    options: dict[str, Any] = {"dropout_p": dropout, "softmax_scale": scaling, "causal": causal}

    if attention_mask is None:
        if cu_seq_lens_q is not None:
            options.update(
                cu_seqlens_q=cu_seq_lens_q,
                cu_seqlens_k=cu_seq_lens_k,
                max_seqlen_q=max_length_q,
                max_seqlen_k=max_length_k,
            )
        elif position_ids is not None and (mask := find_packed(position_ids, q, k, module)) is not None:
            options.update(packed_options(mask))
    else:
        k, v, sliding_window = read_mask(attention_mask, q, k, v, sliding_window, options)
    if position_bias is not None:
        join_position_bias(position_bias, k, options)
    if sliding_window is not None and k.shape[1] > sliding_window:
        options["window_size"] = (sliding_window - 1, sliding_window - 1)
    if softcap:
        options["softcap"] = softcap
    if s_aux is not None:
        options["s_aux"] = s_aux
    refusal = _head_dim_refusal(q, k, v, options) if max(q.shape[3], v.shape[3]) > MOST_HEAD_DIM_OF_GRADIENTS else None
    if refusal is not None:
        _fallback.refuse_what_torch_lacks(refusal, options)
        calls.count(str(refusal.exception()))
        out: Any = _fallback.run(q, k, v, options)
    else:
        out = _run_packed(q, k, v, options) if "cu_seqlens_q" in options else flash_attn_func(q, k, v, **options)
        calls.count()
    return out, None


def _head_dim_refusal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: dict[str, Any]) -> Refusal | None:
    """Of head dims above those that have a backward pass."""
    came = f"is {q.shape[3]}"
    if q.shape[3] != v.shape[3]:
        accepted = f"query's and value's alike, or 1 to {MOST_HEAD_DIM_OF_GRADIENTS}"
        return Refusal("head_dim", f"{came}, value's {v.shape[3]}", accepted, error=UnsupportedError)
    if q.shape[3] > MOST_HEAD_DIM:
        return Refusal("head_dim", came, f"1 to {MOST_HEAD_DIM}", error=UnsupportedError)
    if need_gradient(q, k, v, options.get("attn_bias"), options.get("s_aux")):
        came += ", and an input needs a gradient"
        return Refusal("head_dim", came, ACCEPTED_WITH_GRADIENTS, error=UnsupportedError)
    return None


def _run_packed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
    for name in ("cu_seqlens_q", "cu_seqlens_k"):
        options[name] = options[name].to(torch.int32)
    rows: Any = flash_attn_varlen_func(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), **options)
    out: torch.Tensor = rows.view(q.shape)
    return out
