"""Attention with its derivative, for separate and for packed tensors."""

from typing import Any, Callable, Dict, Optional, Sequence, Tuple, Type

import torch
from torch.amp import is_autocast_available
from torch.autograd import forward_ad
from torch.autograd.function import Function

from . import ops
from ._arguments import check_packed, reject_what_is_no_tensor

# softmax_scale, causal, window_left, window_right, softcap, alibi_slopes, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
# max_seqlen_k: what the operators take after the tensors
Options = Tuple[Any, ...]
_TENSORS = slice(5, 8)
_float32, _is_grad_enabled = torch.float32, torch.is_grad_enabled
# out, softmax_lse; softmax_lse may be None where the call did not want it
Result = Tuple[torch.Tensor, Any]
_Gradient = Optional[torch.Tensor]
# All that is no input: the options, whether the call is plain (ops.is_plain), whether softmax_lse is wanted.
_Call = Tuple[Options, bool, bool]


# What the host pays for a call whose inputs need gradients is mostly autograd's own. So the Functions below return
# softmax_lse only where it is wanted, take all that is no input as one argument, save the options' tensors only where
# there are any, and a plain call (ops.is_plain) skips both the operator and the Python part of Function.apply, which
# serves setup_context and functorch. That last skip takes a call from 14.4 to 9.4 us (SDPA beside it: 9.8), with its
# backward pass from 51.0 to 39.9 us (SDPA: 43.5), and one without gradients from 8.5 to 5.3 us: on one slow CPU, with
# sequences of length 0.


def _save(ctx: Any, call: _Call, *tensors: torch.Tensor) -> Any:
    """Keeps `tensors` for backward, the last two of them out and softmax_lse, and gives what forward returns."""
    options, _, wants_lse = call
    if options[5] is None and options[6] is None:
        ctx.save_for_backward(*tensors)
    else:
        ctx.save_for_backward(*tensors, *options[_TENSORS])
    ctx.call = call
    if not wants_lse:
        return tensors[-2]
    ctx.set_materialize_grads(False)  # else backward fills zeros for softmax_lse
    ctx.mark_non_differentiable(tensors[-1])
    return tensors[-2:]


def _write_gradients(
    ctx: Any,
    dout: torch.Tensor,
    inputs: Sequence[torch.Tensor],
    saved: Sequence[Any],
    gradients: Sequence[_Gradient],
) -> None:
    """Writes those of `gradients`, (dq, dk, dv), that are there. `inputs` is (q, k, v), `saved` what follows the inputs
    among the saved tensors."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise NotImplementedError(
            "create_graph=True: gradients of gradients are not built yet. Accepted: create_graph=False."
        )
    options, plain, _ = ctx.call
    out, softmax_lse, *tensors = saved
    if tensors:
        options = (*options[:5], *tensors, *options[8:])
    plain = plain and ops.is_plain(dout, inputs[0], inputs[1])
    ops.backward[plain](dout, *inputs, out, softmax_lse, *gradients, *options)


def _empty_like(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


class _Attention(Function):
    """The operators' forward and its derivative; softmax_lse has none."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: _Call) -> Any:
        options, plain, _ = call
        out, softmax_lse = ops.forward[plain](q, k, v, *options)
        return _save(ctx, call, q, k, v, out, softmax_lse)

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
            _write_gradients(ctx, dout, (q, k, v), saved, (dq, dk, dv))
        return dq, dk if k_needs else None, dv if v_needs else None, None


class _HeadsFirstAttention(Function):
    """The same for (batch, heads, seqlen, head_dim): four nodes of the graph fewer than with transposes outside."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: _Call) -> torch.Tensor:
        options, plain, _ = call
        out, softmax_lse = ops.forward[plain](
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), *options
        )
        _save(ctx, call, q, k, v, out, softmax_lse)
        return out.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, dout: _Gradient) -> Tuple[_Gradient, ...]:
        q_needs, k_needs, v_needs, *_ = ctx.needs_input_grad
        dq = dk = dv = None
        if dout is not None:
            q, k, v, *saved = ctx.saved_tensors
            if q_needs:
                dq = _empty_like(q)
            if k_needs or v_needs:
                dk, dv = _empty_like(k), _empty_like(v)
            inputs = (q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
            gradients = [t if t is None else t.transpose(1, 2) for t in (dq, dk, dv)]
            _write_gradients(ctx, dout.transpose(1, 2), inputs, saved, gradients)
        return dq, dk if k_needs else None, dv if v_needs else None, None


class _KvpackedAttention(Function):
    """The same for k and v in one tensor, whose gradient is one tensor too: nothing is copied, in or out."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, kv: torch.Tensor, call: _Call) -> Any:
        options, plain, _ = call
        out, softmax_lse = ops.forward[plain](q, *kv.unbind(-3), *options)
        return _save(ctx, call, q, kv, out, softmax_lse)

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
            _write_gradients(ctx, dout, (q, *kv.unbind(-3)), saved, (dq, dk, dv))
        return dq, dkv, None


