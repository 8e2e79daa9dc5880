"""An implementation for torch's registry of flash attention, ``torch.nn.attention.register_flash_attention_impl``: with
it ``torch.nn.attention.varlen.varlen_attn`` runs here, and so do callers of the operators behind it."""

import re
from typing import Any

import torch
from torch.library import Library

from .. import _core
from .._arguments import UNBOUNDED, max_seqlen
from .._call_counts import CallCounts
from .._options import Options
from .._torch_internals import replacing_kernels
from ..errors import Refusal
from ..interface import read_options
from . import _passes

__all__ = ["calls", "register"]

_IMPLEMENTATION = "flash_attn_jit"
calls = CallCounts("torch_attention")


def register() -> CallCounts:
    """Registers these kernels as ``"flash_attn_jit"`` with ``torch.nn.attention.register_flash_attention_impl`` and
    activates them, as ``torch.nn.attention.activate_flash_attention_impl`` does, in place of any other::

        from flash_attn_jit.integrations import torch_attention
        from torch.nn.attention.varlen import varlen_attn
        torch_attention.register()
        out = varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k)
        print(torch_attention.calls)        # how many calls ran here

    ``torch.nn.attention.restore_flash_attention_impl()`` ends it. A second call changes nothing.

    It replaces ``aten::_flash_attention_forward``, ``_flash_attention_forward_no_dropout_inplace`` and
    ``_scaled_dot_product_flash_attention`` with their backward passes, for CUDA, and for the CPU where
    FLASH_ATTN_JIT_INTERPRET=1 is set. What torch's operators take is taken: seqused_k, block_table, num_splits,
    windows, alibi_slopes, dropout. ``scaled_dot_product_attention`` itself does not choose these operators on a GPU
    older than sm_80: ``integrations.sdpa`` is for that. There is no falling back: what cannot run here is an error.

    Returns:
        `calls`, the counts of forward passes.

    Raises:
        RuntimeError: torch has no such registry, or there is nothing to run on.
    """
    # Under a name that its own modules do not have, and as a value: older versions lack them.
    attention: Any = torch.nn.attention
    if not hasattr(attention, "register_flash_attention_impl"):
        raise RuntimeError(
            f"torch {torch.__version__} has no torch.nn.attention.register_flash_attention_impl; accepted: torch 2.11 "
            "or newer. For scaled_dot_product_attention use flash_attn_jit.integrations.sdpa"
        )
    if not (torch.cuda.is_available() or _core.interprets()):
        raise RuntimeError(
            "torch sees no GPU; accepted: one, or the CPU with FLASH_ATTN_JIT_INTERPRET=1 set before Python starts"
        )
    if attention.current_flash_attention_impl() != _IMPLEMENTATION:
        attention.register_flash_attention_impl(_IMPLEMENTATION, register_fn=_Kernels)
        attention.activate_flash_attention_impl(_IMPLEMENTATION)
    return calls


class _Kernels:
    """In place as long as torch keeps it."""

    def __init__(self) -> None:
        self._library: Library | None = Library("aten", "IMPL")
        kernels = {
            "_flash_attention_forward": _flash_forward,
            "_flash_attention_forward_no_dropout_inplace": _flash_forward_into,
            "_flash_attention_backward": _flash_backward,
            "_scaled_dot_product_flash_attention": _sdpa_forward,
            "_scaled_dot_product_flash_attention_backward": _sdpa_backward,
        }
        for key in ("CUDA", "CPU") if _core.interprets() else ("CUDA",):
            for name, kernel in kernels.items():
                if hasattr(torch.ops.aten, name):
                    self._library.impl(name, kernel, key, **replacing_kernels)

    def remove(self) -> None:
        self._library = None


# ---- The operators, with torch's arguments

_Tensor = torch.Tensor | None


def _flash_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cum_seq_q: _Tensor,
    cum_seq_k: _Tensor,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    **options: Any,
) -> tuple[torch.Tensor, ...]:
    """output, softmax_logsumexp, rng_state, a tensor that nobody uses, debug_attn_mask."""
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        _refuse_what_backward_lacks(options)
    read = _read(cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, **options)
    out = _room_for_out(query, value)
    return out, *_run(query, key, value, read, out, return_debug_mask)


def _flash_forward_into(
    out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cum_seq_q: _Tensor,
    cum_seq_k: _Tensor,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    **options: Any,
) -> torch.Tensor:
    """softmax_logsumexp, beside what is written into out. Torch gives it no derivative."""
    if dropout_p != 0.0 or return_debug_mask:
        came = f"is {dropout_p}, and return_debug_mask {return_debug_mask}"
        raise Refusal("dropout_p", came, "0.0 and False where there is an out").exception()
    read = _read(cum_seq_q, cum_seq_k, max_q, max_k, 0.0, is_causal, **options)
    try:
        _, lse, _ = _passes.write_into(out, query, key, value, read, has_backward=False)
    except ValueError as error:
        raise _of_torch(error) from None
    calls.count()
    return lse


