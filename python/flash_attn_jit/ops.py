"""The torch operators ``flash_attn_jit::forward`` and ``flash_attn_jit::backward``, the same for packed tensors
(``forward_kvpacked``, ``forward_qkvpacked`` and so on), and the way past them.

Registered the low-level way (``torch.library.Library``): a call costs a third of what ``torch.library.custom_op``
takes, and torch.compile sees one operator either way. _autograd.py registers their derivatives.
"""

import logging
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from . import _core
from ._arguments import KV_LAYOUTS, QKV_LAYOUTS, check_packed, device_refusal, layout_refusal, reject_nested
from ._bias_gradient import gradient_of_one_key, has_one_key, room_for_sums, summed
from ._options import SCHEMA, WITH_GRADIENT, Options
from ._torch_internals import (
    dispatch_modes_are_on,
    function_modes_are_on,
    jit_trace_is_on,
    profiler_is_on,
    transforms_are_active,
)

if TYPE_CHECKING:
    from .flex._attention import UserFunctions

_core.connect_torch(torch)
_core.connect_options(Options)
_core.set_logger(logging.getLogger("flash_attn_jit"))
_core.set_python_search_path([folder for folder in sys.path if folder])


_Tensors = Sequence[torch.Tensor]
_Qkv = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
_Gradients = tuple[torch.Tensor | None, ...]


