"""A user's function, run once on values that write down what is done to them."""

import functools
import sys
from collections.abc import Callable
from numbers import Number
from typing import Any, NoReturn

import torch
from torch.overrides import TorchFunctionMode

from ..errors import Refusal
from ._expressions import BOOL, FLOAT, INT32

MOST_TENSORS, MOST_DIMS = 8, 4

DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.bool: BOOL,
    torch.uint8: "uint8",
    torch.int8: "int8",
    torch.int16: "int16",
    torch.int32: "int32",
    torch.int64: "int64",
    torch.float32: FLOAT,
}
# Of tensors; these two are read as float32.
_HALVES = {torch.float16: "float16", torch.bfloat16: "bfloat16"}
STORED_NAMES = DTYPE_NAMES | _HALVES
TORCH_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}

PROMOTED: dict[tuple[str, str], str] = {
    (one, other): DTYPE_NAMES[torch.promote_types(TORCH_DTYPES[one], TORCH_DTYPES[other])]
    for one in TORCH_DTYPES
    for other in TORCH_DTYPES
}
_NUMBERS = (bool, int, float)
_NO_INDICES = (FLOAT, BOOL, "uint8")

Entry = tuple[Any, ...]


class Recorder:
    """What a function does, as a list of entries: (operator, type, numbers of the entries that it takes...)."""

    def __init__(self, argument: str, device: torch.device, tensors: "Tensors"):
        self.argument, self.device, self.tensors = argument, device, tensors
        self.entries: list[Entry] = []
        self.made_here: dict[int, torch.Tensor] = {}  # numbers that the function made tensors of

    def record(self, op: str, dtype: str, *operands: Any) -> "Value":
        entries = self.entries
        entries.append((op, dtype, *operands))
        return Value(self, len(entries) - 1, dtype)

    def constant(self, value: Any, dtype: str) -> "Value":
        if dtype == FLOAT:
            try:
                value = float(value).hex()
            except OverflowError:
                value = (float("inf") if value > 0 else float("-inf")).hex()
        return self.record("constant", dtype, value if type(value) is not bool else int(value))

    def converted(self, value: "Value", dtype: str) -> "Value":
        return value if value.kind == dtype else self.record("convert", dtype, value.number)

    # ---- what the function is given that is no value yet ----

    def is_made_here(self, operand: Any) -> bool:
        return isinstance(operand, torch.Tensor) and id(operand) in self.made_here

    def taken(self, operand: Any) -> Any:
        """A value of a tensor, or one that has to be indexed first; all else as it is."""
        if not isinstance(operand, torch.Tensor):
            return operand.item() if isinstance(operand, Number) and hasattr(operand, "item") else operand  # numpy's
        if operand.dim() == 0 and (id(operand) in self.made_here or self._is_number(operand)):
            return self.constant_of(operand)
        return Part(self, operand).whole_or_self()

    def _is_number(self, tensor: torch.Tensor) -> bool:
        """What torch takes for a number on another device."""
        return tensor.device.type == "cpu" != self.device.type and not tensor.requires_grad

    def constant_of(self, tensor: torch.Tensor) -> "Value":
        dtype = DTYPE_NAMES.get(tensor.dtype)
        if dtype is None and tensor.dtype in (torch.float16, torch.bfloat16, torch.float64):
            dtype = FLOAT
        if dtype is None:
            raise self.refusal(f"makes a tensor of {tensor.dtype}", "numbers that are real")
        return self.constant(tensor.item(), dtype)

    # ---- errors ----

    def refusal(
        self, what: str, accepted: str, advice: str = "", error: type[Exception] = NotImplementedError
    ) -> Exception:
        """`what` the function does, at the user's line that does it."""
        return Refusal(self.argument, f"{what}{_place(_user_frame())}", accepted, advice, error).exception()


def _user_frame() -> Any:
    """The innermost that is neither this package's nor torch's."""
    frame: Any = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("flash_attn_jit", "torch"):
        frame = frame.f_back
    return frame


def _place(frame: Any) -> str:
    return "" if frame is None else f" ({frame.f_code.co_filename}, line {frame.f_lineno})"


