"""Torch's functions, methods and operators on values: each writes down what it computes, in torch's types.

What differs from torch's eager results: floats are float32, those of float16 and bfloat16 tensors, too. A float
becomes an integer of 32 bits at most, saturated. A division of integers by 0 is 0. An index beyond the ends is no
error, but the nearest that there is. The derivative of what torch.where does not choose is 0, where torch may make
NaN of it; // has the derivative 0, % that of what it leaves."""

import functools
import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from ._expressions import BOOL, FLOAT, RANGES
from ._recording import DTYPE_NAMES, PROMOTED, Part, Recorder, Value, call, kind_of, operator_refusal, part_refusal

OPERATORS = (
    "+ - * / // % ** -x abs(x), == != < <= > >=, & | ^ ~ << >>, "
    "torch.where (masked_fill), maximum, minimum, clamp (clip, clamp_min, clamp_max), "
    "exp, exp2, expm1, log, log2, log10, log1p, sqrt, rsqrt, reciprocal, square, pow, "
    "tanh, sigmoid, sin, cos, tan, sinh, cosh, erf, erfc, relu, leaky_relu, silu, gelu, softplus, "
    "floor, ceil, round, trunc, frac, sign, abs, neg, remainder, fmod, floor_divide, div, "
    "eq, ne, lt, le, gt, ge, isnan, isinf, isfinite, "
    "logical_and, logical_or, logical_xor, logical_not, bitwise_and, bitwise_or, bitwise_xor, bitwise_not, "
    "to, float, int, long, bool, type_as, full_like, zeros_like, ones_like, tensor, detach, "
    "and captured tensors indexed by values"
)

_Handler = Callable[..., Any]
_AnyHandler = TypeVar("_AnyHandler", bound=_Handler)
_HANDLERS: dict[str, _Handler] = {}
_NUMBERS = (bool, int, float)
_INTEGERS = [name for name in RANGES if name != BOOL]


def handler_of(function: Any) -> _Handler | None:
    if function is torch.Tensor.where:
        return _chosen_where
    return _HANDLERS.get(function.__name__.removeprefix("special_"))


def _handles(*names: str) -> Callable[[_AnyHandler], _AnyHandler]:
    def keep(handler: _AnyHandler) -> _AnyHandler:
        for name in names:
            _HANDLERS[name] = handler
        return handler

    return keep


# ---- operands ----


def _recorder(*operands: Any) -> Recorder:
    for each in operands:
        if isinstance(each, Value):
            return each.recorder
        if isinstance(each, Part):
            raise part_refusal(each)
    raise TypeError("no operand is a value")


def _kind_with(kind: str | None, operand: Any) -> str | None:
    """The type of operands so far, and of one more. Python's numbers have but a category."""
    if isinstance(operand, Value):
        return operand.kind if kind is None else PROMOTED[kind, operand.kind]
    return kind


def _promoted(recorder: Recorder, *operands: Any) -> str:
    kind: str | None = None
    for each in operands:
        kind = _kind_with(kind, each)
    for each in operands:
        if isinstance(each, Value):
            continue
        if isinstance(each, Part):
            raise part_refusal(each)
        if isinstance(each, float):
            kind = FLOAT
        elif isinstance(each, bool):
            kind = kind or BOOL
        elif isinstance(each, int):
            kind = "int64" if kind in (None, BOOL) else kind
        else:
            raise recorder.refusal(
                f"computes with {kind_of(each)}", "values, captured tensors' elements, Python's numbers"
            )
    assert kind is not None
    return kind


def _as(recorder: Recorder, operand: Any, kind: str) -> Value:
    if isinstance(operand, Value):
        return operand if operand.kind == kind else recorder.record("convert", kind, operand.number)
    if isinstance(operand, Part):
        raise part_refusal(operand)
    if not isinstance(operand, _NUMBERS):
        raise recorder.refusal(
            f"computes with {kind_of(operand)}", "values, captured tensors' elements, Python's numbers"
        )
    return recorder.constant(operand, kind)


