"""Why inputs of xformers' attention cannot run here, in words; None where they can. Inputs are valid as xformers has
them, but for what it does not look at itself."""

from typing import Any

import torch

from .._sdpa import MOST_HEAD_DIM, platform_refusal, tensor_refusal
from ._xformers_bias import RULES, Rows, Rule, tensor_of

_float16 = torch.float16
_TENSOR_TYPES = (torch.float16, torch.float32)


def refusal(inp: Any) -> str | None:
    """Of the forward pass."""
    query, key, value = inp.query, inp.key, inp.value
    device, rank = query.device, query.dim()
    refused = (
        platform_refusal(device)
        or tensor_refusal("query", query, rank, device, None)
        or tensor_refusal("key", key, rank, device, None)
        or tensor_refusal("value", value, rank, device, None)
    )
    if refused is not None:
        return refused.reason()
    head_dim = query.shape[-1]
    if not 1 <= head_dim <= MOST_HEAD_DIM:
        return f"query has head_dim {head_dim}"
    if value.shape[-1] != head_dim:
        return f"value has head_dim {value.shape[-1]} and query {head_dim}"
    if inp.output_dtype is not None and inp.output_dtype is not _float16:
        return f"output_dtype is {inp.output_dtype}"
    if not 0.0 <= inp.p < 1.0:
        return f"p is {inp.p}"
    return None if inp.attn_bias is None else _bias_refusal(inp.attn_bias, query, key)


def gradient_refusal(inp: Any) -> str | None:
    """Of gradients, where refusal() has nothing against the inputs."""
    rule = RULES[type(inp.attn_bias)]
    if rule.rows.have_gradients:
        return None
    return f"attn_bias is a {type(inp.attn_bias).__name__}, which has no backward pass"


def operator_gradient_refusal(inp: Any) -> str | None:
    """The same of gradients that xformers' autograd asks for, or its memory_efficient_attention_backward."""
    if inp.query.dim() == 5:
        return "query has 5 dimensions, whose gradients xformers has in memory_efficient_attention without op= alone"
    return gradient_refusal(inp)


def _bias_refusal(bias: Any, query: torch.Tensor, key: torch.Tensor) -> str | None:
    name, rule = type(bias).__name__, RULES.get(type(bias))
    if rule is None:
        return f"attn_bias is a {name}"
    tensor = tensor_of(bias)
    if tensor is not None:
        return _tensor_refusal(tensor, query, key)
    if rule.rows is Rows.WHOLE:
        return None
    return _window_refusal(name, bias) or _rows_refusal(name, bias, rule, query, key)


def _tensor_refusal(tensor: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> str | None:
    if tensor.dtype not in _TENSOR_TYPES:
        return f"attn_bias has dtype {tensor.dtype}"
    if tensor.device != query.device:
        return f"attn_bias is on {tensor.device} and query on {query.device}"
    batch, rows, *heads, _ = query.shape
    whole = (batch, *(heads or [1]), rows, key.shape[1])
    fits = tensor.dim() == len(whole) and all(size in (1, of_whole) for size, of_whole in zip(tensor.shape, whole))
    return None if fits else f"attn_bias has shape {tuple(tensor.shape)}, which does not broadcast to {whole}"


def _window_refusal(name: str, bias: Any) -> str | None:
    """Not all types look at their windows."""
    for side in ("window_left", "window_right"):
        if getattr(bias, side, 0) < 0:
            return f"attn_bias is a {name} whose {side} is {getattr(bias, side)}"
    if getattr(bias, "_window_size", 1) < 1:
        return f"attn_bias is a {name} whose window_size is {bias._window_size}"
    return None


def _rows_refusal(name: str, bias: Any, rule: Rule, query: torch.Tensor, key: torch.Tensor) -> str | None:
    of_queries, of_keys = bias.q_seqinfo.seqstart_py, bias.k_seqinfo.seqstart_py
    rows_q, rows_k = (tensor.shape[0] * tensor.shape[1] for tensor in (query, key))
    if of_queries[-1] > rows_q:
        return f"attn_bias is a {name} of {of_queries[-1]} queries, and there are {rows_q}"
    if rule.rows in (Rows.PAGES, Rows.PAGES_WITH_GAPS):
        return f"key has {rows_k} rows, and attn_bias pages of {bias.page_size}" if rows_k % bias.page_size else None
    if of_keys[-1] > rows_k:
        return f"attn_bias is a {name} of {of_keys[-1]} keys, and there are {rows_k}"
    if rule.rows is Rows.GAPS:
        lengths = bias.k_seqinfo.seqlen_py
        if any(start + length > end for start, length, end in zip(of_keys, lengths, of_keys[1:])):
            return f"attn_bias is a {name} whose sequences overlap"
    return None