class Tensors:
    """Those that functions capture, in the order in which they are first read, each once."""

    def __init__(self) -> None:
        self.tensors: list[torch.Tensor] = []
        self._numbers: dict[Any, int] = {}
        self.known: list[Entry] = []  # what the code knows of each

    def number_of(self, recorder: Recorder, tensor: torch.Tensor) -> int:
        read = tensor.resolve_neg()  # as it lies in memory
        key = (read.data_ptr(), read.dtype, read.shape, read.stride(), tensor.requires_grad)
        number = self._numbers.get(key)
        if number is None:
            _check_captured(recorder, tensor)
            number = self._numbers[key] = len(self.tensors)
            self.tensors.append(read)
            self.known.append(_known_of(read))
        return number


def _known_of(tensor: torch.Tensor) -> Entry:
    """(type, the dimensions whose neighbours are neighbours in memory, whether 32 bits count its elements)."""
    strides = tensor.stride()
    most = 0
    for size, stride in zip(tensor.shape, strides):
        most += (size - 1) * stride
    return STORED_NAMES[tensor.dtype], tuple(stride == 1 for stride in strides), most <= INT32[1]


def _check_captured(recorder: Recorder, tensor: torch.Tensor) -> None:
    found = _problem_of(recorder, tensor)
    if found is not None:
        name = name_of(tensor)
        what, accepted, advice, error = found
        raise recorder.refusal(f"captures {name}, {what}", accepted.format(name=name), advice.format(name=name), error)


def _problem_of(recorder: Recorder, tensor: torch.Tensor) -> tuple[str, str, str, type[Exception]] | None:
    """What is wrong with it, what is accepted, what to do and the error's type."""
    if tensor.requires_grad and torch.is_grad_enabled():
        advice = "The gradient of a bias is that of flash_attn_func's attn_bias="
        return "which requires a gradient", "{name}.detach()", advice, NotImplementedError
    if tensor.dtype not in STORED_NAMES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in STORED_NAMES)
        advice = "Convert it before: {name}.float()" if tensor.is_floating_point() else ""
        return f"whose dtype is {tensor.dtype}", names, advice, ValueError
    if tensor.layout is not torch.strided or tensor.is_nested:
        return f"whose layout is {tensor.layout}", "strided tensors", "", ValueError
    if tensor.device != recorder.device:
        return f"which is on {tensor.device}", f"tensors on {recorder.device}, as query is", "", ValueError
    if tensor.dim() > MOST_DIMS:
        return f"which has {tensor.dim()} dimensions", f"at most {MOST_DIMS}", "", NotImplementedError
    if tensor.numel() == 0:
        return "which has no elements", "tensors of one element at least", "", ValueError
    if len(recorder.tensors.tensors) == MOST_TENSORS:
        accepted = f"at most {MOST_TENSORS} in score_mod and mask_mod together"
        advice = "Put tensors of one type and shape together with torch.stack"
        return "one tensor too many", accepted, advice, NotImplementedError
    return None


def name_of(tensor: torch.Tensor) -> str:
    """The user's name of a tensor, or of what it is a view of, or what it is."""
    views = [tensor] if tensor._base is None else [tensor, tensor._base]
    frame = _user_frame()
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] != "flash_attn_jit":
        for each in views:
            name = _name_in(frame, each)
            if name is not None:
                return name
        frame = frame.f_back
    return f"a tensor of shape {tuple(tensor.shape)}"


def _name_in(frame: Any, tensor: torch.Tensor) -> str | None:
    names = frame.f_code.co_names
    known = {**{name: frame.f_globals[name] for name in names if name in frame.f_globals}, **frame.f_locals}
    for name, value in known.items():
        if value is tensor:
            return str(name)
    for owner, value in known.items():
        if isinstance(value, (dict, list, tuple)):
            for key, item in value.items() if isinstance(value, dict) else enumerate(value):
                if item is tensor:
                    return f"{owner}[{key!r}]"
        elif not isinstance(value, (Value, Part, torch.Tensor)):
            for name in names:
                if getattr(value, name, None) is tensor:
                    return f"{owner}.{name}"
    return None


