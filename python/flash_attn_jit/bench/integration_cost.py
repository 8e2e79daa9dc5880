"""What integrations cost the host over the plain function: a call through each, and the call that it comes down to."""

from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from .. import flash_attn_func, flash_attn_varlen_func

_HEADS, _HEAD_DIM = 8, 64


class Inputs(NamedTuple):
    """(1, seqlen, heads, head_dim), and the same with the heads first."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    heads_first: tuple[torch.Tensor, ...]

    @classmethod
    def of(cls, seqlen: int, device: str) -> "Inputs":
        q, k, v = torch.randn(3, 1, seqlen, _HEADS, _HEAD_DIM, dtype=torch.float16, device=device).unbind()
        return cls(q, k, v, tuple(x.transpose(1, 2) for x in (q, k, v)))

    def plain(self, causal: bool = True) -> object:
        return flash_attn_func(self.q, self.k, self.v, causal=causal)


class Integration(NamedTuple):
    call: Callable[[], object]
    plain: Callable[[], object]
    end: Callable[[], None] = lambda: None


def _transformers(given: Inputs) -> Integration:
    functions = import_module("transformers.modeling_utils").ALL_ATTENTION_FUNCTIONS
    attend = functions[import_module("flash_attn_jit.integrations.transformers").register()]
    layer = torch.nn.Module()
    return Integration(lambda: attend(layer, *given.heads_first, None, scaling=0.125), given.plain)


def _diffusers(given: Inputs) -> Integration:
    dispatch = import_module("diffusers.models.attention_dispatch")
    backend = dispatch.AttentionBackendName(import_module("flash_attn_jit.integrations.diffusers").register())
    attend = dispatch.dispatch_attention_fn
    return Integration(lambda: attend(given.q, given.k, given.v, backend=backend), lambda: given.plain(causal=False))


def _xformers(given: Inputs) -> Integration:
    ours, theirs = import_module("flash_attn_jit.integrations.xformers"), import_module("xformers.ops")
    ours.register()
    mask = theirs.LowerTriangularMask()
    attend = theirs.memory_efficient_attention
    return Integration(lambda: attend(given.q, given.k, given.v, mask), given.plain, ours.unregister)


def _comfyui(given: Inputs) -> Integration:
    attend = import_module("flash_attn_jit.integrations.comfyui").attention_override
    q, k, v = (x.flatten(2) for x in given[:3])
    return Integration(lambda: attend(None, q, k, v, _HEADS), lambda: given.plain(causal=False))


def _torch_attention(given: Inputs) -> Integration:
    varlen = import_module("torch.nn.attention.varlen")
    import_module("flash_attn_jit.integrations.torch_attention").register()
    attention: Any = import_module("torch.nn.attention")
    seqlen, device = given.q.shape[1], given.q.device
    starts = torch.tensor([0, seqlen], dtype=torch.int32, device=device)
    rows: list[Any] = [x[0] for x in given[:3]]
    plain: Any = flash_attn_varlen_func
    return Integration(
        lambda: varlen.varlen_attn(*rows, starts, starts, seqlen, seqlen),
        lambda: plain(*rows, starts, starts, seqlen, seqlen),
        attention.restore_flash_attention_impl,
    )


def _sdpa(given: Inputs) -> Integration:
    ours = import_module("flash_attn_jit.integrations.sdpa")
    ours.register()
    attend: Any = F.scaled_dot_product_attention
    return Integration(lambda: attend(*given.heads_first, is_causal=True), given.plain, ours.unregister)


# Each raises ImportError or RuntimeError where its library, or a version that it takes, is not there.
INTEGRATIONS: dict[str, Callable[[Inputs], Integration]] = {
    "transformers": _transformers,
    "diffusers": _diffusers,
    "xformers": _xformers,
    "torch_attention": _torch_attention,
    "sdpa": _sdpa,
    "comfyui": _comfyui,
}
