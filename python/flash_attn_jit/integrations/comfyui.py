"""ComfyUI's attention on these kernels: an override for single models, which a node sets, and a function that ComfyUI
knows by name."""

import logging
from collections.abc import Callable
from importlib import import_module
from typing import Any, TypeVar

import torch

from .._call_counts import CallCounts
from ._attempt import Call, attempt

__all__ = ["attention_override", "calls", "patch", "register"]

calls = CallCounts("ComfyUI", elsewhere="ComfyUI")

_logger = logging.getLogger("flash_attn_jit")
_KEY = "optimized_attention_override"
# Keywords that ComfyUI gives. Only the first two change anything here: the others say where the call is, and whether
# formats of less than 16 bits may be used.
_KNOWN = frozenset(("scale", "enable_gqa", "transformer_options", "_inside_attn_wrapper", "low_precision_attention"))
_Model = TypeVar("_Model")


def patch(model: _Model) -> _Model:
    """A clone of a MODEL (a ``ModelPatcher``) whose attention runs here where it can; what ran where is in ``calls``.
    An override that another node has set is replaced, as by every such node, which is logged as a warning."""
    model = model.clone()  # type: ignore[attr-defined]
    model_options: dict[str, Any] = model.model_options  # type: ignore[attr-defined]
    options = dict(model_options.get("transformer_options", {}))
    if options.get(_KEY, attention_override) is not attention_override:
        _logger.warning("The model has an attention override of another node (%r), which is replaced.", options[_KEY])
    options[_KEY] = attention_override
    model_options["transformer_options"] = options
    return model


def register() -> None:
    """Adds "flash_attn_jit" to the functions that ``comfy.ldm.modules.attention.get_attention_function()`` finds. What
    cannot run here runs in ComfyUI's ``attention_pytorch``. Registering again changes nothing.

    Raises:
        ImportError: not inside of ComfyUI, or a version of it from before there were overrides of attention.
    """
    attention = import_module("comfy.ldm.modules.attention")
    if not hasattr(attention, "wrap_attn") or not hasattr(attention, "register_attention_function"):
        raise ImportError("this ComfyUI has no attention overrides; accepted: a newer one. Update ComfyUI")
    if attention.get_attention_function("flash_attn_jit", None) is None:
        # A function, for whatever wraps it wants its name.
        def attention_flash_attn_jit(*arguments: Any, **options: Any) -> torch.Tensor:
            return attention_override(attention.attention_pytorch, *arguments, **options)

        attention.register_attention_function("flash_attn_jit", attention.wrap_attn(attention_flash_attn_jit))


def attention_override(
    func: Callable[..., torch.Tensor],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    heads: int,
    mask: torch.Tensor | None = None,
    attn_precision: torch.dtype | None = None,
    skip_reshape: bool = False,
    skip_output_reshape: bool = False,
    **options: Any,
) -> torch.Tensor:
    """What ComfyUI calls in the place of `func`, its own attention, where a model's
    ``transformer_options["optimized_attention_override"]`` is this function.

    Falls back to `func`, with the reason counted: dtypes other than float16 and bfloat16, bfloat16
    on GPUs that multiply it (sm_80 and newer), head dims over 512, keywords that are
    not known here, and what else ``flash_attn_jit.sdpa`` does not take.

    Args:
        q, k, v: (batch, seqlen, heads * head_dim), or with skip_reshape (batch, heads, seqlen, head_dim).
        heads: of q; those of k and v may be fewer with ``enable_gqa``.
        mask: None, or bool, float32 or of q's dtype, (seqlen_q, seqlen_k), (batch, seqlen_q, seqlen_k) or (batch,
            heads, seqlen_q, seqlen_k), or what broadcasts to these: as ComfyUI's ``attention_pytorch`` has it.
        attn_precision: accepted: scores are float32 with any.
        options: ``scale``, ``enable_gqa``; and what else ComfyUI passes.

    Returns:
        (batch, seqlen, heads * head_dim), or with skip_output_reshape (batch, heads, seqlen, head_dim).
    """
    out = _attempt(q, k, v, heads, mask, skip_reshape, options)
    if out is None:
        return func(
            q,
            k,
            v,
            heads,
            mask=mask,
            attn_precision=attn_precision,
            skip_reshape=skip_reshape,
            skip_output_reshape=skip_output_reshape,
            **options,
        )
    if skip_reshape != skip_output_reshape:
        out = out.transpose(1, 2)
    return out if skip_output_reshape else out.flatten(2)


def _attempt(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    heads: int,
    mask: torch.Tensor | None,
    heads_first: bool,
    options: dict[str, Any],
) -> torch.Tensor | None:
    """(batch, heads, seqlen, head_dim) where heads_first, else (batch, seqlen, heads, head_dim)."""
    enable_gqa = bool(options.get("enable_gqa", False))
    reason = _why_not(q, k, v, heads, heads_first, enable_gqa, options)
    if reason is not None:
        calls.count(reason)
        return None
    if not heads_first:
        (batch, seqlen, width), (batch_k, seqlen_k, width_k) = q.shape, k.shape
        heads_k = width_k // (width // heads) if enable_gqa else heads
        q = q.view(batch, seqlen, heads, width // heads)  # unflatten() takes three times as long
        k = k.view(batch_k, seqlen_k, heads_k, width_k // heads_k)
        v = v.view(*v.shape[:2], heads_k, v.shape[2] // heads_k)
    if mask is not None and mask.dim() == 3:
        mask = mask[:, None]
    call = Call(q, k, v, mask, scale=options.get("scale"), enable_gqa=enable_gqa)
    return attempt(calls, call, heads_first)


def _why_not(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    heads: int,
    heads_first: bool,
    enable_gqa: bool,
    options: dict[str, Any],
) -> str | None:
    """What attempt() does not ask."""
    if not _KNOWN.issuperset(options):
        return f"{', '.join(sorted(options.keys() - _KNOWN))} is not known here"
    if heads_first:
        return None
    if not q.dim() == k.dim() == v.dim() == 3:
        return f"q, k and v have {q.dim()}, {k.dim()} and {v.dim()} dimensions"
    head_dim = q.shape[-1] // heads
    if q.shape[-1] != heads * head_dim or head_dim == 0:
        return f"q has a last dimension of {q.shape[-1]} and {heads} heads"
    divisor = head_dim if enable_gqa else heads
    if k.shape[-1] % divisor or v.shape[-1] % divisor or not k.shape[-1]:
        return f"k and v have last dimensions of {k.shape[-1]} and {v.shape[-1]}"
    return None