class Part:
    """A captured tensor, some of whose dimensions are indexed by values."""

    __slots__ = ("indices", "recorder", "tensor")

    def __init__(self, recorder: Recorder, tensor: torch.Tensor, indices: dict[int, "Value"] | None = None):
        self.recorder, self.tensor, self.indices = recorder, tensor, indices or {}

    def whole_or_self(self) -> Any:
        """The element, where every dimension is indexed."""
        tensor, indices, recorder = self.tensor, self.indices, self.recorder
        if len(indices) < tensor.dim():
            return self
        number = recorder.tensors.number_of(recorder, tensor)
        dtype = DTYPE_NAMES.get(tensor.dtype, FLOAT)
        return recorder.record("load", dtype, number, *(indices[dim].number for dim in range(tensor.dim())))

    def __getitem__(self, index: Any) -> Any:
        tensor, given = self.tensor, list(index) if isinstance(index, tuple) else [index]
        open_dims = [dim for dim in range(tensor.dim()) if dim not in self.indices]
        if any(each is Ellipsis for each in given):
            at = next(i for i, each in enumerate(given) if each is Ellipsis)
            given[at : at + 1] = [slice(None)] * (len(open_dims) - len(given) + 1)
        if len(given) > len(open_dims):
            what = f"indexes {name_of(tensor)}, of {len(open_dims)} dimensions, with {len(given)} indices"
            raise self.recorder.refusal(what, "an index for each dimension", error=ValueError)
        indices: dict[int, Value] = dict(self.indices)
        fixed: list[Any] = [slice(None)] * tensor.dim()  # what needs no value is done at once: views
        for dim, each in zip(open_dims, map(self.recorder.taken, given)):
            if isinstance(each, Value) and each.kind not in _NO_INDICES:
                indices[dim] = each
            else:
                fixed[dim] = self._checked(dim, each)
        if any(each != slice(None) for each in fixed):
            tensor = tensor[tuple(fixed)]
            left = [dim for dim, each in enumerate(fixed) if type(each) is not int]
            indices = {left.index(dim): value for dim, value in indices.items()}
        return Part(self.recorder, tensor, indices).whole_or_self()

    def _checked(self, dim: int, index: Any) -> Any:
        """Python's index of a dimension."""
        if type(index) is slice and not any(isinstance(end, Value) for end in (index.start, index.stop, index.step)):
            return index
        if type(index) is not int:
            what = f"indexes {name_of(self.tensor)} with {kind_of(index)}"
            accepted = "integers, values of integers but uint8, which torch takes for a mask, and slices of numbers"
            raise self.recorder.refusal(what, accepted, "Write x.long()" if isinstance(index, Value) else "")
        size = self.tensor.shape[dim]
        if not -size <= index < size:
            what = f"indexes dimension {dim} of {name_of(self.tensor)}, of size {size}, with {index}"
            raise self.recorder.refusal(what, f"{-size} to {size - 1}", error=IndexError)
        return index

    def __len__(self) -> int:
        return next(size for dim, size in enumerate(self.tensor.shape) if dim not in self.indices)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(_any_recorder(args, kwargs), func, args, kwargs or {})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise part_refusal(self)

    __hash__ = object.__hash__


def part_refusal(part: Part) -> Exception:
    left = part.tensor.dim() - len(part.indices)
    what = (
        f"computes with {name_of(part.tensor)}, of which {left} dimension{'s are' if left > 1 else ' is'} not indexed"
    )
    return part.recorder.refusal(what, "its elements: an index for each dimension")


def kind_of(value: Any) -> str:
    if isinstance(value, Value):
        return f"a value of {value.kind}"
    return f"{value!r}" if isinstance(value, (*_NUMBERS, slice, type(None))) else f"a {type(value).__name__}"