def _flash_backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    cum_seq_q: _Tensor,
    cum_seq_k: _Tensor,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    rng_state: torch.Tensor,
    unused: torch.Tensor,
    **options: Any,
) -> tuple[torch.Tensor, ...]:
    read = _read(cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, **options)
    gradients = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    _run_backward(grad_out, (query, key, value), out, logsumexp, read, rng_state, gradients)
    return gradients


def _sdpa_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    """Heads before the sequence; is_causal is aligned bottom-right, as torch's own kernel has it."""
    read = _read(None, None, 0, 0, dropout_p, is_causal, scale)
    out = _room_for_out(query, value)
    q, k, v, written = (x.transpose(1, 2) for x in (query, key, value, out))
    lse, state, unused, mask = _run(q, k, v, read, written, return_debug_mask)
    return out, lse, None, None, query.shape[2], key.shape[2], state, unused, mask


def _sdpa_backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    cum_seq_q: _Tensor,
    cum_seq_k: _Tensor,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    philox_seed: torch.Tensor,
    philox_offset: torch.Tensor,
    *,
    scale: float | None = None,
) -> tuple[torch.Tensor, ...]:
    read = _read(None, None, 0, 0, dropout_p, is_causal, scale)
    gradients = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    grad_out, query, key, value, out = (x.transpose(1, 2) for x in (grad_out, query, key, value, out))
    written = tuple(x.transpose(1, 2) for x in gradients)
    _run_backward(grad_out, (query, key, value), out, logsumexp, read, philox_seed, written)
    return gradients


# ---- What they share


def _refuse_what_backward_lacks(options: dict[str, Any]) -> None:
    """Torch's backward operator is not given them."""
    for name in ("seqused_k", "alibi_slopes", "block_table"):
        if options.get(name) is not None:
            came = "comes with inputs that require a gradient, of which torch's backward pass would not be told"
            raise Refusal(name, came, "inputs that need none", error=NotImplementedError).exception()


def _room_for_out(query: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    if value.shape[-1] == query.shape[-1]:
        return torch.empty_like(query)
    return query.new_empty((*query.shape[:-1], value.shape[-1]))


def _read(
    cum_seq_q: _Tensor,
    cum_seq_k: _Tensor,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    seqused_k: _Tensor = None,
    alibi_slopes: _Tensor = None,
    block_table: _Tensor = None,
    num_splits: int | None = None,
) -> Options:
    left = -1 if window_size_left is None else window_size_left
    right = -1 if window_size_right is None else window_size_right
    window = UNBOUNDED if left < 0 and right < 0 else (left, right)
    return read_options(
        dropout_p,
        scale,
        is_causal,
        window,
        0.0,
        alibi_slopes,
        False,
        cum_seq_q,
        cum_seq_k,
        0 if cum_seq_q is None else max_seqlen("max_q", max_q),
        0 if cum_seq_q is None else max_seqlen("max_k", max_k),
        seqused_k=seqused_k,
        block_table=block_table,
        num_splits=num_splits or 0,
    )


def _run(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    options: Options,
    out: torch.Tensor,
    return_debug_mask: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """softmax_logsumexp, rng_state, unused, debug_attn_mask. rng_state is the seed of dropout, undefined without."""
    try:
        _, lse, seed = _passes.forward(query, key, value, options, out)
    except ValueError as error:
        raise _of_torch(error) from None
    calls.count()
    device = query.device
    unused = torch.empty((), dtype=torch.uint64, device=device)
    if seed is None:
        state, mask = (
            torch.empty(2, dtype=torch.uint64, device=device),
            torch.empty(0, dtype=query.dtype, device=device),
        )
        return lse, state, unused, mask
    mask = _passes.s_dmask(query, key, lse, options, seed, return_debug_mask)
    return lse, seed.to(torch.int64).view(torch.uint64), unused, mask


def _run_backward(
    grad_out: torch.Tensor,
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    options: Options,
    rng_state: torch.Tensor,
    gradients: tuple[torch.Tensor, ...],
) -> None:
    seed = None if options.dropout_p == 0.0 else rng_state.view(torch.int64).to(torch.int32)
    try:
        _passes.backward(grad_out, *inputs, out, logsumexp, options, seed, gradients)
    except ValueError as error:
        raise _of_torch(error) from None


_NAMES = {
    "q": "query",
    "k": "key",
    "v": "value",
    "dout": "grad_out",
    "softmax_lse": "logsumexp",
    "softmax_scale": "scale",
    "cu_seqlens_q": "cum_seq_q",
    "cu_seqlens_k": "cum_seq_k",
    "max_seqlen_q": "max_q",
    "max_seqlen_k": "max_k",
}
_NAME = re.compile(rf"\b({'|'.join(_NAMES)})\b")


def _of_torch(error: ValueError) -> ValueError:
    """The error with the names that torch's operators have for the arguments."""
    return type(error)(_NAME.sub(lambda name: _NAMES[name[0]], str(error)))
