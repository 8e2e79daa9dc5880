"""Attention with its derivative, for separate and for packed tensors."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.autograd.function import Function

from . import ops
from ._arguments import (
    KV_LAYOUTS,
    QKV_LAYOUTS,
    check_out,
    check_packed,
    refuse_gradient,
    reject_nested,
    reject_what_is_no_tensor,
)
from ._options import (
    NO_TENSORS,
    TENSOR_FIELDS,
    WITH_GRADIENT,
    Options,
    are_none,
    before_backward,
    before_possible_backward,
    has_cache,
    tensors_of,
    with_seed,
    with_tensors,
)
from ._torch_internals import (
    dispatch_modes_are_on,
    forward_mode_is_on,
    is_exporting,
    jit_trace_is_on,
    transforms_are_active,
)
from .errors import Refusal
from .ops import KVPACKED, QKVPACKED, SEPARATE, Form, are_plain, forward_plainly, is_plain

_float32, _is_grad_enabled = torch.float32, torch.is_grad_enabled
# out, softmax_lse; softmax_lse may be None where the call did not want it
Result = tuple[torch.Tensor, Any]
_Gradient = torch.Tensor | None
# Places of the options that may have a gradient.
_WITH_GRADIENT = [Options._fields.index(name) for name in WITH_GRADIENT]
# All that is no input: the options, whether softmax_lse is wanted.
_Call = tuple[Options, bool]


# ---- the derivative, which operators and plain calls share ----


def _save(ctx: Any, options: Options, *tensors: torch.Tensor) -> None:
    """Keeps for backward a call's inputs, its out and its softmax_lse."""
    of_options = tensors_of(options)
    if are_none(of_options):
        ctx.save_for_backward(*tensors)
    else:
        ctx.save_for_backward(*tensors, *of_options)
        options = with_tensors(options, NO_TENSORS)
    ctx.options = options


def _is_transformed() -> bool:
    return not torch.compiler.is_compiling() and bool(transforms_are_active())  # a compiler sees to its own transforms


def _forward_operator(form: Form) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    return form.transformed_forward if _is_transformed() else form.forward


def _gradients(ctx: Any, form: Form, dout: _Gradient, dlse: _Gradient, was_plain: bool) -> tuple[_Gradient, ...]:
    """Of the inputs, and then of attn_bias and s_aux; None for those that need none."""
    count = len(form.names)
    if dout is None and dlse is None:
        return (None,) * (count + len(_WITH_GRADIENT))
    # torch.func.grad() always comes with grad mode on; it is refused where it is differentiated again.
    if torch.is_grad_enabled() and not (torch.compiler.is_compiling() or _is_transformed()):
        refuse_second_derivative()
    saved, options = ctx.saved_tensors, ctx.options
    inputs, out, softmax_lse = saved[:count], saved[count], saved[count + 1]
    tensors = saved[count + 2 :]
    if dout is None:
        dout = torch.zeros_like(out, memory_format=torch.contiguous_format)
    if tensors:
        options = with_tensors(options, tensors)
    # A plain call knows of no options that have one.
    of_options = (not was_plain and ctx.needs_input_grad[count + i] for i in _WITH_GRADIENT)
    wanted = (*ctx.needs_input_grad[:count], *of_options)
    if was_plain and is_plain(dout, inputs[0], inputs[-1]) and are_plain((*inputs[1:-1], dlse, *tensors)):
        try:
            return ops.compute_gradients(form, dout, inputs, out, softmax_lse, dlse, wanted, options)
        except ValueError:
            pass  # see ops.forward_plainly(); with is_grads_batched=True dout is a tensor without memory, too
    backward = form.transformed_backward if _is_transformed() else form.backward
    gradients = backward(dout, *inputs, out, softmax_lse, dlse, wanted, *options)
    return tuple(gradient if needed else None for gradient, needed in zip(gradients, wanted))


def refuse_second_derivative(*_: Any) -> None:
    raise NotImplementedError(
        "create_graph=True asks for gradients of gradients, which are not built yet; accepted: create_graph=False; the "
        "function that torch.func.vjp() gives, and jacrev() with a chunk_size, inside torch.no_grad()"
    )


def _refuse_forward_mode(*_: Any) -> None:
    raise NotImplementedError(
        "forward-mode differentiation (torch.func.jvp, jacfwd, hessian) is not built yet; accepted: reverse mode, "
        "torch.func.grad or jacrev"
    )


def _for_transforms(operator: Any, setup_context: Callable[..., None], backward: Callable[..., Any]) -> Any:
    """The operator and its derivative in the form that the transforms of torch.func ask for."""
    parts = {"forward": operator, "setup_context": setup_context, "backward": backward, "jvp": _refuse_forward_mode}
    methods = {name: staticmethod(part) for name, part in parts.items()}
    transformed: Any = type("Transformed", (Function,), {"generate_vmap_rule": True, **methods})
    return transformed.apply