class Value:
    """What a function computes with: a scalar to it, as under torch.vmap. Its operators are those of _operators.py."""

    __slots__ = ("kind", "number", "recorder")

    def __init__(self, recorder: Recorder, number: int, kind: str):
        self.recorder, self.number, self.kind = recorder, number, kind

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(_any_recorder(args, kwargs), func, args, kwargs or {})

    # ---- what a tensor of no dimensions says of itself ----

    @property
    def dtype(self) -> torch.dtype:
        return TORCH_DTYPES[self.kind]

    @property
    def device(self) -> torch.device:
        return self.recorder.device

    shape, ndim, requires_grad, is_cuda = torch.Size(()), 0, False, property(lambda self: self.device.type == "cuda")

    def dim(self) -> int:
        return 0

    def numel(self) -> int:
        return 1

    def size(self) -> torch.Size:
        return self.shape

    def is_floating_point(self) -> bool:
        return self.kind == FLOAT

    # ---- what has no answer while a function is traced ----

    def _refusal(self, what: str, advice: str) -> Exception:
        return self.recorder.refusal(
            f"{what} of a value that differs from pair to pair", "operators of tensors", advice
        )

    def __bool__(self) -> bool:
        raise self._refusal(
            "asks for the truth (if, and, or, not, min, max, a < b < c)",
            "Write torch.where(condition, a, b) for if, & | ~ for and, or, not, torch.minimum for min",
        )

    def __int__(self) -> int:
        raise self._refusal("asks for the int", "Write x.long(), or torch.floor(x)")

    def __index__(self) -> int:
        raise self._refusal(
            "asks for the number (range(), an index of a list)",
            "Index a tensor; a loop may run over Python's own numbers",
        )

    def __float__(self) -> float:
        raise self._refusal(
            "asks for the float (float(), a function of the module math)", "Write x.float(), torch.exp(x)"
        )

    def item(self) -> NoReturn:
        raise self._refusal("asks for the item()", "Compute with the value itself")

    def __len__(self) -> int:
        raise self._refusal("asks for the length", "A value is a tensor of no dimensions")

    def __iter__(self) -> Any:
        raise self._refusal("goes through the elements", "A value is a tensor of no dimensions")

    def __getitem__(self, index: Any) -> "Value":
        if index is Ellipsis or index == ():
            return self
        raise self.recorder.refusal("indexes a value, which has no dimensions", "indices of captured tensors")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise operator_refusal(self.recorder, f".{name}")

    __hash__ = object.__hash__


def operator_refusal(recorder: Recorder, name: str) -> Exception:
    from ._operators import OPERATORS

    return recorder.refusal(f"uses {name}, which is no operator of score functions", OPERATORS)


_BINARY = "add sub mul truediv floordiv mod pow matmul divmod and or xor lshift rshift".split()
_ONE = "neg pos abs invert bool int float index round trunc floor ceil format call".split()
_OF_PARTS = [
    *(f"__{side}{name}__" for name in _BINARY for side in ("", "r")),
    *(f"__{name}__" for name in (*_ONE, "eq", "ne", "lt", "le", "gt", "ge", "contains")),
]
# What Python has and no value does: its own answer would name no line, or be an object's that is never equal.
_OF_NO_VALUE = {
    "__matmul__": "@",
    "__rmatmul__": "@",
    "__divmod__": "divmod()",
    "__rdivmod__": "divmod()",
    "__round__": "round()",
    "__trunc__": "math.trunc()",
    "__format__": "format()",
    "__setitem__": "[...] =",
    "__call__": "a call of a value",
}


def _refuse(kind: type, name: str, refusal: Callable[[Any], Exception]) -> None:
    def refuse(self: Any, *_: Any) -> NoReturn:
        raise refusal(self)

    setattr(kind, name, refuse)


for _name in _OF_PARTS:
    _refuse(Part, _name, part_refusal)
for _name, _shown in _OF_NO_VALUE.items():
    _refuse(Value, _name, functools.partial(lambda shown, self: operator_refusal(self.recorder, shown), _shown))


def _any_recorder(args: Any, kwargs: Any) -> Recorder:
    for each in (*args, *(kwargs or {}).values()):
        if isinstance(each, (Value, Part)):
            return each.recorder
        if isinstance(each, (tuple, list)):
            found = _any_recorder(each, None)
            if found is not None:
                return found
    return None  # type: ignore[return-value]


def has_value(args: Any) -> bool:
    """Whether a value stands among arguments, or in a tuple or list of them."""
    for each in args:
        kind = type(each)
        if kind is Value or kind is Part or (kind in (tuple, list) and has_value(each)):
            return True
    return False


