"""Attention with its derivative, for separate and for packed tensors."""

from typing import Any, Optional, Sequence, Tuple, Type

import torch
from torch.autograd import forward_ad
from torch.autograd.function import Function

from . import ops
from ._arguments import check_packed, reject_what_is_no_tensor

# softmax_scale, causal, window_left, window_right, softcap, alibi_slopes, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
# max_seqlen_k: what the operators take after the tensors
Options = Tuple[Any, ...]
_TENSORS = slice(5, 8)
# out, softmax_lse; softmax_lse is None where the call did not want it
Result = Tuple[torch.Tensor, Optional[torch.Tensor]]
_Gradient = Optional[torch.Tensor]


# What the host pays for a call whose inputs need gradients is mostly autograd's own, so the Functions below return
# softmax_lse only where it is wanted (a second output, and one without a derivative, costs 1.5 us), take the options as
# one argument (0.5 us), and skip both the operator and Function.apply's Python part where ops.is_plain() says that
# neither would do anything (3.3 us and 2.9 us). All of it together: FROM us to TO us, SDPA beside it SDPA us.


def _save(ctx: Any, tensors: Tuple[torch.Tensor, ...], options: Options, plain: bool, wants_lse: bool) -> Any:
    """Keeps what backward needs, the last two of `tensors` being out and softmax_lse, and gives what forward returns."""
    ctx.save_for_backward(*tensors, *options[_TENSORS])
    ctx.options, ctx.plain = options[:5] + options[8:], plain
    out, softmax_lse = tensors[-2:]
    if not wants_lse:
        return out
    ctx.set_materialize_grads(False)  # else backward fills zeros for softmax_lse
    ctx.mark_non_differentiable(softmax_lse)
    return out, softmax_lse


def _refuse_second_order() -> None:
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise NotImplementedError(
            "create_graph=True: gradients of gradients are not built yet. Accepted: create_graph=False."
        )


def _write_gradients(
    ctx: Any,
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    saved: Sequence[Any],
    dq: _Gradient,
    dk: _Gradient,
    dv: _Gradient,
) -> None:
    """Writes those of dq, dk and dv that are there; `saved` is what follows the inputs among the saved tensors."""
    _refuse_second_order()
    out, softmax_lse, *tensors = saved
    options = (*ctx.options[:5], *tensors, *ctx.options[5:])
    ops.backward(
        ctx.plain and ops.is_plain(dout, q, k), dout, q, k, v, out, softmax_lse, dq, dk, dv, *options
    )


def _empty_like(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


class _Attention(Function):
    """ops.forward with ops.backward as its derivative; softmax_lse has none."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: Options, plain: bool, wants_lse: bool
    ) -> Any:
        out, softmax_lse = ops.forward(plain, q, k, v, *options)
        return _save(ctx, (q, k, v, out, softmax_lse), options, plain, wants_lse)

    @staticmethod
    def backward(ctx: Any, dout: _Gradient, *_: None) -> Tuple[_Gradient, ...]:
        q_needs, k_needs, v_needs, *_ = ctx.needs_input_grad
        dq = dk = dv = None
        if dout is not None:
            q, k, v, *saved = ctx.saved_tensors
            if q_needs:
                dq = _empty_like(q)
            if k_needs or v_needs:  # one kernel writes both
                dk, dv = _empty_like(k), _empty_like(v)
            _write_gradients(ctx, dout, q, k, v, saved, dq, dk, dv)
        return dq, dk if k_needs else None, dv if v_needs else None, None, None, None


class _KvpackedAttention(Function):
    """The same for k and v in one tensor, whose gradient is one tensor too: nothing is copied, in or out."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, kv: torch.Tensor, options: Options, plain: bool, wants_lse: bool
    ) -> Any:
        out, softmax_lse = ops.forward(plain, q, *kv.unbind(-3), *options)
        return _save(ctx, (q, kv, out, softmax_lse), options, plain, wants_lse)

    @staticmethod
    def backward(ctx: Any, dout: _Gradient, *_: None) -> Tuple[_Gradient, ...]:
        q_needs, kv_needs, *_ = ctx.needs_input_grad
        dq = dk = dv = dkv = None
        if dout is not None:
            q, kv, *saved = ctx.saved_tensors
            if q_needs:
                dq = _empty_like(q)
            if kv_needs:
                dkv = _empty_like(kv)
                dk, dv = dkv.unbind(-3)
            _write_gradients(ctx, dout, q, *kv.unbind(-3), saved, dq, dk, dv)
        return dq, dkv, None, None, None