def _value(operand: Any) -> Value:
    if isinstance(operand, Value):
        return operand
    raise part_refusal(operand) if isinstance(operand, Part) else TypeError("the operand is no value")


def _binary(op: str, a: Any, b: Any, kind: str | None = None, result: str | None = None) -> Value:
    """Of operands converted to the type that torch promotes them to, or to `kind`."""
    recorder = _recorder(a, b)
    if kind is None:
        # What is commonest: two values of one type.
        kind = a.kind if type(a) is type(b) is Value and a.kind == b.kind else _promoted(recorder, a, b)
    first, second = _as(recorder, a, kind), _as(recorder, b, kind)
    return recorder.record(op, result or kind, first.number, second.number)


def _unary(op: str, a: Any, kind: str | None = None) -> Value:
    recorder = _recorder(a)
    return recorder.record(op, kind or a.kind, _as(recorder, a, kind or a.kind).number)


def _refuse_bool(name: str, *operands: Any) -> None:
    recorder = _recorder(*operands)
    if _promoted(recorder, *operands) == BOOL:
        raise recorder.refusal(f"uses {name} of bools", "numbers", "Write x.int(), or the operators & | ^ ~", TypeError)


# ---- arithmetic ----


def _times_alpha(other: Any, alpha: Any) -> Any:
    if type(other) in _NUMBERS and type(alpha) in _NUMBERS:
        return other * alpha
    return other if type(alpha) in _NUMBERS and alpha == 1 else _mul(other, alpha)


@_handles("add", "__add__", "__radd__")
def _add(input: Any, other: Any, *, alpha: Any = 1) -> Value:
    other = _times_alpha(other, alpha)
    # Of bools torch's + is "or".
    return _binary("or" if _promoted(_recorder(input, other), input, other) == BOOL else "add", input, other)


@_handles("sub", "subtract", "__sub__")
def _sub(input: Any, other: Any, *, alpha: Any = 1) -> Value:
    _refuse_bool("-", input, other)
    other = _times_alpha(other, alpha)
    return _binary("sub", input, other)


@_handles("rsub", "__rsub__")
def _rsub(input: Any, other: Any, *, alpha: Any = 1) -> Value:
    return _sub(other, input, alpha=alpha)


@_handles("mul", "multiply", "__mul__", "__rmul__")
def _mul(input: Any, other: Any) -> Value:
    return _binary("and" if _promoted(_recorder(input, other), input, other) == BOOL else "mul", input, other)


@_handles("div", "divide", "true_divide", "__truediv__")
def _div(input: Any, other: Any, *, rounding_mode: str | None = None) -> Value:
    if rounding_mode == "floor":
        return _floor_divide(input, other)
    if rounding_mode == "trunc":
        recorder = _recorder(input, other)
        if _promoted(recorder, input, other) == FLOAT:
            return _unary("trunc", _binary("div", input, other, FLOAT))
        _refuse_bool("div", input, other)
        return _binary("truncdiv", input, other)
    if rounding_mode is not None:
        raise _recorder(input, other).refusal(f"divides with rounding_mode={rounding_mode!r}", "None, 'floor', 'trunc'")
    return _binary("div", input, other, FLOAT)


@_handles("__rtruediv__", "__rdiv__")
def _rdiv(input: Any, other: Any) -> Value:
    return _div(other, input)


@_handles("floor_divide", "__floordiv__")
def _floor_divide(input: Any, other: Any) -> Value:
    _refuse_bool("//", input, other)
    return _binary("floordiv", input, other)


@_handles("__rfloordiv__")
def _rfloor_divide(input: Any, other: Any) -> Value:
    return _floor_divide(other, input)


@_handles("remainder", "__mod__")
def _remainder(input: Any, other: Any) -> Value:
    _refuse_bool("%", input, other)
    return _binary("remainder", input, other)


@_handles("__rmod__")
def _rremainder(input: Any, other: Any) -> Value:
    return _remainder(other, input)


@_handles("fmod")
def _fmod(input: Any, other: Any) -> Value:
    _refuse_bool("fmod", input, other)
    return _binary("fmod", input, other)