def _register_derivative(form: Form) -> None:
    count = len(form.names)
    without_gradient = [(count + i, name) for i, name in TENSOR_FIELDS if i not in _WITH_GRADIENT]

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
        _save(ctx, Options._make(inputs[count:]), *inputs[:count], *output)
        ctx.set_materialize_grads(False)

    def backward(ctx: Any, dout: _Gradient, dlse: _Gradient) -> tuple[_Gradient, ...]:
        for i, name in without_gradient:
            if ctx.needs_input_grad[i]:
                refuse_gradient(name)
        gradients = _gradients(ctx, form, dout, dlse, False)
        of_options: list[_Gradient] = [None] * len(Options._fields)
        for place, gradient in zip(_WITH_GRADIENT, gradients[count:]):
            of_options[place] = gradient
        return (*gradients[:count], *of_options)

    def save_nothing(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    ops.register_derivative(form.forward, backward, setup_context)
    ops.register_derivative(form.backward, refuse_second_derivative)
    form.transformed_forward = _for_transforms(form.forward, setup_context, backward)
    form.transformed_backward = _for_transforms(form.backward, save_nothing, refuse_second_derivative)


for _form in (SEPARATE, KVPACKED, QKVPACKED):
    _register_derivative(_form)


# ---- plain calls ----

# What the host pays for a call whose inputs need gradients is mostly autograd's own. So a plain call (ops.is_plain)
# has Functions of its own in place of the operators' derivatives. They return softmax_lse only where it is wanted, take
# all that is no input as one argument, and skip the Python part of Function.apply, which serves setup_context and
# functorch. That last skip takes a call from 14.4 to 9.4 us (SDPA beside it: 9.8), with its backward pass from 51.0 to
# 39.9 us (SDPA: 43.5), and one without gradients from 8.5 to 5.3 us: on one slow CPU, with sequences of length 0.


def _returned(ctx: Any, wants_lse: bool, out: torch.Tensor, softmax_lse: torch.Tensor) -> Any:
    if not wants_lse:
        return out
    ctx.set_materialize_grads(False)  # else backward fills zeros for the one of the two that has no gradient
    return out, softmax_lse


class _Attention(Function):
    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: _Call) -> Any:
        options, wants_lse = call
        out, softmax_lse = forward_plainly(q, k, v, options)
        _save(ctx, options, q, k, v, out, softmax_lse)
        return _returned(ctx, wants_lse, out, softmax_lse)

    @staticmethod
    def backward(ctx: Any, dout: _Gradient, dlse: _Gradient = None) -> tuple[_Gradient, ...]:
        return (*_gradients(ctx, SEPARATE, dout, dlse, True)[:3], None)