def _like_out(q: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Contiguous in q's shape, whatever q's strides are, with v's head dim."""
    # A v of another rank, or nested, is the compiled module's to refuse.
    if v.is_nested or v.dim() != q.dim() or v.shape[-1] == q.shape[-1]:
        return torch.empty_like(q, memory_format=torch.contiguous_format)
    return q.new_empty((*q.shape[:-1], v.shape[-1]))


def _allocate(
    q: torch.Tensor, v: torch.Tensor, options: Options, into: torch.Tensor | None = None, wants_lse: bool = True
) -> tuple[torch.Tensor, Any]:
    """out, or `into`, and softmax_lse, (batch, num_heads, seqlen_q) or (num_heads, total_q), or None."""
    shape, varlen = q.shape, options.cu_seqlens_q is not None
    if len(shape) != (3 if varlen else 4):
        _core.refuse_rank("q", q, varlen)
    if q.layout is not torch.strided:
        raise layout_refusal("q", q).exception()
    out = _like_out(q, v) if into is None else into
    if not wants_lse:
        return out, None
    if varlen:
        return out, torch.empty(shape[1], shape[0], dtype=torch.float32, device=q.device)
    batch, seqlen_q, num_heads, _ = shape
    return out, torch.empty(batch, num_heads, seqlen_q, dtype=torch.float32, device=q.device)


def compute(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    options: Options,
    into: torch.Tensor | None = None,
    wants_lse: bool = True,
    user: "UserFunctions | None" = None,
) -> tuple[torch.Tensor, Any]:
    """(out, softmax_lse), past the operator; out is `into`, where that is given, softmax_lse None, where it is not
    wanted."""
    out, softmax_lse = _allocate(q, v, options, into, wants_lse)
    _core.forward(q, k, v, out, softmax_lse, options, None, user)
    if options.cu_seqlens_q is not None and not options.max_seqlen_q:
        # No block runs. Where there are rows for all that, none of them sees a key.
        out.zero_()
        if wants_lse:
            softmax_lse.fill_(float("inf"))
    return out, softmax_lse


def compute_gradients(
    form: "Form",
    dout: torch.Tensor,
    inputs: _Tensors,
    out: torch.Tensor,
    softmax_lse: torch.Tensor,
    dlse: torch.Tensor | None,
    wanted: Sequence[bool],
    options: Options,
    user: "UserFunctions | None" = None,
) -> _Gradients:
    """The gradients of `inputs`, of attn_bias and of s_aux, past the operator, where out has the gradient `dout` and
    softmax_lse has `dlse`; None for those that are not wanted."""
    gradients, (dq, dk, dv) = form.room(wanted, *inputs)
    bias, sinks = wanted_of_options(wanted, len(inputs), options)
    q, k, v = form.split(*inputs)
    sums = None if bias is None or has_one_key(bias) else room_for_sums(bias, q, k, options)
    delta = torch.empty_like(softmax_lse)
    if options.s_aux is not None:  # no kernel need come by rows that see no key, whose out is 0
        delta = torch.zeros_like(softmax_lse) if dlse is None else -dlse
    if dlse is not None:
        dlse = dlse.contiguous()
    peaks = torch.empty_like(softmax_lse) if q.dtype is torch.bfloat16 else None
    _core.backward(dout, q, k, v, out, softmax_lse, dlse, dq, dk, dv, sums, delta, peaks, options, user=user)
    if options.cu_seqlens_q is not None:  # see compute()
        if dq is not None and not options.max_seqlen_q:
            dq.zero_()
        if dk is not None and dv is not None and not options.max_seqlen_k:
            dk.zero_()
            dv.zero_()
    share = None if options.s_aux is None else _share_of_sinks(softmax_lse, options.s_aux)
    of_bias = None if bias is None or sums is None else summed(sums, bias)
    if bias is not None and sums is None:
        of_bias = gradient_of_one_key(bias, softmax_lse, delta, dlse, share, options)
    return (*gradients, of_bias, None if sinks is None or share is None else _gradient_of_sinks(share, delta, options))


def wanted_of_options(
    wanted: Sequence[bool], inputs: int, options: Options
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """attn_bias and s_aux, where their gradients are wanted. `wanted` says it behind the inputs', of which there are
    `inputs`, or leaves it out."""
    wants_bias, wants_sinks = (*wanted[inputs:], False, False)[:2]
    bias = options.attn_bias
    if bias is not None and not bias.is_floating_point():
        bias = None
    return bias if wants_bias else None, options.s_aux if wants_sinks else None


def _share_of_sinks(softmax_lse: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    """A sink takes exp(sink - lse) of a row as a key does, with a v of 0."""
    # The lse of a row that the sink has to itself is rounded down: see log_sum_exp() in templates/softmax.cuh.
    return (sinks[:, None] - softmax_lse).exp().clamp(max=1)


def _gradient_of_sinks(share: torch.Tensor, delta: torch.Tensor, options: Options) -> torch.Tensor:
    of_rows = -share * delta
    if options.cu_seqlens_q is None:
        return of_rows.sum((0, 2))
    # Rows behind the last sequence hold anything.
    rows = torch.arange(of_rows.shape[1], device=of_rows.device)
    return torch.where(rows < options.cu_seqlens_q[-1], of_rows, 0.0).sum(1)


def _check_devices(names: Sequence[str], values: Sequence[Any]) -> None:
    # Every other check is the compiled module's, before a kernel runs: its rules need no second copy here. But a single
    # argument on the meta device brings the call here instead of there.
    for name, value in zip(names[1:], values[1:]):
        if isinstance(value, torch.Tensor):
            refusal = device_refusal(name, value.device, names[0], values[0].device)
            if refusal:
                raise refusal.exception()


# ---- where q, k and v lie in the tensors of a call ----


def _empty_like(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


# Memory for the gradients of a call's tensors, None for those not wanted, and (dq, dk, dv) as they lie in it.
_Room = tuple[_Gradients, Sequence[torch.Tensor | None]]


def _room(wanted: Sequence[bool], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> _Room:
    dq = _empty_like(q) if wanted[0] else None
    if not (wanted[1] or wanted[2]):
        return (dq, None, None), (dq, None, None)
    dk, dv = _empty_like(k), _empty_like(v)  # one kernel writes both
    return (dq, dk if wanted[1] else None, dv if wanted[2] else None), (dq, dk, dv)


def _room_kvpacked(wanted: Sequence[bool], q: torch.Tensor, kv: torch.Tensor) -> _Room:
    dq = _empty_like(q) if wanted[0] else None
    if not wanted[1]:
        return (dq, None), (dq, None, None)
    dkv = _empty_like(kv)
    return (dq, dkv), (dq, *dkv.unbind(-3))


def _room_qkvpacked(wanted: Sequence[bool], qkv: torch.Tensor) -> _Room:
    if not wanted[0]:
        return (None,), (None, None, None)
    dqkv = _empty_like(qkv)
    return (dqkv,), dqkv.unbind(-3)


class Form:
    """One way to give q, k and v. Gradients lie in the tensors' gradients alike: what is packed is never copied."""

    # The operators. A gradient that is not wanted comes from the operator as a tensor without elements; the last
    # two are attn_bias's and s_aux's.
    forward: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    backward: Callable[..., tuple[torch.Tensor, ...]]
    # The same inside the transforms of torch.func.
    transformed_forward: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    transformed_backward: Callable[..., tuple[torch.Tensor, ...]]

    def __init__(
        self,
        names: tuple[str, ...],
        split: Callable[..., _Qkv],
        room: Callable[..., _Room],
        layouts: Sequence[tuple[str, ...]] | None = None,
    ) -> None:
        self.names, self.split, self.room = names, split, room
        self.layouts = layouts  # of the packed tensor, the last one: with a batch, with cu_seqlens

    def split_checked(self, tensors: _Tensors, options: Options) -> _Qkv:
        reject_nested(self.names, tensors)
        if self.layouts is not None:
            check_packed(self.names[-1], tensors[-1], self.layouts[0 if options.cu_seqlens_q is None else 1])
        return self.split(*tensors)


SEPARATE = Form(("q", "k", "v"), lambda q, k, v: (q, k, v), _room)
KVPACKED = Form(("q", "kv"), lambda q, kv: (q, *kv.unbind(-3)), _room_kvpacked, KV_LAYOUTS)
QKVPACKED = Form(("qkv",), lambda qkv: qkv.unbind(-3), _room_qkvpacked, QKV_LAYOUTS)


# ---- the operators ----

_library = torch.library.Library("flash_attn_jit", "DEF")


def _define(name: str, signature: str, function: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    tags = (torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag)
    _library.define(name + signature, tags=tags)
    # For every backend: which devices are accepted is the compiled module's to say.
    _library.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"flash_attn_jit::{name}", fake, lib=_library)
    operator: Callable[..., Any] = getattr(torch.ops.flash_attn_jit, name).default
    return operator


def _define_forward(form: Form, name: str) -> None:
    count = len(form.names)

    def forward(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        options = Options._make(arguments[count:])
        return compute(*form.split_checked(arguments[:count], options), options)

    def fake(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        _check_devices((*form.names, *Options._fields), arguments)
        options = Options._make(arguments[count:])
        q, _, v = form.split_checked(arguments[:count], options)
        return _allocate(q, v, options)

    tensors = ", ".join(f"Tensor {name}" for name in form.names)
    form.forward = _define(name, f"({tensors}, {SCHEMA}) -> (Tensor out, Tensor softmax_lse)", forward, fake)


def _define_backward(form: Form, name: str) -> None:
    count = len(form.names)

    def returned(dout: torch.Tensor, gradients: _Gradients) -> tuple[torch.Tensor, ...]:
        return tuple(dout.new_empty(0) if gradient is None else gradient for gradient in gradients)

    def backward(dout: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, ...]:
        inputs, (out, softmax_lse, dlse, wanted, *rest) = arguments[:count], arguments[count:]
        options = Options._make(rest)
        form.split_checked(inputs, options)
        return returned(dout, compute_gradients(form, dout, inputs, out, softmax_lse, dlse, wanted, options))

    def fake(dout: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, ...]:
        names = ("dout", *form.names, "out", "softmax_lse", "dlse", "wanted", *Options._fields)
        _check_devices(names, (dout, *arguments))
        wanted, options = arguments[count + 3], Options._make(arguments[count + 4 :])
        gradients, _ = form.room(wanted, *arguments[:count])
        of_options = wanted_of_options(wanted, count, options)
        return returned(dout, (*gradients, *(None if x is None else _empty_like(x) for x in of_options)))

    tensors = ", ".join(f"Tensor {name}" for name in ("dout", *form.names, "out", "softmax_lse"))
    gradients = ", ".join(f"Tensor d{name}" for name in (*form.names, *WITH_GRADIENT))
    form.backward = _define(
        name, f"({tensors}, Tensor? dlse, bool[] wanted, {SCHEMA}) -> ({gradients})", backward, fake
    )


def register_derivative(
    operator: Any, backward: Callable[..., Any], setup_context: Callable[..., None] | None = None
) -> None:
    """Registered where torch looks for it: whatever records operators keeps the derivative."""
    torch.library.register_autograd(operator, backward, setup_context=setup_context, lib=_library)


for _form, _suffix in ((SEPARATE, ""), (KVPACKED, "_kvpacked"), (QKVPACKED, "_qkvpacked")):
    _define_forward(_form, f"forward{_suffix}")
    _define_backward(_form, f"backward{_suffix}")


# ---- what goes into a cache of keys and values ----


def has_changed(*tensors: torch.Tensor) -> None:
    """What autograd saved of them is no longer what it was."""
    for tensor in tensors:
        if not tensor.is_inference():
            torch.autograd.graph.increment_version(tensor)


def _room_for_turned(q: torch.Tensor, rotary_cos: torch.Tensor | None) -> torch.Tensor:
    """Of q, for q turned; without elements where nothing is."""
    return q.new_empty(0) if rotary_cos is None else torch.empty_like(q, memory_format=torch.contiguous_format)


def _append(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_seqlens: torch.Tensor,
    block_table: torch.Tensor | None,
    q: torch.Tensor,
    rotary_cos: torch.Tensor | None,
    rotary_sin: torch.Tensor | None,
    interleaved: bool,
    queries_advance: bool,
) -> torch.Tensor:
    """q, turned; without elements where nothing is."""
    turned = _room_for_turned(q, rotary_cos)
    _core.append(
        k,
        v,
        k_cache,
        v_cache,
        cache_seqlens,
        block_table,
        None if rotary_cos is None else q,
        None if rotary_cos is None else turned,
        rotary_cos,
        rotary_sin,
        interleaved,
        queries_advance,
    )
    has_changed(k_cache, v_cache)
    return turned


def _fake_append(*arguments: Any) -> torch.Tensor:
    return _room_for_turned(arguments[6], arguments[7])


_append_operator = _define(
    "append",
    "(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor cache_seqlens, Tensor? block_table, Tensor q, "
    "Tensor? rotary_cos, Tensor? rotary_sin, bool interleaved, bool queries_advance) -> Tensor",
    _append,
    _fake_append,
)


def _refuse_vmap(*_: Any) -> None:
    raise NotImplementedError(
        "flash_attn_with_kvcache appends k and v in place, which is not built yet inside of torch.vmap; accepted: a "
        "call outside of it, whose batch has all sequences, or one without k and v"
    )


_library.impl("append", _refuse_vmap, "FuncTorchBatched")


def append(plain: bool, *arguments: Any) -> torch.Tensor | None:
    """Appends k and v to a cache, in place: q turned, or None where nothing is. `plain`: all tensors are."""
    turned = (_append if plain else _append_operator)(*arguments)
    return None if arguments[7] is None else turned


# ---- the way past them ----

_PLAIN_TYPES = frozenset((torch.Tensor, torch.nn.Parameter))
_is_compiling = torch.compiler.is_compiling


def is_plain(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> bool:
    """Whether an operator would do nothing but call its implementation, so that a call may skip it: no compiler, mode,
    transform or tracer looks on, no profiler counts operators, and the tensors are plain.
    """
    return not (
        _is_compiling()
        or dispatch_modes_are_on()
        or function_modes_are_on()
        or transforms_are_active()
        or jit_trace_is_on()
        or profiler_is_on()
        or type(a) not in _PLAIN_TYPES
        or type(b) not in _PLAIN_TYPES
        or type(c) not in _PLAIN_TYPES
        or a.is_neg()  # negated when it is read: the dispatcher does it before an operator runs
        or b.is_neg()
        or c.is_neg()
    )


def are_plain(tensors: Sequence[torch.Tensor | None]) -> bool:
    """Of further tensors what is_plain() asks of three."""
    for tensor in tensors:  # noqa: SIM110  all() of a generator takes longer
        if tensor is not None and (type(tensor) not in _PLAIN_TYPES or tensor.is_neg()):
            return False
    return True


def forward_plainly(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: Options, wants_lse: bool = True
) -> tuple[torch.Tensor, Any]:
    try:
        return compute(q, k, v, options, wants_lse=wants_lse)
    except ValueError:
        pass
    # The compiled module cannot read meta tensors, nor those of zeros without memory, nor one that outlived its
    # transform; the operator makes something of all. Everything else it refuses as well.
    return SEPARATE.forward(q, k, v, *options)
