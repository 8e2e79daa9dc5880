"""Why inputs of xformers' attention cannot run here, in words; None where they can. Inputs are valid as xformers has
them, but for what it does not look at itself."""

from typing import Any

import torch

from ..._dtypes import takes
from ..._sdpa import (
    MOST_HEAD_DIM,
    MOST_HEAD_DIM_OF_GRADIENTS,
    platform_refusal,
    refusal_where_others_are_better,
    tensor_refusal,
)
from ._biases import GAPS, PAGES, PAGES_WITH_GAPS, RULES, WHOLE, Rule, tensor_of

_strided = torch.strided


def refusal(inp: Any) -> str | None:
    """Of the forward pass."""
    query, key, value = inp.query, inp.key, inp.value
    refused = platform_refusal(query.device)
    if refused is not None:
        return refused.reason()
    if not (_is_usual(query, query) and _is_usual(key, query) and _is_usual(value, query)):
        reason = _input_refusal(query, key, value)
        if reason is not None:
            return reason
    head_dim = query.shape[-1]
    if not 1 <= head_dim <= MOST_HEAD_DIM:
        return f"query has head_dim {head_dim}"
    head_dims = {head_dim, value.shape[-1]}
    if len(head_dims) > 1 and not (min(head_dims) >= 1 and max(head_dims) <= MOST_HEAD_DIM_OF_GRADIENTS):
        return f"value has head_dim {value.shape[-1]} and query {head_dim}"
    refused = refusal_where_others_are_better(query)
    if refused is not None:
        return refused.reason()
    if inp.output_dtype is not None and inp.output_dtype is not query.dtype:
        return f"output_dtype is {inp.output_dtype}"
    if inp.p != 0.0 and not 0.0 <= inp.p < 1.0:
        return f"p is {inp.p}"
    return None if inp.attn_bias is None else _bias_refusal(inp.attn_bias, query, key)


def _is_usual(tensor: torch.Tensor, query: torch.Tensor) -> bool:
    return tensor.dtype is query.dtype and takes(tensor.dtype) and tensor.layout is _strided and tensor.stride(-1) == 1


def _input_refusal(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> str | None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        refused = tensor_refusal(name, tensor, query, None)
        if refused is not None:
            return refused.reason()
    return None


def gradient_refusal(inp: Any) -> str | None:
    """Of gradients, where refusal() has nothing against the inputs."""
    if (head_dim := inp.query.shape[-1]) > MOST_HEAD_DIM_OF_GRADIENTS:
        return f"query has head_dim {head_dim}, and an input needs a gradient"
    rule = RULES[type(inp.attn_bias)]
    if rule.has_gradients:
        return None
    return f"attn_bias is a {type(inp.attn_bias).__name__}, which has no backward pass"


def operator_gradient_refusal(inp: Any) -> str | None:
    """The same of gradients that xformers' autograd asks for, or its memory_efficient_attention_backward."""
    if inp.query.dim() == 5:
        return "query has 5 dimensions, whose gradients xformers has in memory_efficient_attention without op= alone"
    return gradient_refusal(inp)


def _bias_refusal(bias: Any, query: torch.Tensor, key: torch.Tensor) -> str | None:
    rule = RULES.get(type(bias))
    if rule is None:
        return f"attn_bias is a {type(bias).__name__}"
    if rule.rows is WHOLE:
        tensor = tensor_of(bias)
        return None if tensor is None else _tensor_refusal(tensor, query, key)
    reason = _rows_refusal(bias, rule, query, key) or _window_refusal(bias)
    return reason and f"attn_bias is a {type(bias).__name__} {reason}"


def _tensor_refusal(tensor: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> str | None:
    if tensor.dtype not in (query.dtype, torch.float32):
        return f"attn_bias has dtype {tensor.dtype}"
    if tensor.device != query.device:
        return f"attn_bias is on {tensor.device} and query on {query.device}"
    batch, rows, *heads, _ = query.shape
    whole = (batch, *(heads or [1]), rows, key.shape[1])
    shape = tensor.shape
    if shape == whole or (len(shape) == len(whole) and all(size in (1, most) for size, most in zip(shape, whole))):
        return None
    return f"attn_bias has shape {tuple(shape)}, which does not broadcast to {whole}"


def _window_refusal(bias: Any) -> str | None:
    """Not all types look at their windows."""
    least = getattr(bias, "_window_size", 1)
    if least < 1:
        return f"whose window_size is {least}"
    left, right = getattr(bias, "window_left", 0), getattr(bias, "window_right", 0)
    return f"whose window is {left} keys on the left and {right} on the right" if left < 0 or right < 0 else None


def _rows_refusal(bias: Any, rule: Rule, query: torch.Tensor, key: torch.Tensor) -> str | None:
    queries, keys = bias.q_seqinfo.seqstart_py[-1], bias.k_seqinfo.seqstart_py[-1]
    rows_q, rows_k = query.shape[0] * query.shape[1], key.shape[0] * key.shape[1]
    if queries > rows_q:
        return f"of {queries} queries, and there are {rows_q}"
    if rule.rows is PAGES or rule.rows is PAGES_WITH_GAPS:
        return f"of pages of {bias.page_size} rows, and there are {rows_k}" if rows_k % bias.page_size else None
    if keys > rows_k:
        return f"of {keys} keys, and there are {rows_k}"
    if rule.rows is GAPS:
        starts, lengths = bias.k_seqinfo.seqstart_py, bias.k_seqinfo.seqlen_py
        if any(start + length > end for start, length, end in zip(starts, lengths, starts[1:])):
            return "whose sequences overlap"
    return None