def _heads_second(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


class _HeadsFirstAttention(Function):
    """For (batch, heads, seqlen, head_dim): four nodes of the graph fewer than with transposes outside. What is saved
    is what the operator saves: one of a checkpoint's two passes may be plain and the other not."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: Options) -> torch.Tensor:
        inputs = _heads_second(q, k, v)
        out, softmax_lse = forward_plainly(*inputs, options)
        _save(ctx, options, *inputs, out, softmax_lse)
        return out.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, dout: _Gradient) -> tuple[_Gradient, ...]:
        dout = None if dout is None else dout.transpose(1, 2)
        gradients = _gradients(ctx, SEPARATE, dout, None, True)[:3]
        return (*(None if gradient is None else gradient.transpose(1, 2) for gradient in gradients), None)


class _KvpackedAttention(Function):
    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, kv: torch.Tensor, call: _Call) -> Any:
        options, wants_lse = call
        k, v = kv.unbind(-3)
        out, softmax_lse = forward_plainly(q, k, v, options)
        _save(ctx, options, q, kv, out, softmax_lse)
        return _returned(ctx, wants_lse, out, softmax_lse)

    @staticmethod
    def backward(ctx: Any, dout: _Gradient, dlse: _Gradient = None) -> tuple[_Gradient, ...]:
        return (*_gradients(ctx, KVPACKED, dout, dlse, True)[:2], None)


class _QkvpackedAttention(Function):
    @staticmethod
    def forward(ctx: Any, qkv: torch.Tensor, call: _Call) -> Any:
        options, wants_lse = call
        q, k, v = qkv.unbind(-3)
        out, softmax_lse = forward_plainly(q, k, v, options)
        _save(ctx, options, qkv, out, softmax_lse)
        return _returned(ctx, wants_lse, out, softmax_lse)

    @staticmethod
    def backward(ctx: Any, dout: _Gradient, dlse: _Gradient = None) -> tuple[_Gradient, ...]:
        return (*_gradients(ctx, QKVPACKED, dout, dlse, True)[:1], None)


# What Function.apply calls when it has done its Python part.
_attention: Callable[..., Any] = super(Function, _Attention).apply
_heads_first: Callable[..., torch.Tensor] = super(Function, _HeadsFirstAttention).apply
_kvpacked: Callable[..., Any] = super(Function, _KvpackedAttention).apply
_qkvpacked: Callable[..., Any] = super(Function, _QkvpackedAttention).apply


# ---- calls ----


def _is_recorded() -> bool:
    """Whether what is called now may run later, with gradients or without, and nothing asks again."""
    if torch.compiler.is_compiling():
        return is_exporting()
    return bool(jit_trace_is_on() or dispatch_modes_are_on())


def _needs_gradient(options: Options, inputs: Sequence[torch.Tensor]) -> bool:
    """Whether any tensor of a call does that may have one."""
    if not _is_grad_enabled():
        return False
    tensors = (*inputs, options.attn_bias, options.s_aux)
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _for_operator(options: Options, *inputs: torch.Tensor) -> Options:
    """What a transform of torch.func differentiates says nothing of it."""
    if has_cache(options):  # without gradients
        return options
    if _needs_gradient(options, inputs):
        return before_backward(options)
    return before_possible_backward(options, inputs[0].shape[-1]) if _is_transformed() or _is_recorded() else options


def _are_plain(options: Options, *inputs: torch.Tensor) -> bool:
    """Whether the options let a call of the inputs be a plain one. One that has a gradient to give to attn_bias or to
    s_aux is the operator's, which knows them as inputs."""
    bias = options.attn_bias
    if bias is not None and bias.requires_grad and _is_grad_enabled():
        return False
    if options.s_aux is not None and _needs_gradient(options, inputs):
        return False
    return are_plain(tensors_of(options))


# Where there are kernels. torch.amp.is_autocast_available() knows of more devices, but torch.compile of 2.4 not of it.
_AUTOCAST_DEVICES = ("cpu", "cuda")


def cast_for_autocast(tensor: torch.Tensor) -> torch.Tensor:
    """A float32 tensor in autocast's dtype where autocast is on for its device, differentiably."""
    if tensor.dtype is not _float32:
        return tensor
    device = tensor.device.type
    if device in _AUTOCAST_DEVICES and torch.is_autocast_enabled(device):
        return tensor.to(torch.get_autocast_dtype(device))
    return tensor


def _reject_tangents(options: Options, **inputs: torch.Tensor) -> None:
    for name in WITH_GRADIENT:
        if getattr(options, name) is not None:
            inputs[name] = getattr(options, name)
    for name, tensor in inputs.items():
        if forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(
                f"{name} carries a forward-mode tangent, which is not built yet; accepted: reverse mode"
            )


# What no gradient comes through, by the name that it has in a call.
_WITHOUT_GRADIENT = ("seqused_k", "leftpad_k", "block_table")


def _refuse_gradients(options: Options, out: torch.Tensor | None, *inputs: torch.Tensor) -> None:
    if not _needs_gradient(options, inputs):
        return
    given = ["out"] if out is not None else []
    given += [name for name in _WITHOUT_GRADIENT if getattr(options, name) is not None]
    if given:
        came = "comes with inputs that require a gradient, which is not built yet"
        accepted = "inputs that need none, or torch.no_grad()"
        raise Refusal(given[0], came, accepted, error=NotImplementedError).exception()


def attention(q: Any, k: Any, v: Any, options: Options, wants_lse: bool, out: torch.Tensor | None = None) -> Result:
    """(out, softmax_lse) of separate tensors."""
    if not (isinstance(q, torch.Tensor) and isinstance(k, torch.Tensor) and isinstance(v, torch.Tensor)):
        reject_what_is_no_tensor(q=q, k=k, v=v)
    if q.dtype is _float32 or k.dtype is _float32 or v.dtype is _float32:
        q, k, v = cast_for_autocast(q), cast_for_autocast(k), cast_for_autocast(v)
    if forward_mode_is_on():
        _reject_tangents(options, q=q, k=k, v=v)
    options = with_seed(options, q)
    if out is not None or has_cache(options):
        _refuse_gradients(options, out, q, k, v)
        if out is not None:
            check_out(out, q, v)
    try:
        if not (is_plain(q, k, v) and _are_plain(options, q, k, v) and (out is None or are_plain((out,)))):
            result = _forward_operator(SEPARATE)(q, k, v, *_for_operator(options, q, k, v))
            return result if out is None else (out.copy_(result[0]), result[1])
        if out is not None:
            result = ops.compute(q, k, v, options, out, wants_lse)
            ops.has_changed(out)
            return result
        if _is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
            result = _attention(q, k, v, (before_backward(options), wants_lse))
            return result if wants_lse else (result, None)
        return forward_plainly(q, k, v, options, wants_lse)
    except RuntimeError:
        reject_nested(SEPARATE.names, (q, k, v))
        raise


def attention_over_cache(q: Any, k: Any, v: Any, options: Options, wants_lse: bool, plain: bool) -> Result:
    """The same where the caller has asked what it asks: they are tensors, none needs a gradient, and all are `plain`,
    options too, or not."""
    if forward_mode_is_on():
        _reject_tangents(options, q=q, k=k, v=v)
    try:
        if plain:
            return forward_plainly(q, k, v, options, wants_lse)
        return _forward_operator(SEPARATE)(q, k, v, *options)
    except RuntimeError:
        reject_nested(SEPARATE.names, (q, k, v))
        raise


def attention_heads_first(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: Options) -> torch.Tensor:
    """out of (batch, heads, seqlen, head_dim), of query's dtype, in that order too."""
    if forward_mode_is_on():
        _reject_tangents(options, query=q, key=k, value=v)
    options = with_seed(options, q)
    if not (is_plain(q, k, v) and _are_plain(options)):
        out, _ = _forward_operator(SEPARATE)(*_heads_second(q, k, v), *_for_operator(options, q, k, v))
        return out.transpose(1, 2)
    if _is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _heads_first(q, k, v, before_backward(options))
    out, _ = forward_plainly(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), options, False)
    return out.transpose(1, 2)


