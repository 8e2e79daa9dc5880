"""A call of attention as a library makes it: run here where it can, and counted either way."""

from typing import Any, NamedTuple

import torch

from .._arguments import number
from .._autograd import attention as attention_heads_second, attention_heads_first
from .._call_counts import CallCounts
from .._options import Options
from .._sdpa import attention as sdpa_attention, find_refusal, refusal_of, refusal_where_others_are_better
from ..errors import Refusal

_float16 = torch.float16
_is_compiling = torch.compiler.is_compiling


class Call(NamedTuple):
    """The arguments of ``sdpa()``. A library may have heads and sequence the other way round."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    attn_mask: Any = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False


def attempt(counts: CallCounts, call: Call, heads_first: bool) -> torch.Tensor | None:
    """What sdpa() gives; None where these kernels cannot take the call, which then is counted with the reason.

    The tensors are (batch, heads, seqlen, head_dim), or (batch, seqlen, heads, head_dim) where not heads_first, and so
    is the result. attn_mask broadcasts to (batch, heads, seqlen_q, seqlen_k) with either."""
    refusal = None
    try:
        if _is_simple(call, heads_first):
            return _run(call, heads_first)
        as_sdpa = call if heads_first else _transposed(call)
        refusal = _ask(as_sdpa)
        if refusal is not None:
            return None
        out = _run_as_sdpa(as_sdpa)
        return out if heads_first else out.transpose(1, 2)
    except ValueError as error:
        refusal = _ask(call if heads_first else _transposed(call)) or refusal_of(error)
        if refusal is None:
            raise
        return None
    finally:  # a checkpoint may end its recomputation by an error out of the call
        counts.count(refusal and refusal.reason())


def _is_simple(call: Call, heads_first: bool) -> bool:
    """Whether all that sdpa() would ask is what the compiled module asks as well, and sooner. What a compiler traces
    raises nothing that could be caught."""
    query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa = call
    heads = 1 if heads_first else 2
    return (
        not _is_compiling()
        and query.dtype is key.dtype is value.dtype is _float16  # of bfloat16 not every GPU's is taken
        and query.dim() == key.dim() == 4
        and dropout_p == 0.0
        and not is_causal
        and (scale is None or type(scale) is float)
        and (attn_mask is None or isinstance(attn_mask, torch.Tensor))
        and (enable_gqa or query.shape[heads] == key.shape[heads])
    )


def _run(call: Call, heads_first: bool) -> torch.Tensor:
    query, key, value, attn_mask, _, _, scale, _ = call
    options = Options(softmax_scale=scale, attn_bias=attn_mask)
    if heads_first:
        return attention_heads_first(query, key, value, options)
    out, _ = attention_heads_second(query, key, value, options, False)
    return out


def _transposed(call: Call) -> Call:
    query, key, value = (tensor.transpose(1, 2) for tensor in call[:3])
    return Call(query, key, value, *call[3:])


def _ask(call: Call) -> Refusal | None:
    query, key, value, attn_mask, dropout_p, is_causal, _, enable_gqa = call
    refusal = find_refusal(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa)
    return refusal or refusal_where_others_are_better(query)


def _run_as_sdpa(call: Call) -> torch.Tensor:
    query, key, value, attn_mask, dropout_p, is_causal, scale, _ = call
    scale = None if scale is None else number("scale", scale)
    return sdpa_attention(query, key, value, attn_mask, float(dropout_p), bool(is_causal), scale)