class _QkvpackedAttention(Function):
    """The same for q, k and v in one tensor."""

    @staticmethod
    def forward(ctx: Any, qkv: torch.Tensor, call: _Call) -> Any:
        options, plain, _ = call
        out, softmax_lse = ops.forward[plain](*qkv.unbind(-3), *options)
        return _save(ctx, call, qkv, out, softmax_lse)

    @staticmethod
    def backward(ctx: Any, dout: _Gradient, *_: None) -> Tuple[_Gradient, ...]:
        dqkv = None
        if dout is not None:
            qkv, *saved = ctx.saved_tensors
            dqkv = _empty_like(qkv)
            _write_gradients(ctx, dout, qkv.unbind(-3), saved, dqkv.unbind(-3))
        return dqkv, None


def _by_plainness(function: Type[Function]) -> Dict[bool, Callable[..., Any]]:
    """Function.apply, and what it calls when it has done its Python part, for a call that is plain."""
    return {False: function.apply, True: super(Function, function).apply}


_attention = _by_plainness(_Attention)
_heads_first = _by_plainness(_HeadsFirstAttention)
_kvpacked = _by_plainness(_KvpackedAttention)
_qkvpacked = _by_plainness(_QkvpackedAttention)


def _cast_for_autocast(tensor: torch.Tensor) -> torch.Tensor:
    """A float32 tensor in autocast's dtype where autocast is on for its device, differentiably."""
    device = tensor.device.type
    if tensor.dtype is torch.float32 and is_autocast_available(device) and torch.is_autocast_enabled(device):
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
    if q.dtype is _float32 or k.dtype is _float32 or v.dtype is _float32:
        q, k, v = _cast_for_autocast(q), _cast_for_autocast(k), _cast_for_autocast(v)
    if forward_ad._current_level >= 0:
        _reject_tangents(q=q, k=k, v=v)
    plain = ops.is_plain(q, k, v)
    if _is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        result = _attention[plain](q, k, v, (options, plain, wants_lse))
        return result if wants_lse else (result, None)
    return ops.forward[plain](q, k, v, *options)


def attention_heads_first(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: Options
) -> torch.Tensor:
    """out of (batch, heads, seqlen, head_dim), float16, in that order too."""
    if forward_ad._current_level >= 0:
        _reject_tangents(query=q, key=k, value=v)
    plain = ops.is_plain(q, k, v)
    if _is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _heads_first[plain](q, k, v, (options, plain, False))
    out, _ = ops.forward[plain](q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), *options)
    return out.transpose(1, 2)


def attention_kvpacked(q: Any, kv: Any, layout: Tuple[str, ...], options: Options, wants_lse: bool) -> Result:
    """The same of q and a packed kv, whose dimensions are `layout`'s."""
    if not (isinstance(q, torch.Tensor) and isinstance(kv, torch.Tensor)):
        reject_what_is_no_tensor(q=q, kv=kv)
    check_packed("kv", kv, layout)
    if q.dtype is _float32 or kv.dtype is _float32:
        q, kv = _cast_for_autocast(q), _cast_for_autocast(kv)
    if forward_ad._current_level >= 0:
        _reject_tangents(q=q, kv=kv)
    plain = ops.is_plain(q, kv, kv)
    try:
        if _is_grad_enabled() and (q.requires_grad or kv.requires_grad):
            result = _kvpacked[plain](q, kv, (options, plain, wants_lse))
            return result if wants_lse else (result, None)
        return ops.forward[plain](q, *kv.unbind(-3), *options)
    except ValueError as error:
        raise _of_packed(error, "kv", layout) from None


def attention_qkvpacked(qkv: Any, layout: Tuple[str, ...], options: Options, wants_lse: bool) -> Result:
    """The same of a packed qkv."""
    if not isinstance(qkv, torch.Tensor):
        reject_what_is_no_tensor(qkv=qkv)
    check_packed("qkv", qkv, layout)
    if qkv.dtype is _float32:
        qkv = _cast_for_autocast(qkv)
    if forward_ad._current_level >= 0:
        _reject_tangents(qkv=qkv)
    plain = ops.is_plain(qkv, qkv, qkv)
    try:
        if _is_grad_enabled() and qkv.requires_grad:
            result = _qkvpacked[plain](qkv, (options, plain, wants_lse))
            return result if wants_lse else (result, None)
        return ops.forward[plain](*qkv.unbind(-3), *options)
    except ValueError as error:
        raise _of_packed(error, "qkv", layout) from None


def _of_packed(error: ValueError, packed: str, layout: Tuple[str, ...]) -> ValueError:
    """The error with what the names in it are slices of."""
    before = ":, " * (len(layout) - 3)
    slices = ", ".join(f"{name} is {packed}[{before}{i}]" for i, name in enumerate(packed))
    return type(error)(f"{str(error).removesuffix('.')}. Here {slices}.")
