"""Checks of what the compiled module does not see: the types of scalars, and what is a tensor at all."""

import logging
import operator
from collections.abc import Sequence
from numbers import Real
from typing import Any, TypeGuard

import torch

from . import _core
from ._options import WITH_GRADIENT
from .errors import Refusal, kind_text

UNBOUNDED = (-1, -1)  # the default's identity lets a call skip the look at it

Window = Sequence[int] | torch.Tensor

# Of packed tensors: with a batch, with cu_seqlens.
KV_LAYOUTS = (("batch", "seqlen_k", "2", "num_heads_k", "head_dim"), ("total_k", "2", "num_heads_k", "head_dim"))
QKV_LAYOUTS = (("batch", "seqlen", "3", "num_heads", "head_dim"), ("total", "3", "num_heads", "head_dim"))

_LONGEST = 2**31 - 1
_is_compiling = torch.compiler.is_compiling
_logger = logging.getLogger("flash_attn_jit")


def scale(softmax_scale: Any) -> float:
    if type(softmax_scale).__name__ in ("bool", "bool_"):  # numpy's is no subclass of Python's
        advice = f"For a causal mask write causal={softmax_scale}"
        raise Refusal("softmax_scale", f"is {softmax_scale}", _core.accepted["softmax_scale"], advice).exception()
    return number("softmax_scale", softmax_scale)


def window(window_size: Any) -> tuple[int, int]:
    """(left, right) from a sequence or a tensor of two; negative where a side is unbounded."""
    if isinstance(window_size, torch.Tensor):
        return _window_of_tensor(window_size)
    try:
        left, right = window_size
        return _window_side(left), _window_side(right)
    except (TypeError, ValueError):
        raise _window_error(repr(window_size)) from None


def _window_side(width: Any) -> int:
    if _is_symbolic(width):
        return width
    width = operator.index(width)
    # No sequence is longer than _LONGEST, so that a wider window hides nothing either.
    return width if 0 <= width <= _LONGEST else -1


def _is_symbolic(value: Any) -> TypeGuard[int]:
    """Whether a tracer may keep this integer as a variable of its graph. A question about it, or a conversion, would
    make the graph hold for some values alone, and has no answer where the value comes out of a tensor. The compiled
    module asks when the graph runs."""
    return type(value) is torch.SymInt or (type(value) is int and _is_compiling())


def _window_of_tensor(window_size: torch.Tensor) -> tuple[int, int]:
    if window_size.shape != (2,) or window_size.is_floating_point():
        raise _window_error(f"a tensor of shape {tuple(window_size.shape)} and dtype {window_size.dtype}")
    _tell_of_synchronisation("window_size", window_size)
    left, right = window_size.tolist()
    return left, right


def _window_error(what_came: str) -> Exception:
    accepted = "two integers, (left, right), -1 for unbounded, or a tensor of them"
    return Refusal("window_size", f"is {what_came}", accepted).exception()


def check_tensor(name: str, value: Any) -> None:
    """Of an option that is given."""
    if not isinstance(value, torch.Tensor):
        raise Refusal(name, f"is {kind_text(value)}", _core.accepted[name]).exception()
    if name not in WITH_GRADIENT and value.requires_grad and torch.is_grad_enabled():
        refuse_gradient(name)


def check_out(out: Any, q: torch.Tensor, v: torch.Tensor) -> None:
    """A tensor that a result is written into."""
    shape = (*q.shape[:-1], v.shape[-1]) if v.dim() == q.dim() else tuple(q.shape)
    like = "q" if shape == q.shape else "q with v's head dim"
    accepted = f"None, or a tensor like {like}, of shape {shape}, dtype {q.dtype}, on {q.device}"
    if not isinstance(out, torch.Tensor):
        raise Refusal("out", f"is {kind_text(out)}", accepted).exception()
    if out.shape != shape or out.dtype is not q.dtype or out.device != q.device:
        came = f"has shape {tuple(out.shape)} and dtype {out.dtype} on {out.device}"
        raise Refusal("out", came, accepted).exception()
    if out.requires_grad:
        refuse_gradient("out")


def check_tensor_of(name: str, value: Any, accepted: str) -> None:
    if not isinstance(value, torch.Tensor):
        raise Refusal(name, f"is {kind_text(value)}", f"None, or a tensor of {accepted}").exception()


def is_integer(value: Any) -> bool:
    if isinstance(value, int):  # a compiler's symbol, too, which it does not ask for its attributes
        return not isinstance(value, bool)
    return hasattr(value, "__index__")


