"""What transformers' layers give beside what the kernels take: cast, made to fit, or refused."""

from typing import Any

import torch
import torch.nn.functional as F

from ...errors import Refusal, UnsupportedError

# What some models' layers give, and what to do then.
_ADVICE = (
    ("head_mask", 'Load the model with attn_implementation="eager"'),
    ("output_attentions", 'Load the model with attn_implementation="eager", which has the probabilities'),
    ("indices", 'These are of sparse attention: load the model with attn_implementation="sdpa"'),
    ("block_indices", 'These are of sparse attention: load the model with attn_implementation="sdpa"'),
    ("sinks", 'These are sinks of each query: load the model with attn_implementation="eager"'),
    ("cache", "Continuous batching runs here with transformers 5"),
)
_CASTS = 'Load the model with dtype=torch.float16, or train it under torch.autocast("cuda", torch.float16)'


def refuse_others(others: dict[str, Any]) -> None:
    """Of what layers give, that which would change the result."""
    for name, advice in _ADVICE:
        value = others.get(name)
        if value is not None and value is not False:
            came = "is True" if value is True else "is given"
            raise Refusal(name, came, "None", advice, NotImplementedError).exception()


def cast(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """In float16, where float32 came of layers in it: of norms that are kept in float32 for training, or under
    autocast."""
    device = query.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        dtype = tensor.dtype
        if dtype is torch.float16 or (dtype is torch.float32 and autocast is torch.float16):
            continue
        if dtype is not torch.float32 or autocast is not None or not _is_of_float16(module, query, key, value):
            came = f"has dtype {dtype}" if autocast is None else f"has dtype {dtype}, under autocast to {autocast}"
            raise Refusal(name, came, "torch.float16", _CASTS, UnsupportedError).exception()
    return query.to(torch.float16), key.to(torch.float16), value.to(torch.float16)


def _is_of_float16(module: torch.nn.Module, *tensors: torch.Tensor) -> bool:
    if any(tensor.dtype is torch.float16 for tensor in tensors):
        return True
    linear = next((layer for layer in module.modules() if isinstance(layer, torch.nn.Linear)), None)
    return linear is not None and linear.weight.dtype is torch.float16


def with_one_head_dim(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]:
    """With zeros behind the shorter ones, which change no score and no sum, and the scale that was meant."""
    head_dim, value_dim = query.shape[3], value.shape[3]
    if scaling is None:
        scaling = head_dim**-0.5
    if value_dim < head_dim:
        return query, key, F.pad(value, (0, head_dim - value_dim)), scaling
    more = (0, value_dim - head_dim)
    return F.pad(query, more), F.pad(key, more), value, scaling
