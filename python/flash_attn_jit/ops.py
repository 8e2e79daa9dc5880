"""The torch operators ``flash_attn_jit::forward`` and ``flash_attn_jit::backward``.

Registered the low-level way (``torch.library.Library``): a call costs a third of what ``torch.library.custom_op``
takes, and torch.compile sees one operator either way.
"""

import logging
import sys
from typing import Optional, Tuple

import torch

from . import _core

_core.connect_torch(torch)
_core.set_logger(logging.getLogger("flash_attn_jit"))
_core.set_python_search_path([folder for folder in sys.path if folder])


def _allocate(q: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    """out, contiguous in q's shape whatever q's strides are, and softmax_lse (batch, num_heads, seqlen_q)."""
    if q.dim() != 4:
        raise ValueError(
            f"q has {q.dim()} dimensions, shape {tuple(q.shape)}. "
            "Accepted: 4, (batch, seqlen_q, num_heads, head_dim)."
        )
    if q.layout is not torch.strided:
        raise ValueError(f"q has layout {q.layout}. Accepted: torch.strided. Use q.to_dense().")
    batch, seqlen_q, num_heads, _ = q.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    softmax_lse = torch.empty(batch, num_heads, seqlen_q, dtype=torch.float32, device=q.device)
    return out, softmax_lse


def _forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, softmax_scale: Optional[float], causal: bool
) -> Tuple[torch.Tensor, torch.Tensor]:
    out, softmax_lse = _allocate(q)
    _core.forward(q, k, v, out, softmax_lse, softmax_scale, causal)
    return out, softmax_lse


def _forward_fake(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, softmax_scale: Optional[float], causal: bool
) -> Tuple[torch.Tensor, torch.Tensor]:
    # Every other check is _core.forward's, before a kernel runs: its rules need no second copy here. But a single
    # argument on the meta device brings the call here instead of there.
    for name, tensor in (("k", k), ("v", v)):
        if tensor.device != q.device:
            raise ValueError(
                f"{name} is on device {tensor.device} and q on {q.device}. Accepted: all on one device."
            )
    return _allocate(q)


_Gradients = Tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _allocate_gradients(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> _Gradients:
    """dq, dk and dv, contiguous whatever the inputs' strides are."""
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    return dq, dk, dv


def _backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    softmax_lse: torch.Tensor,
    softmax_scale: Optional[float],
    causal: bool,
) -> _Gradients:
    dq, dk, dv = _allocate_gradients(q, k, v)
    if dout.stride(-1) != 1:
        dout = dout.contiguous()
    delta = torch.empty_like(softmax_lse)
    _core.backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, delta, softmax_scale, causal)
    return dq, dk, dv


def _backward_fake(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    softmax_lse: torch.Tensor,
    softmax_scale: Optional[float],
    causal: bool,
) -> _Gradients:
    return _allocate_gradients(q, k, v)


_library = torch.library.Library("flash_attn_jit", "DEF")
_library.define(
    "forward(Tensor q, Tensor k, Tensor v, float? softmax_scale, bool causal) -> (Tensor out, Tensor softmax_lse)",
    tags=(torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag),
)
# For every backend: which devices are accepted is _core.forward's to say.
_library.impl("forward", _forward, "CompositeExplicitAutograd")
torch.library.register_fake("flash_attn_jit::forward", _forward_fake, lib=_library)

_library.define(
    "backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, float? softmax_scale, "
    "bool causal) -> (Tensor dq, Tensor dk, Tensor dv)",
    tags=(torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag),
)
_library.impl("backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("flash_attn_jit::backward", _backward_fake, lib=_library)

forward = torch.ops.flash_attn_jit.forward.default
backward = torch.ops.flash_attn_jit.backward.default