@_handles("pow", "__pow__")
def _pow(input: Any, exponent: Any) -> Value:
    recorder = _recorder(input, exponent)
    kind = _promoted(recorder, input, exponent)
    if kind == FLOAT:
        return _binary("pow", input, exponent)
    if type(exponent) is int and 0 <= exponent <= 64 and kind != BOOL:
        return _whole_power(_as(recorder, input, kind), exponent)
    accepted = "floats, and of integers exponents from 0 to 64 that are Python's"
    raise recorder.refusal("raises integers to a power", accepted, "Write x.float() ** y")


def _whole_power(base: Value, exponent: int) -> Value:
    if exponent == 0:
        return base.recorder.constant(1, base.kind)
    half = _whole_power(base, exponent // 2)
    square = _mul(half, half) if exponent > 1 else half
    return _mul(square, base) if exponent % 2 else square


@_handles("__rpow__")
def _rpow(input: Any, base: Any) -> Value:
    return _pow(base, input)


@_handles("neg", "negative", "__neg__")
def _neg(input: Any) -> Value:
    _refuse_bool("-", input)
    return _unary("neg", input)


@_handles("positive", "__pos__", "contiguous", "clone")
def _same(input: Any, **_: Any) -> Value:
    return _value(input)


@_handles("abs", "absolute", "__abs__")
def _abs(input: Any) -> Value:
    _refuse_bool("abs", input)
    return _unary("abs", input)


@_handles("sign", "sgn")
def _sign(input: Any) -> Value:
    return input if _value(input).kind == BOOL else _unary("sign", input)


@_handles("square")
def _square(input: Any) -> Value:
    return _pow(input, 2)


@_handles("reciprocal")
def _reciprocal(input: Any) -> Value:
    return _binary("div", 1.0, input, FLOAT)


@_handles("maximum")
def _maximum(input: Any, other: Any) -> Value:
    return _choice("maximum", input, other)


@_handles("minimum")
def _minimum(input: Any, other: Any) -> Value:
    return _choice("minimum", input, other)


def _choice(op: str, a: Any, b: Any) -> Value:
    if _promoted(_recorder(a, b), a, b) == BOOL:
        op = "or" if op == "maximum" else "and"
    return _binary(op, a, b)


@_handles("max")
def _max(input: Any, other: Any = None) -> Value:
    if other is None:
        raise operator_refusal(_recorder(input), "torch.max of one value")
    return _maximum(input, other)


@_handles("min")
def _min(input: Any, other: Any = None) -> Value:
    if other is None:
        raise operator_refusal(_recorder(input), "torch.min of one value")
    return _minimum(input, other)


@_handles("clamp", "clip")
def _clamp(input: Any, min: Any = None, max: Any = None) -> Value:
    recorder = _recorder(input, min, max)
    ends = [end for end in (min, max) if end is not None]
    if not ends:
        raise recorder.refusal("clamps to nothing", "min=, max= or both", error=ValueError)
    _refuse_bool("clamp", input, *ends)
    kind = _promoted(recorder, input, *ends)
    value = _as(recorder, input, kind)
    for op, end in (("clamp_min", min), ("clamp_max", max)):
        if end is not None:
            value = recorder.record(op, kind, value.number, _as(recorder, end, kind).number)
    return value


@_handles("clamp_min")
def _clamp_min(input: Any, min: Any) -> Value:
    return _clamp(input, min=min)


@_handles("clamp_max")
def _clamp_max(input: Any, max: Any) -> Value:
    return _clamp(input, max=max)


# ---- comparisons ----


def _compared(op: str, is_swapped: bool, input: Any, other: Any) -> Value:
    a, b = (other, input) if is_swapped else (input, other)
    return _binary(op, a, b, result=BOOL)


for _name, _op, _is_swapped in (
    ("lt", "lt", False),
    ("le", "le", False),
    ("gt", "lt", True),
    ("ge", "le", True),
    ("eq", "eq", False),
    ("ne", "ne", False),
):
    _handles(_name, f"__{_name}__")(functools.partial(_compared, _op, _is_swapped))
for _name, _op, _is_swapped in (
    ("less", "lt", False),
    ("less_equal", "le", False),
    ("greater", "lt", True),
    ("greater_equal", "le", True),
    ("not_equal", "ne", False),
):
    _handles(_name)(functools.partial(_compared, _op, _is_swapped))


@_handles("isnan")
def _isnan(input: Any) -> Value:
    return _compared("ne", False, input, input)


@_handles("isinf")
def _isinf(input: Any) -> Value:
    return _compared("eq", False, _abs(_float(input)), math.inf)


@_handles("isfinite")
def _isfinite(input: Any) -> Value:
    return _compared("lt", False, _abs(_float(input)), math.inf)


# ---- bits and truth ----


def _bits(op: str, input: Any, other: Any) -> Value:
    recorder = _recorder(input, other)
    kind = _promoted(recorder, input, other)
    if kind == FLOAT:
        raise recorder.refusal("uses & | ^ of floats", "bools and integers", "Compare them first: x > 0", TypeError)
    return _binary(op, input, other)


def _logical(op: str, input: Any, other: Any) -> Value:
    return _binary(op, _truth(input), _truth(other))


def _truth(operand: Any) -> Any:
    if isinstance(operand, Value):
        return operand.recorder.converted(operand, BOOL)
    return bool(operand) if isinstance(operand, _NUMBERS) else operand


for _op in ("and", "or", "xor"):
    _handles(f"bitwise_{_op}", f"__{_op}__", f"__r{_op}__")(functools.partial(_bits, _op))
    _handles(f"logical_{_op}")(functools.partial(_logical, _op))


@_handles("bitwise_not", "__invert__")
def _not(input: Any) -> Value:
    recorder = _recorder(input)
    if input.kind == FLOAT:
        raise recorder.refusal("uses ~ of a float", "bools and integers", "Compare it first: x > 0", TypeError)
    return _unary("not", input)


@_handles("logical_not")
def _logical_not(input: Any) -> Value:
    _recorder(input)
    return _unary("not", _truth(input))


def _shifted(op: str, is_swapped: bool, input: Any, other: Any) -> Value:
    a, b = (other, input) if is_swapped else (input, other)
    recorder = _recorder(a, b)
    kind = _promoted(recorder, a, b)
    if kind not in _INTEGERS:
        raise recorder.refusal("shifts what is no integer", "integers", error=TypeError)
    return _binary(op, a, b)


for _name, _op in (("lshift", "shl"), ("rshift", "shr")):
    _handles(f"__{_name}__")(functools.partial(_shifted, _op, False))
    _handles(f"__r{_name}__")(functools.partial(_shifted, _op, True))
for _name, _op in (("bitwise_left_shift", "shl"), ("bitwise_right_shift", "shr")):
    _handles(_name)(functools.partial(_shifted, _op, False))


# ---- choosing ----


@_handles("where")
def _where(condition: Any, input: Any, other: Any) -> Value:
    recorder = _recorder(condition, input, other)
    chosen = _as(recorder, condition, BOOL)
    if isinstance(condition, Value) and condition.kind != BOOL:
        raise recorder.refusal(f"chooses by {kind_of(condition)}", "a bool", "Compare it: x != 0", TypeError)
    kind = _promoted(recorder, input, other)
    first, second = _as(recorder, input, kind), _as(recorder, other, kind)
    return recorder.record("where", kind, chosen.number, first.number, second.number)


def _chosen_where(input: Any, condition: Any, other: Any) -> Value:
    """The method."""
    return _where(condition, input, other)


@_handles("masked_fill")
def _masked_fill(input: Any, mask: Any, value: Any) -> Value:
    recorder = _recorder(input)
    return _where(mask, _as(recorder, value, input.kind), input)


# ---- functions ----

for _name in ("exp", "exp2", "log", "log2", "log1p", "sqrt", "rsqrt", "tanh", "sigmoid", "sin", "cos", "erf"):
    _handles(_name)(functools.partial(lambda op, input: _unary(op, input, FLOAT), _name))


def _rounded(op: str, input: Any) -> Value:
    recorder = _recorder(input)
    if input.kind == BOOL:
        raise recorder.refusal(f"uses torch.{op} of a bool", "numbers", error=TypeError)
    return _unary(op, input) if input.kind == FLOAT else input


for _name in ("floor", "ceil", "trunc"):
    _handles(_name)(functools.partial(_rounded, _name))
_handles("fix")(functools.partial(_rounded, "trunc"))


@_handles("round")
def _round(input: Any, *, decimals: int = 0) -> Value:
    if decimals != 0:
        raise operator_refusal(_recorder(input), f"torch.round with decimals={decimals}")
    return _rounded("round", input)


@_handles("frac")
def _frac(input: Any) -> Value:
    return _sub(input, _rounded("trunc", input))


@_handles("expit")
def _expit(input: Any) -> Value:
    return _unary("sigmoid", input, FLOAT)


@_handles("expm1")
def _expm1(input: Any) -> Value:
    """tanh(x/2) (exp(x) + 1), which keeps its digits near 0."""
    x = _float(input)
    return _where(
        _compared("lt", True, _abs(x), 1.0), _sub(_exp(x), 1.0), _mul(_tanh(_mul(x, 0.5)), _add(_exp(x), 1.0))
    )


def _exp(input: Any) -> Value:
    return _unary("exp", input, FLOAT)


def _tanh(input: Any) -> Value:
    return _unary("tanh", input, FLOAT)


@_handles("log10")
def _log10(input: Any) -> Value:
    return _mul(_unary("log", input, FLOAT), 1 / math.log(10))


@_handles("tan")
def _tan(input: Any) -> Value:
    return _div(_unary("sin", input, FLOAT), _unary("cos", input, FLOAT))


@_handles("sinh")
def _sinh(input: Any) -> Value:
    return _mul(_sub(_expm1(input), _expm1(_neg(_float(input)))), 0.5)


@_handles("cosh")
def _cosh(input: Any) -> Value:
    return _mul(_add(_exp(input), _exp(_neg(_float(input)))), 0.5)


@_handles("erfc")
def _erfc(input: Any) -> Value:
    return _sub(1.0, _unary("erf", input, FLOAT))


@_handles("relu")
def _relu(input: Any, inplace: bool = False) -> Value:
    _refuse_bool("relu", input)
    return _unary("relu", input) if input.kind == FLOAT else _binary("maximum", input, 0)


@_handles("leaky_relu")
def _leaky_relu(input: Any, negative_slope: float = 0.01, inplace: bool = False) -> Value:
    return _where(_compared("lt", True, input, 0.0), input, _mul(_float(input), float(negative_slope)))


@_handles("silu")
def _silu(input: Any, inplace: bool = False) -> Value:
    return _mul(_float(input), _unary("sigmoid", input, FLOAT))


@_handles("gelu")
def _gelu(input: Any, approximate: str = "none") -> Value:
    x = _float(input)
    if approximate not in ("none", "tanh"):
        raise x.recorder.refusal(f"uses gelu with approximate={approximate!r}", "'none', 'tanh'")
    if approximate == "tanh":
        inner = _mul(_add(x, _mul(_pow(x, 3), 0.044715)), math.sqrt(2 / math.pi))
        return _mul(_mul(x, 0.5), _add(_tanh(inner), 1.0))
    return _mul(_mul(x, 0.5), _add(_unary("erf", _mul(x, math.sqrt(0.5))), 1.0))


@_handles("softplus")
def _softplus(input: Any, beta: float = 1, threshold: float = 20) -> Value:
    scaled = _mul(_float(input), float(beta))
    soft = _mul(_unary("log1p", _exp(scaled)), 1 / beta)
    return _where(_compared("lt", True, scaled, float(threshold)), input, soft)


# ---- types, and values of no computation ----


def _converted(input: Any, kind: str) -> Value:
    return _recorder(input).converted(input, kind)


def _float(input: Any) -> Value:
    return _converted(input, FLOAT)


for _name, _kind in (
    ("float", FLOAT),
    ("int", "int32"),
    ("long", "int64"),
    ("bool", BOOL),
    ("short", "int16"),
    ("char", "int8"),
    ("byte", "uint8"),
):
    _handles(_name)(functools.partial(lambda kind, input: _converted(input, kind), _kind))


def _kind_of_dtype(recorder: Recorder, dtype: torch.dtype) -> str:
    kind = DTYPE_NAMES.get(dtype)
    if kind is None:
        accepted = ", ".join(str(each) for each in DTYPE_NAMES)
        advice = "Scores are computed in float32"
        raise recorder.refusal(f"converts to {dtype}", accepted, advice)
    return kind


@_handles("to")
def _to(input: Any, *targets: Any, dtype: Any = None, **_: Any) -> Value:
    value = _value(input)
    for each in (*targets, dtype):
        if isinstance(each, torch.dtype):
            return _converted(value, _kind_of_dtype(value.recorder, each))
        if isinstance(each, Value):
            return _converted(value, each.kind)
    return value


@_handles("type")
def _type(input: Any, dtype: Any = None) -> Value:
    value = _value(input)
    if not isinstance(dtype, torch.dtype):
        raise value.recorder.refusal(f"converts to type({dtype!r})", "a torch.dtype: x.to(torch.float32)")
    return _converted(value, _kind_of_dtype(value.recorder, dtype))


@_handles("type_as")
def _type_as(input: Any, other: Any) -> Value:
    return _converted(input, _value(other).kind)


@_handles("double", "half", "bfloat16")
def _refuse_type(input: Any) -> Value:
    recorder = _recorder(input)
    raise recorder.refusal("converts to a float that is not float32", "x.float()", "Scores are computed in float32")


@_handles("detach")
def _detach(input: Any) -> Value:
    return _unary("detach", input) if _value(input).kind == FLOAT else input


@_handles("full_like", "new_full")
def _full_like(input: Any, fill_value: Any, other: Any = None, *, dtype: torch.dtype | None = None, **_: Any) -> Value:
    recorder = _recorder(input)
    if other is not None:  # new_full(size, fill_value)
        fill_value = other
    kind = input.kind if dtype is None else _kind_of_dtype(recorder, dtype)
    return _as(recorder, fill_value, kind)


@_handles("zeros_like", "new_zeros")
def _zeros_like(input: Any, size: Any = None, *, dtype: torch.dtype | None = None, **_: Any) -> Value:
    return _full_like(input, 0, dtype=dtype)


@_handles("ones_like", "new_ones")
def _ones_like(input: Any, size: Any = None, *, dtype: torch.dtype | None = None, **_: Any) -> Value:
    return _full_like(input, 1, dtype=dtype)


@_handles("new_tensor")
def _new_tensor(input: Any, data: Any, *, dtype: torch.dtype | None = None, **_: Any) -> Value:
    recorder = _recorder(input)
    return _as(recorder, data, _promoted(recorder, data) if dtype is None else _kind_of_dtype(recorder, dtype))


@_handles("embedding")
def _embedding(input: Any, weight: Any, *_: Any, **__: Any) -> Any:
    _recorder(input)
    return weight[input]


# ---- as methods and operators of values ----

_KNOWN = {Value, bool, int, float}


def _method(name: str, handler: _Handler) -> _Handler:
    shown = f".{name}"

    def method(self: Value, *args: Any, **kwargs: Any) -> Any:
        for each in args:
            if type(each) not in _KNOWN:
                args = tuple(self.recorder.taken(each) for each in args)
                break
        if kwargs:
            kwargs = {name: self.recorder.taken(each) for name, each in kwargs.items()}
        return call(self.recorder, handler, shown, (self, *args), kwargs)

    return method


for _name, _handler in _HANDLERS.items():
    if _name not in vars(Value) or _name in ("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__"):
        setattr(Value, _name, _method(_name, _handler))
Value.where = _method("where", _chosen_where)  # type: ignore[attr-defined]
