"""The public functions: flash-attn 2's Python interface."""

import operator
from numbers import Real
from typing import Any, Optional, Sequence, Tuple, Union

import torch
from torch.autograd import forward_ad

from . import _core, ops

_UNBOUNDED = (-1, -1)  # the default's identity lets a call skip the look at it


def _reject_unbuilt(dropout_p: float, window_size: Any, softcap: float, alibi_slopes: Any) -> None:
    """Raises NotImplementedError for the first argument that asks for what is not built yet."""
    if (type(dropout_p) is not float or dropout_p != 0.0) and _number("dropout_p", dropout_p) != 0.0:
        raise NotImplementedError(f"dropout_p={dropout_p} is not built yet. Accepted: 0.0.")
    if window_size is not _UNBOUNDED:
        left, right = _window(window_size)
        if left >= 0 or right >= 0:
            raise NotImplementedError(f"window_size=({left}, {right}) is not built yet. Accepted: (-1, -1).")
    if (type(softcap) is not float or softcap != 0.0) and _number("softcap", softcap) != 0.0:
        raise NotImplementedError(f"softcap={softcap} is not built yet. Accepted: 0.0.")
    if alibi_slopes is not None:
        raise NotImplementedError("alibi_slopes is not built yet. Accepted: None.")


def _window(window_size: Any) -> Tuple[int, int]:
    """(left, right) from a sequence or a tensor of two."""
    values = window_size.tolist() if isinstance(window_size, torch.Tensor) else window_size
    try:
        left, right = values
        return operator.index(left), operator.index(right)
    except (TypeError, ValueError):
        raise ValueError(
            f"window_size is {window_size!r}. Accepted: two integers, (left, right), -1 for unbounded."
        ) from None


def _scale(softmax_scale: Any) -> float:
    if isinstance(softmax_scale, bool):
        raise ValueError(
            f"softmax_scale is {softmax_scale}. Accepted: a number, or None for 1/sqrt(head_dim). "
            f"For a causal mask write causal={softmax_scale}."
        )
    return _number("softmax_scale", softmax_scale)


def _number(name: str, value: Any) -> float:
    try:
        if isinstance(value, Real):
            return float(value)
    except OverflowError:
        raise ValueError(f"{name} is beyond float's range. Accepted: a finite number.") from None
    raise ValueError(f"{name} is a {type(value).__name__}. Accepted: a number.")


def _truth(name: str, value: Any) -> bool:
    try:  # numpy's booleans are no ints, and its arrays have no truth
        if not isinstance(value, (torch.Tensor, float)) and value in (0, 1):
            return bool(value)
    except ValueError:
        pass
    raise ValueError(f"{name} is {value!r}. Accepted: True or False.")


def _reject_what_is_no_tensor(**arguments: Any) -> None:
    for name, value in arguments.items():
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"{name} is a {type(value).__name__}. Accepted: a torch.Tensor.")


def _reject_tangents(**inputs: torch.Tensor) -> None:
    for name, tensor in inputs.items():
        if forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(
                f"{name} carries a forward-mode tangent, and forward mode is not built yet."
            )