class _QkvpackedAttention(Function):
    """The same for q, k and v in one tensor."""

    @staticmethod
    def forward(ctx: Any, qkv: torch.Tensor, options: Options, plain: bool, wants_lse: bool) -> Any:
        out, softmax_lse = ops.forward(plain, *qkv.unbind(-3), *options)
        return _save(ctx, (qkv, out, softmax_lse), options, plain, wants_lse)

    @staticmethod
    def backward(ctx: Any, dout: _Gradient, *_: None) -> Tuple[_Gradient, ...]:
        dqkv = None
        if dout is not None:
            qkv, *saved = ctx.saved_tensors
            dqkv = _empty_like(qkv)
            _write_gradients(ctx, dout, *qkv.unbind(-3), saved, *dqkv.unbind(-3))
        return dqkv, None, None, None


def _differentiable(
    function: Type[Function], plain: bool, wants_lse: bool, options: Options, *inputs: torch.Tensor
) -> Result:
    # Function.apply's Python part serves setup_context and functorch; what it calls then is torch's own.
    apply = super(Function, function).apply if plain else function.apply
    result = apply(*inputs, options, plain, wants_lse)
    return result if wants_lse else (result, None)


def _cast_for_autocast(tensor: torch.Tensor) -> torch.Tensor:
    """A float32 tensor in autocast's dtype where autocast is on for its device, differentiably."""
    device = tensor.device.type
    if tensor.dtype is torch.float32 and torch.is_autocast_enabled(device):
        return tensor.to(torch.get_autocast_dtype(device))
    return tensor


def _reject_tangents(**inputs: torch.Tensor) -> None:
    for name, tensor in inputs.items():
        if forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(
                f"{name} carries a forward-mode tangent, and forward mode is not built yet."
            )


def attention(q: Any, k: Any, v: Any, options: Options, wants_lse: bool) -> Result:
    """(out, softmax_lse) of separate tensors; `options` as in ops.py."""
    if not (isinstance(q, torch.Tensor) and isinstance(k, torch.Tensor) and isinstance(v, torch.Tensor)):
        reject_what_is_no_tensor(q=q, k=k, v=v)
    if q.dtype is torch.float32 or k.dtype is torch.float32 or v.dtype is torch.float32:
        q, k, v = _cast_for_autocast(q), _cast_for_autocast(k), _cast_for_autocast(v)
    if forward_ad._current_level >= 0:
        _reject_tangents(q=q, k=k, v=v)
    plain = ops.is_plain(q, k, v)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _differentiable(_Attention, plain, wants_lse, options, q, k, v)
    return ops.forward(plain, q, k, v, *options)


def attention_kvpacked(q: Any, kv: Any, layout: Tuple[str, ...], options: Options, wants_lse: bool) -> Result:
    """The same of q and a packed kv, whose dimensions are `layout`'s."""
    if not (isinstance(q, torch.Tensor) and isinstance(kv, torch.Tensor)):
        reject_what_is_no_tensor(q=q, kv=kv)
    check_packed("kv", kv, layout)
    if q.dtype is torch.float32 or kv.dtype is torch.float32:
        q, kv = _cast_for_autocast(q), _cast_for_autocast(kv)
    if forward_ad._current_level >= 0:
        _reject_tangents(q=q, kv=kv)
    plain = ops.is_plain(q, kv, kv)
    try:
        if torch.is_grad_enabled() and (q.requires_grad or kv.requires_grad):
            return _differentiable(_KvpackedAttention, plain, wants_lse, options, q, kv)
        return ops.forward(plain, q, *kv.unbind(-3), *options)
    except ValueError as error:
        raise _of_packed(error, "kv", layout) from None


def attention_qkvpacked(qkv: Any, layout: Tuple[str, ...], options: Options, wants_lse: bool) -> Result:
    """The same of a packed qkv."""
    if not isinstance(qkv, torch.Tensor):
        reject_what_is_no_tensor(qkv=qkv)
    check_packed("qkv", qkv, layout)
    if qkv.dtype is torch.float32:
        qkv = _cast_for_autocast(qkv)
    if forward_ad._current_level >= 0:
        _reject_tangents(qkv=qkv)
    plain = ops.is_plain(qkv, qkv, qkv)
    try:
        if torch.is_grad_enabled() and qkv.requires_grad:
            return _differentiable(_QkvpackedAttention, plain, wants_lse, options, qkv)
        return ops.forward(plain, *qkv.unbind(-3), *options)
    except ValueError as error:
        raise _of_packed(error, "qkv", layout) from None


def _of_packed(error: ValueError, packed: str, layout: Tuple[str, ...]) -> ValueError:
    """The error with what the names in it are slices of."""
    before = ":, " * (len(layout) - 3)
    slices = ", ".join(f"{name} is {packed}[{before}{i}]" for i, name in enumerate(packed))
    return type(error)(f"{error} Here {slices}.")