def attention_kvpacked(q: Any, kv: Any, options: Options, wants_lse: bool, out: torch.Tensor | None = None) -> Result:
    """The same of q and a packed kv."""
    if not (isinstance(q, torch.Tensor) and isinstance(kv, torch.Tensor)):
        reject_what_is_no_tensor(q=q, kv=kv)
    layout = KV_LAYOUTS[0 if options.cu_seqlens_q is None else 1]
    check_packed("kv", kv, layout)
    try:
        if out is not None or has_cache(options):  # no gradient is to be packed
            k, v = kv.unbind(-3)
            return attention(q, k, v, options, wants_lse, out)
        if q.dtype is _float32 or kv.dtype is _float32:
            q, kv = cast_for_autocast(q), cast_for_autocast(kv)
        if forward_mode_is_on():
            _reject_tangents(options, q=q, kv=kv)
        options = with_seed(options, q)
        if not (is_plain(q, kv, kv) and _are_plain(options, q, kv)):
            return _forward_operator(KVPACKED)(q, kv, *_for_operator(options, q, kv))
        if _is_grad_enabled() and (q.requires_grad or kv.requires_grad):
            result = _kvpacked(q, kv, (before_backward(options), wants_lse))
            return result if wants_lse else (result, None)
        k, v = kv.unbind(-3)
        return forward_plainly(q, k, v, options, wants_lse)
    except ValueError as error:
        raise _of_packed(error, "kv", layout) from None
    except RuntimeError:
        reject_nested(KVPACKED.names, (q, kv))
        raise


def attention_qkvpacked(qkv: Any, options: Options, wants_lse: bool) -> Result:
    """The same of a packed qkv."""
    if not isinstance(qkv, torch.Tensor):
        reject_what_is_no_tensor(qkv=qkv)
    layout = QKV_LAYOUTS[0 if options.cu_seqlens_q is None else 1]
    check_packed("qkv", qkv, layout)
    try:
        if qkv.dtype is _float32:
            qkv = cast_for_autocast(qkv)
        if forward_mode_is_on():
            _reject_tangents(options, qkv=qkv)
        options = with_seed(options, qkv)
        if not (is_plain(qkv, qkv, qkv) and _are_plain(options, qkv)):
            return _forward_operator(QKVPACKED)(qkv, *_for_operator(options, qkv))
        if _is_grad_enabled() and qkv.requires_grad:
            result = _qkvpacked(qkv, (before_backward(options), wants_lse))
            return result if wants_lse else (result, None)
        q, k, v = qkv.unbind(-3)
        return forward_plainly(q, k, v, options, wants_lse)
    except ValueError as error:
        raise _of_packed(error, "qkv", layout) from None
    except RuntimeError:
        reject_nested(QKVPACKED.names, (qkv,))
        raise


def _of_packed(error: ValueError, packed: str, layout: tuple[str, ...]) -> ValueError:
    """The error with what the names in it are slices of."""
    before = ":, " * (len(layout) - 3)
    slices = ", ".join(f"{name} is {packed}[{before}{i}]" for i, name in enumerate(packed))
    return type(error)(f"{error}. Here {slices}")
