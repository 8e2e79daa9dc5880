"""What transformers' layers give beside what the kernels take: cast, made to fit, or refused."""

from typing import Any

import torch

from ..._dtypes import HALVES
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
_CASTS = 'Load the model with dtype=torch.float16 or bfloat16, or train it under torch.autocast("cuda", torch.float16)'


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
    """In one of the kernels' dtypes, where float32 came of layers in it: of norms that are kept in float32 for
    training, or under autocast."""
    device = query.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    dtype = autocast or _dtype_of(module, query, key, value)
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dtype not in (dtype, torch.float32) or dtype not in HALVES:
            came = f"has dtype {tensor.dtype}" + ("" if autocast is None else f", under autocast to {autocast}")
            raise Refusal(
                name, came, "torch.float16 or torch.bfloat16, all alike", _CASTS, UnsupportedError
            ).exception()
    return query.to(dtype), key.to(dtype), value.to(dtype)


def _dtype_of(module: torch.nn.Module, *tensors: torch.Tensor) -> torch.dtype:
    """Of the layer: what some of its tensors have, or else its weights."""
    for tensor in tensors:
        if tensor.dtype in HALVES:
            return tensor.dtype
    linear = next((layer for layer in module.modules() if isinstance(layer, torch.nn.Linear)), None)
    return tensors[0].dtype if linear is None else linear.weight.dtype