def _dispatch(recorder: Recorder, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    from ._operators import handler_of

    name = func.__name__
    if name == "__getitem__" and isinstance(args[0], torch.Tensor):
        return Part(recorder, args[0])[args[1]]
    handler = handler_of(func)
    if handler is None:
        raise operator_refusal(recorder, _name_of_function(func))
    args = [recorder.taken(each) for each in args]
    kwargs = {name: recorder.taken(each) for name, each in kwargs.items()}
    return call(recorder, handler, func, args, kwargs)


def call(recorder: Recorder, handler: Callable[..., Any], named: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """What stands for torch's function, or for the method of that name."""
    try:
        return handler(*args, **kwargs)
    except TypeError as error:
        # Of the call itself, an argument that it has not: no frame is below this one but a partial's.
        trace = error.__traceback__
        if trace is None or trace.tb_next is not None:
            raise
        name = named if isinstance(named, str) else _name_of_function(named)
        what, accepted = f"gives {name} arguments that it does not take here", "what torch documents, but for out="
        raise recorder.refusal(what, accepted, f"Python says: {error}", TypeError) from None


def _name_of_function(func: Any) -> str:
    return str(torch.overrides.resolve_name(func) or getattr(func, "__qualname__", repr(func)))


_FACTORIES = {"tensor", "scalar_tensor", "full", "zeros", "ones", "as_tensor"}


@functools.lru_cache(maxsize=1024)
def _is_random(name: str) -> bool:
    """Whether torch draws from a generator in an operator of that name."""
    packet = getattr(torch.ops.aten, name, None) if name and not name.startswith("__") else None
    overloads = packet.overloads() if isinstance(packet, torch._ops.OpOverloadPacket) else ()
    return any(torch.Tag.nondeterministic_seeded in getattr(packet, overload).tags for overload in overloads)


class Recording(TorchFunctionMode):
    """Brings what torch does to values to the recorder."""

    def __init__(self, recorder: Recorder):
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if has_value(args) or (kwargs and has_value(kwargs.values())):
            return _dispatch(self._recorder, func, args, kwargs)
        name = getattr(func, "__name__", "")
        if _is_random(name):
            what = f"uses {_name_of_function(func)}, which is random: its number would be one for all pairs"
            raise self._recorder.refusal(what, "tensors that are captured, made before")
        if name in _FACTORIES and not any(isinstance(each, torch.Tensor) for each in args):
            return self._number(func, args, kwargs)
        result = func(*args, **kwargs)
        recorder = self._recorder
        if recorder.made_here and any(map(recorder.is_made_here, args)) and isinstance(result, torch.Tensor):
            recorder.made_here[id(result)] = result
        return result

    def _number(self, func: Any, args: Any, kwargs: dict[str, Any]) -> torch.Tensor:
        """A tensor that the function makes of Python's numbers: of no dimensions it is a constant, which is never
        waited for on a device."""
        made: torch.Tensor = func(*args, **kwargs)
        if made.dim() != 0:
            return made
        if made.device.type != "cpu":
            made = func(*args, **{**kwargs, "device": "cpu"})
        self._recorder.made_here[id(made)] = made
        return made


def run(function: Callable[..., Any], recorder: Recorder, places: tuple[str, ...]) -> Value:
    """The value that a function has of those at the places."""
    recorder.entries.extend((place, FLOAT if place == "score" else "int64") for place in places)
    values = [Value(recorder, number, entry[1]) for number, entry in enumerate(recorder.entries)]
    signature = "score, b, h, q_idx, kv_idx" if len(places) == 5 else "b, h, q_idx, kv_idx"
    accepted = f"a function of ({signature})"
    if not callable(function):
        raise Refusal(recorder.argument, f"is {kind_of(function)}", accepted).exception()
    try:
        with Recording(recorder):
            result = function(*values)
    except TypeError as error:
        if error.__traceback__ is not None and error.__traceback__.tb_next is None:
            raise Refusal(recorder.argument, f"cannot be called ({error})", accepted).exception() from None
        raise
    return _value_of_result(recorder, function, result)


def _value_of_result(recorder: Recorder, function: Any, result: Any) -> Value:
    is_score = recorder.argument == "score_mod"
    accepted = "a number for each pair" if is_score else "a bool for each pair"
    if type(result) in _NUMBERS:
        kind = FLOAT if is_score else BOOL if type(result) is bool else "int64"
        result = recorder.constant(result, kind)
    else:
        result = recorder.taken(result)
    if isinstance(result, Part):
        came = f"returns a tensor of {result.tensor.dim() - len(result.indices)} dimensions"
    elif not isinstance(result, Value):
        came = f"returns {kind_of(result)}"
    elif not is_score and result.kind != BOOL:
        came = f"returns {result.kind}"
    else:
        return recorder.converted(result, FLOAT) if is_score else result
    code = getattr(function, "__code__", None)
    at = "" if code is None else f" ({code.co_filename}, line {code.co_firstlineno})"
    advice = "" if is_score or not isinstance(result, Value) else "Compare it: x != 0"
    raise Refusal(recorder.argument, came + at, accepted, advice).exception()