class _Attention(torch.autograd.Function):
    """ops.forward with ops.backward as its derivative; softmax_lse has none."""

    @staticmethod
    def forward(ctx, q, k, v, softmax_scale, causal):  # type: ignore[no-untyped-def]
        out, softmax_lse = ops.forward(q, k, v, softmax_scale, causal)
        ctx.save_for_backward(q, k, v, out, softmax_lse)
        ctx.softmax_scale, ctx.causal = softmax_scale, causal
        ctx.mark_non_differentiable(softmax_lse)
        return out, softmax_lse

    @staticmethod
    def backward(ctx, dout, _):  # type: ignore[no-untyped-def]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise NotImplementedError(
                "create_graph=True: gradients of gradients are not built yet. Accepted: create_graph=False."
            )
        q, k, v, out, softmax_lse = ctx.saved_tensors
        gradients = ops.backward(dout, q, k, v, out, softmax_lse, ctx.softmax_scale, ctx.causal)
        return (*gradients, None, None)


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: Optional[float] = None,
    causal: bool = False,
    window_size: Union[Sequence[int], torch.Tensor] = _UNBOUNDED,
    softcap: float = 0.0,
    alibi_slopes: Optional[torch.Tensor] = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Union[torch.Tensor, Tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Attention: softmax(q k^T * softmax_scale + mask) v, head by head, in fp16 with fp32 accumulation. Differentiable
    in q, k and v; the gradients are the same bits every time.

    Work goes on the tensors' device and that device's current stream. The first call that needs a kernel compiles
    it, unless the cache or a prebuilt pack has it. CPU tensors run in the interpreter where
    ``FLASH_ATTN_JIT_INTERPRET=1`` is set.

    Args:
        q: (batch, seqlen_q, num_heads, head_dim), float16. Head dims 1 to 256. Of every tensor only the last
            dimension must be contiguous; the other strides are read as they are.
        k: (batch, seqlen_k, num_heads_k, head_dim), float16. num_heads is a multiple of num_heads_k: query head i
            reads key head i // (num_heads / num_heads_k).
        v: like k.
        dropout_p: not built yet: 0.0.
        softmax_scale: a factor for the scores before the softmax; 1/sqrt(head_dim) where None.
        causal: query i sees key j where j <= i + seqlen_k - seqlen_q (aligned bottom-right).
        window_size: not built yet: (-1, -1), unbounded on both sides.
        softcap: not built yet: 0.0.
        alibi_slopes: not built yet: None.
        deterministic: accepted; the result is the same bits every time with either value.
        return_attn_probs: also return softmax_lse and S_dmask.

    Returns:
        out (batch, seqlen_q, num_heads, head_dim), float16 and contiguous; or, with ``return_attn_probs``,
        (out, softmax_lse, S_dmask): softmax_lse (batch, num_heads, seqlen_q), float32, is the natural logarithm of
        the softmax's denominator, and S_dmask is an empty tensor. A query that sees no key has out 0 and
        softmax_lse +inf.

    Raises:
        ValueError: an argument that does not fit; names the argument, what came and what is accepted.
        UnsupportedError: a ValueError for what the device cannot do.
        NotImplementedError: an argument that is not built yet; a backward pass with create_graph=True.
        CompileError, MissingKernelError, DriverError, InterpreterError, ConfigError: RuntimeErrors, see
            ``flash_attn_jit.errors``.
    """
    _reject_unbuilt(dropout_p, window_size, softcap, alibi_slopes)
    if softmax_scale is not None and type(softmax_scale) is not float:
        softmax_scale = _scale(softmax_scale)
    if causal is not True and causal is not False:
        causal = _truth("causal", causal)
    if deterministic is not True and deterministic is not False:
        _truth("deterministic", deterministic)
    if not (isinstance(q, torch.Tensor) and isinstance(k, torch.Tensor) and isinstance(v, torch.Tensor)):
        _reject_what_is_no_tensor(q=q, k=k, v=v)
    if forward_ad._current_level >= 0:
        _reject_tangents(q=q, k=k, v=v)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        out, softmax_lse = _Attention.apply(q, k, v, softmax_scale, causal)
    else:
        out, softmax_lse = ops.forward(q, k, v, softmax_scale, causal)
    if not return_attn_probs:
        return out
    return out, softmax_lse, torch.empty(0, dtype=out.dtype, device=out.device)


def interpreter_report() -> Optional[_core.InterpreterReport]:
    """The report of the interpreter's last run in this process: shared-memory traffic and bank conflicts per kind of
    access. None before the first run. A race, an out-of-bounds access or a read of memory never written does not get
    here: it raises InterpreterError.
    """
    report = _core.interpreter_report()
    return report if report.kernel else None
