"""A backend of diffusers' attention dispatcher, which runs on these kernels what they can take. diffusers has no public
way to add one: its names are an Enum that is closed, and its registry is private."""

from importlib.metadata import version
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F

from .._call_counts import CallCounts
from ._attempt import Call, attempt

__all__ = ["calls", "register"]

_NAME = "flash_attn_jit"

calls = CallCounts("diffusers")


def register() -> str:
    """Adds the backend "flash_attn_jit" to diffusers, and gives its name::

        from flash_attn_jit.integrations import diffusers as turing
        pipe = FluxPipeline.from_pretrained(..., torch_dtype=torch.float16).to("cuda")
        pipe.transformer.set_attention_backend(turing.register())
        ...
        print(turing.calls)         # how many calls ran where, and why

    It serves the models that go through diffusers' dispatcher (Flux, Wan, QwenImage, ...), and those whose attention is
    of ``diffusers.models.attention_processor`` (UNets and ControlNets, SD3, PixArt, ``AutoencoderKL``, ...):
    ``pipe.unet.set_attention_backend(...)``. For the latter diffusers itself has PyTorch's alone. They follow the
    backend that is active in the process: the last that was set, or that of ``diffusers.attention_backend(name)``
    inside it. ``set_attention_backend("native")`` ends it, ``reset_attention_backend()`` does not. Modules that call
    ``scaled_dot_product_attention`` on their own (Lumina2, HiDream, CogView4, OmniGen, the VAEs of Wan and QwenImage)
    need ``flash_attn_jit.route_sdpa()``, which serves all others of diffusers too.

    Masks of any kind and gradients are taken. What cannot run here runs in diffusers' native backend, PyTorch's
    ``scaled_dot_product_attention``, and is counted with the reason: dtypes other than float16 and bfloat16 (after
    autocast), bfloat16 on GPUs that multiply it (sm_80 and newer), head dims over 512, over 256 where a gradient is
    needed, a ``_parallel_config``, ``return_lse`` (which the native backend refuses), and what else
    ``flash_attn_jit.sdpa`` does not take. Context parallelism is refused by ``set_attention_backend()``. Calls in a
    graph of torch.compile are not counted.

    Registering again changes nothing. Works with diffusers 0.42.

    Raises:
        RuntimeError: a version of diffusers that has not what this stands on.
    """
    from diffusers.models import attention_dispatch, attention_processor

    try:
        names, registry = attention_dispatch.AttentionBackendName, attention_dispatch._AttentionBackendRegistry
        checks = [attention_dispatch._check_device, attention_dispatch._check_shape]
        known, native = names._value2member_map_, registry._backends[names.NATIVE]
        _ = registry._active_backend, attention_processor.F  # which _Functional stands on
    except AttributeError as error:
        raise RuntimeError(
            f"diffusers {version('diffusers')} has another attention dispatcher ({error}); accepted: 0.42. Use "
            "flash_attn_jit.route_sdpa()"
        ) from error
    if _NAME not in known:
        backend = _add_name(names)
        registry.register(backend, constraints=checks)(_dispatched(native))
        attention_processor.F = _Functional(registry, backend)
    return _NAME


def _add_name(names: Any) -> Any:
    """A member of the Enum beside those that it was written with."""
    member = str.__new__(names, _NAME)
    member._name_, member._value_ = _NAME.upper(), _NAME
    names._member_names_.append(member._name_)
    names._member_map_[member._name_] = member
    names._value2member_map_[_NAME] = member
    type.__setattr__(names, member._name_, member)
    return member


def _dispatched(native: Any) -> Any:
    """The function that the dispatcher calls, by the names of its arguments."""

    def flash_attn_jit(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        return_lse: bool = False,
        _parallel_config: Any = None,
    ) -> torch.Tensor:
        """(batch, seqlen, heads, head_dim), as its result."""
        if return_lse or _parallel_config is not None:
            calls.count("return_lse is True" if return_lse else "_parallel_config is given")
        else:
            mask = attn_mask
            if mask is not None and mask.dim() == 2 and mask.shape == (query.shape[0], key.shape[1]):
                mask = mask[:, None, None]  # of keys, as the native backend takes it
            call = Call(query, key, value, mask, dropout_p, is_causal, scale, enable_gqa)
            out = attempt(calls, call, heads_first=False)
            if out is not None:
                return out
        arguments = query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, return_lse, _parallel_config
        return native(*arguments)  # type: ignore[no-any-return]

    return flash_attn_jit


class _Functional(ModuleType):
    """torch.nn.functional as attention_processor sees it: with an SDPA that follows the active backend."""

    def __init__(self, registry: Any, backend: Any) -> None:
        super().__init__(F.__name__)

        def scaled_dot_product_attention(*arguments: Any, **options: Any) -> torch.Tensor:
            if registry._active_backend is backend:
                out = attempt(calls, Call(*arguments, **options), heads_first=True)
                if out is not None:
                    return out
            return F.scaled_dot_product_attention(*arguments, **options)

        self.scaled_dot_product_attention = scaled_dot_product_attention

    def __getattr__(self, name: str) -> Any:
        return getattr(F, name)