def read_splits(num_splits: Any) -> int:
    if not is_integer(num_splits):
        raise Refusal("num_splits", f"is {kind_text(num_splits)}", "an integer, 0 or more").exception()
    splits = operator.index(num_splits)
    if splits < 0:
        raise Refusal("num_splits", f"is {splits}", "an integer, 0 or more").exception()
    return min(splits, 2**31 - 1)


def refuse_gradient(name: str) -> None:
    came = "requires a gradient, which is not built yet"
    raise Refusal(name, came, f"{name}.detach()", error=NotImplementedError).exception()


def dropout_refusal(dropout_p: Any) -> Refusal | None:
    """Why that share cannot be taken; None where it can."""
    if 0.0 <= number("dropout_p", dropout_p) < 1.0:
        return None
    return Refusal("dropout_p", f"is {dropout_p}", "a number from 0.0, for none, to below 1.0")


def number(name: str, value: Any) -> float:
    try:
        if isinstance(value, Real):
            return float(value)
    except OverflowError:
        raise Refusal(name, "is beyond float's range", "a finite number").exception() from None
    raise Refusal(name, f"is {kind_text(value)}", "a number").exception()


def truth(name: str, value: Any) -> bool:
    try:  # numpy's booleans are no ints, and its arrays have no truth
        if not isinstance(value, (torch.Tensor, float)) and value in (0, 1):
            return bool(value)
    except ValueError:
        pass
    raise Refusal(name, f"is {value!r}", "True or False").exception()


def max_seqlen(name: str, value: Any) -> int:
    """An int from an int or a 0-d tensor of one."""
    if type(value) is int and not _is_compiling():
        return min(value, _LONGEST) if value >= 0 else -1
    if _is_symbolic(value):
        return value
    try:
        if not isinstance(value, torch.Tensor):
            return operator.index(value)
        if value.dim() == 0 and not value.is_floating_point():
            _tell_of_synchronisation(name, value)
            return int(value)
    except TypeError:
        pass
    accepted = "the longest sequence's length, an int or an integer tensor of 0 dimensions"
    raise Refusal(name, f"is {value!r}", accepted).exception()


_told_of_synchronisation = False


def _tell_of_synchronisation(name: str, tensor: torch.Tensor) -> None:
    global _told_of_synchronisation
    if tensor.device.type == "cpu" or torch.compiler.is_compiling() or _told_of_synchronisation:
        return
    _told_of_synchronisation = True
    _logger.warning(
        "%s is a tensor on %s: reading it waits for the device at every call. Give numbers. (Said once.)",
        name,
        tensor.device,
    )


def reject_nested(names: Sequence[str], tensors: Sequence[torch.Tensor]) -> None:
    for name, tensor in zip(names, tensors):
        if tensor.is_nested:
            raise Refusal(
                name,
                "is a nested tensor",
                "a strided tensor",
                "For sequences of different lengths give the varlen functions their rows "
                f"({name}.values() where the layout is torch.jagged) and cu_seqlens",
            ).exception()


def reject_what_is_no_tensor(**arguments: Any) -> None:
    for name, value in arguments.items():
        if not isinstance(value, torch.Tensor):
            raise Refusal(name, f"is {kind_text(value)}", "a torch.Tensor").exception()


def check_packed(name: str, tensor: torch.Tensor, layout: tuple[str, ...]) -> None:
    """The rank of a packed tensor and its dimension of 2 or 3, both as in `layout`."""
    if tensor.is_nested:
        reject_nested((name,), (tensor,))
    if tensor.dim() != len(layout):
        came = f"has {tensor.dim()} dimensions, shape {tuple(tensor.shape)}"
        raise Refusal(name, came, f"{len(layout)}, ({', '.join(layout)})").exception()
    if tensor.layout is not torch.strided:
        raise layout_refusal(name, tensor).exception()
    if tensor.shape[-3] != int(layout[-3]):
        came = f"has size {tensor.shape[-3]} in dimension {len(layout) - 3}, shape {tuple(tensor.shape)}"
        raise Refusal(name, came, f"{layout[-3]}, ({', '.join(layout)})").exception()


def layout_refusal(name: str, tensor: torch.Tensor) -> Refusal:
    return Refusal(name, f"has layout {tensor.layout}", "torch.strided", f"Use {name}.to_dense()")


def device_refusal(name: str, device: torch.device, first: str, of_first: torch.device) -> Refusal | None:
    """Why a tensor may not lie on another device than the first one of its call."""
    if device == of_first:
        return None
    return Refusal(name, f"is on device {device} and {first} on {of_first}", _core.accepted["devices"])
