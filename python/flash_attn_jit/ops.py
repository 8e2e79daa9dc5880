"""The torch operators ``flash_attn_jit::forward`` and ``flash_attn_jit::backward``, and the way past them.

Registered the low-level way (``torch.library.Library``): a call costs a third of what ``torch.library.custom_op``
takes, and torch.compile sees one operator either way.
"""

import logging
import sys
from typing import Any, Callable, Dict, Optional, Tuple

import torch

from . import _core

_core.connect_torch(torch)
_core.set_logger(logging.getLogger("flash_attn_jit"))
_core.set_python_search_path([folder for folder in sys.path if folder])

# What follows the tensors in every call, of forward and backward alike.
_OPTIONS = (
    "float? softmax_scale, bool causal, SymInt window_left, SymInt window_right, float softcap, Tensor? alibi_slopes, "
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k"
)
_CU_SEQLENS_Q = 6  # its place among them
_FIXED = ("batch", "seqlen_q", "num_heads", "head_dim")
_VARLEN = ("total_q", "num_heads", "head_dim")


def _allocate(q: torch.Tensor, cu_seqlens_q: Optional[torch.Tensor]) -> Tuple[torch.Tensor, torch.Tensor]:
    """out, contiguous in q's shape whatever q's strides are, and softmax_lse, (batch, num_heads, seqlen_q) or
    (num_heads, total_q)."""
    shape = q.shape
    layout = _FIXED if cu_seqlens_q is None else _VARLEN
    if len(shape) != len(layout):
        raise ValueError(
            f"q has {len(shape)} dimensions, shape {tuple(shape)}. Accepted: {len(layout)}, ({', '.join(layout)})."
        )
    if q.layout is not torch.strided:
        raise ValueError(f"q has layout {q.layout}. Accepted: torch.strided. Use q.to_dense().")
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    if cu_seqlens_q is None:
        batch, seqlen_q, num_heads, _ = shape
        return out, torch.empty(batch, num_heads, seqlen_q, dtype=torch.float32, device=q.device)
    return out, torch.empty(shape[1], shape[0], dtype=torch.float32, device=q.device)


def _forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *options: Any
) -> Tuple[torch.Tensor, torch.Tensor]:
    out, softmax_lse = _allocate(q, options[_CU_SEQLENS_Q])
    _core.forward(q, k, v, out, softmax_lse, *options)
    return out, softmax_lse


def _forward_fake(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *options: Any
) -> Tuple[torch.Tensor, torch.Tensor]:
    # Every other check is _core.forward's, before a kernel runs: its rules need no second copy here. But a single
    # argument on the meta device brings the call here instead of there.
    for name, tensor in (("k", k), ("v", v)):
        if tensor.device != q.device:
            raise ValueError(
                f"{name} is on device {tensor.device} and q on {q.device}. Accepted: all on one device."
            )
    return _allocate(q, options[_CU_SEQLENS_Q])


def _backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    softmax_lse: torch.Tensor,
    dq: Optional[torch.Tensor],
    dk: Optional[torch.Tensor],
    dv: Optional[torch.Tensor],
    *options: Any,
) -> None:
    delta = torch.empty_like(softmax_lse)
    _core.backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, delta, *options)


def _backward_fake(*arguments: Any) -> None:
    pass


_library = torch.library.Library("flash_attn_jit", "DEF")
_tags = (torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag)
_library.define(
    f"forward(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor out, Tensor softmax_lse)", tags=_tags
)
# For every backend: which devices are accepted is _core.forward's to say.
_library.impl("forward", _forward, "CompositeExplicitAutograd")
torch.library.register_fake("flash_attn_jit::forward", _forward_fake, lib=_library)

# Writes dq, dk and dv, each whole, through any strides whose last is 1: slices of a packed gradient too. dq, or dk and
# dv both, may be None: they are then not computed.
_library.define(
    "backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, Tensor(a!)? dq, "
    f"Tensor(b!)? dk, Tensor(c!)? dv, {_OPTIONS}) -> ()",
    tags=_tags,
)
_library.impl("backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("flash_attn_jit::backward", _backward_fake, lib=_library)

_forward_operator = torch.ops.flash_attn_jit.forward.default
_backward_operator = torch.ops.flash_attn_jit.backward.default

_PLAIN_TYPES = frozenset((torch.Tensor, torch.nn.Parameter))
_is_compiling = torch.compiler.is_compiling
_profiler_is_on = torch.autograd._profiler_enabled
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_transforms_are_active = torch._C._are_functorch_transforms_active
_is_traced = torch._C._get_tracing_state


def is_plain(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> bool:
    """Whether the operator would do nothing but call its implementation, so that a call may skip it: no compiler, mode,
    transform or tracer looks on, no profiler counts operators, and the tensors are of torch's own types.
    """
    return not (
        _is_compiling()
        or _dispatch_modes()
        or _function_modes()
        or _transforms_are_active()
        or _is_traced()
        or _profiler_is_on()
        or type(a) not in _PLAIN_TYPES
        or type(b) not in _PLAIN_TYPES
        or type(c) not in _PLAIN_TYPES
        or a.is_neg()  # negated when it is read: the dispatcher does it before an operator runs
        or b.is_neg()
        or c.is_neg()
    )


def _forward_plainly(*arguments: Any) -> Tuple[torch.Tensor, torch.Tensor]:
    try:
        return _forward(*arguments)
    except ValueError:
        pass
    # The compiled module cannot read a meta tensor, nor one that outlived its transform; the operator makes something
    # of both. Everything else it refuses again, in the same words.
    return _forward_operator(*arguments)


# By whether the call is_plain().
forward: Dict[bool, Callable[..., Tuple[torch.Tensor, torch.Tensor]]] = {
    False: _forward_operator,
    True: _forward_plainly,
}
backward: Dict[bool, Callable[..., None]] = {False: _backward_operator, True: _backward}
