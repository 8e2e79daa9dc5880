"""xformers' ``memory_efficient_attention`` on these kernels: for what calls it without naming an operator, as Unsloth
(on a T4), diffusers' "xformers" processors and backend, sd-webui, kohya's scripts and ComfyUI do."""

import threading
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

from ..._call_counts import CallCounts

__all__ = ["calls", "register", "unregister"]

calls = CallCounts("xformers", elsewhere="xformers")

# Of xformers.ops.fmha: what its public functions call by these names.
_REPLACED = ("_memory_efficient_attention", "_dispatch_fw", "_dispatch_bw", "_ensure_op_supports_or_raise")

# Before it, other biases meant something else by what they said.
_SINCE = "BlockDiagonalLocalAttentionPaddedKeysMask"

_lock = threading.Lock()
_theirs: dict[str, Callable[..., Any]] = {}  # while registered


def register() -> CallCounts:
    """Runs calls of xformers' attention here where it can, in the whole process, until unregister()::

        from flash_attn_jit.integrations import xformers as turing
        turing.register()
        ...
        print(turing.calls)       # how many calls ran where, and why

    All functions of ``xformers.ops.fmha`` are meant, under names imported earlier, too: ``memory_efficient_attention``,
    ``_forward``, ``_forward_requires_grad``, ``_backward`` and ``_partial``; with every attention bias that xformers
    0.0.35 has, dropout, and inputs of 3, 4 or 5 dimensions. Keys that are expanded over their heads are read once for
    all of them in calls that need no gradient.

    What these kernels cannot take runs in xformers' own operators, if any, and is counted with the reason: dtypes other
    than float16 and bfloat16, bfloat16 on GPUs that multiply it (sm_80 and newer), head dims
    above 512, above 256 with gradients or where value's is another than query's, an output_dtype, gradients through
    padded, gappy or paged keys (which xformers has not either). So are calls that name an operator with ``op=``.

    Beyond xformers: tensors of biases have gradients of any shape that broadcasts, in LowerTriangularMaskWithTensorBias
    too, and where query, key and value need none; 5 dimensions have a backward pass; a query that sees no key gives 0.
    A top-left causal mask over blocks whose queries and keys differ in number is a bool tensor of (longest queries,
    longest keys), made in each call. With gradients, keys of 5 dimensions that are expanded are copied for each head.

    These operators come first on every GPU that they run on. On GPUs newer than Turing xformers has faster ones.

    Returns:
        `calls`.

    Raises:
        ImportError: there is no xformers, or one before 0.0.31, or one without a name that is needed.
    """
    from xformers.ops import fmha

    _check_version(fmha)
    from . import _operators  # noqa: F401  fails here where xformers lacks a name

    with _lock:
        if not _theirs:
            _theirs.update({name: getattr(fmha, name) for name in _REPLACED})
            for name, ours in _replacements(_theirs).items():
                setattr(fmha, name, ours)
    return calls


def _check_version(fmha: Any) -> None:
    came = [name for name in _REPLACED if not hasattr(fmha, name)]
    if not hasattr(fmha.attn_bias, _SINCE):
        came.append(_SINCE)
    if came:
        raise ImportError(
            f"xformers {version('xformers')} has no {', '.join(came)}; accepted: xformers 0.0.31 to 0.0.35, and newer "
            "ones that are made alike"
        )


def unregister() -> None:
    """Calls are xformers' again; nothing where none was registered. `calls` stay."""
    with _lock:
        if not _theirs:
            return
        from xformers.ops import fmha

        for name, theirs in _theirs.items():
            setattr(fmha, name, theirs)
        _theirs.clear()


def _replacements(theirs: dict[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    """What stands in the place of xformers' functions, which do what is not done here."""
    from ._operators import BwOp, FwOp, differentiable, needs_gradient, requires_gradient
    from ._refusals import gradient_refusal, operator_gradient_refusal, refusal

    attend, dispatch_forward, dispatch_backward, ensure = (theirs[name] for name in _REPLACED)

    def memory_efficient_attention(inp: Any, op: Any = None) -> Any:
        if op is not None:
            return attend(inp, op)
        inp.validate_inputs()
        given = inp.query, inp.key, inp.value, inp.attn_bias
        shape = inp.normalize_bmhk()
        has_gradient = needs_gradient(inp)
        if refusal(inp) is None and not (has_gradient and gradient_refusal(inp)):
            out = differentiable(inp, has_gradient)
            return out if given[0].dim() > 3 else out.view(*shape)
        inp.query, inp.key, inp.value, inp.attn_bias = given
        return attend(inp, None)  # which asks for an operator, and so counts

    def dispatch_fw(inp: Any, needs_gradient: bool) -> Any:
        reason = refusal(inp)
        # An lse alone is asked for in the same way as one for a backward pass.
        if reason is None and needs_gradient and not inp.is_partial and requires_gradient(inp):
            reason = gradient_refusal(inp)
        if reason is None:
            return FwOp
        calls.count(reason)
        return _or_raise(dispatch_forward, reason, inp, needs_gradient)

    def dispatch_bw(inp: Any, varlen_lse_packed: bool | None) -> Any:
        reason = "its lse is padded" if varlen_lse_packed is False else None
        reason = reason or refusal(inp) or operator_gradient_refusal(inp)
        return BwOp if reason is None else _or_raise(dispatch_backward, reason, inp, varlen_lse_packed)

    def ensure_op_supports_or_raise(exc_type: Any, name: str, op: Any, inp: Any) -> None:
        ensure(exc_type, name, op, inp)
        if op is not FwOp and name == "memory_efficient_attention":
            calls.count(f"op= names {op.NAME}")

    ours = (memory_efficient_attention, dispatch_fw, dispatch_bw, ensure_op_supports_or_raise)
    return dict(zip(_REPLACED, ours))


def _or_raise(dispatch: Callable[..., Any], reason: str, *arguments: Any) -> Any:
    """xformers' own operator. Where it has none its error says why there is none here, too."""
    try:
        return dispatch(*arguments)
    except NotImplementedError as error:
        raise NotImplementedError(f"{error}\n`flash_attn_jit` is not supported because:\n    {reason}") from None
