"""Expressions of a score: nodes that are the same one where they compute the same, simplified as they are made.

A node has the type that torch would give it, and, of integers, the least and the most that it can be: what fits is
computed in 32 bits. Places (b, h, q_idx, kv_idx) are of torch's int64 and below 2^24."""

import ctypes
import hashlib
import math
from collections.abc import Callable, Iterable
from typing import Any

BOOL, FLOAT = "bool", "float32"
_BITS = {"uint8": (0, 8), "int8": (1, 8), "int16": (1, 16), "int32": (1, 32), "int64": (1, 64)}
RANGES: dict[str, tuple[int, int]] = {
    BOOL: (0, 1),
    **{
        name: (-(1 << bits - 1), (1 << bits - 1) - 1) if sign else (0, 2**bits - 1)
        for name, (sign, bits) in _BITS.items()
    },
}
INT32 = RANGES["int32"]
PLACES = ("b", "h", "q", "k")
MOST_PLACE = 2**24 - 1

# What a value depends on.
SCORE, BATCH, HEAD, QUERY, KEY = 1, 2, 4, 8, 16
OF_BLOCK = BATCH | HEAD
_DEPENDS = {"score": SCORE, "b": BATCH, "h": HEAD, "q": QUERY, "k": KEY, "unit": BATCH}

_COMMUTATIVE = {"add", "mul", "maximum", "minimum", "and", "or", "xor", "eq", "ne"}
COMPARISONS = {"lt", "le", "eq", "ne"}


class Node:
    """`value`: of a constant its value; of a load what is read; of a conversion nothing, its type says it."""

    __slots__ = ("args", "depends", "digest", "dtype", "least", "most", "op", "value")

    def __init__(self, op: str, args: tuple["Node", ...], dtype: str, value: Any, least: int, most: int):
        self.op, self.args, self.dtype, self.value, self.least, self.most = op, args, dtype, value, least, most
        depends: int = _DEPENDS.get(op, 0)
        for arg in args:
            depends |= arg.depends
        self.depends: int = depends
        text = f"{op} {dtype} {_text(value)} {' '.join(arg.digest for arg in args)}"
        self.digest: str = hashlib.blake2b(text.encode(), digest_size=12).hexdigest()

    @property
    def is_float(self) -> bool:
        return self.dtype == FLOAT

    @property
    def is_constant(self) -> bool:
        return self.op == "constant"

    @property
    def is_long(self) -> bool:
        """Whether an integer needs 64 bits."""
        return not self.is_float and not (INT32[0] <= self.least and self.most <= INT32[1])

    @property
    def is_of_block(self) -> bool:
        """Whether it is the same for all pairs of a batch entry's head."""
        return not self.depends & ~OF_BLOCK


def in_order(roots: Iterable[Node]) -> list[Node]:
    """All nodes that the roots are made of, each behind those it is made of."""
    ordered: list[Node] = []
    seen: set[int] = set()
    stack = [(root, False) for root in reversed(list(roots))]
    while stack:
        node, is_done = stack.pop()
        if is_done:
            ordered.append(node)
        elif id(node) not in seen:
            seen.add(id(node))
            stack.append((node, True))
            stack.extend((arg, False) for arg in reversed(node.args) if id(arg) not in seen)
    return ordered


def _text(value: Any) -> str:
    return value.hex() if type(value) is float else repr(value)


def to_float32(value: float) -> float:
    return ctypes.c_float(value).value


def wrapped(value: int, dtype: str) -> int:
    """As an integer of the type has it after an overflow."""
    if dtype == BOOL:
        return int(value != 0)
    sign, bits = _BITS[dtype]
    value &= (1 << bits) - 1
    return value - (1 << bits) if sign and value >> bits - 1 else value


class Expressions:
    """Makes nodes, each but once."""

    def __init__(self) -> None:
        self._nodes: dict[Any, Node] = {}

    # ---- leaves ----

    def constant(self, value: Any, dtype: str) -> Node:
        if dtype == FLOAT:
            value = to_float32(float(value))
            return self._node("constant", (), FLOAT, value)
        value = wrapped(int(value), dtype)
        return self._node("constant", (), dtype, value, value, value)

    def score(self) -> Node:
        return self._node("score", (), FLOAT, None)

    def unit(self) -> Node:
        """What a kernel multiplies natural scores with, which a block knows before its first one."""
        return self._node("unit", (), FLOAT, None)

    def place(self, name: str) -> Node:
        return self._node(name, (), "int64", None, 0, MOST_PLACE)

    def load(self, tensor: tuple[Any, ...], dtype: str, indices: Iterable[Node]) -> Node:
        """`tensor`: its number and what the code knows of it."""
        least, most = RANGES.get(dtype, (0, 0))
        return self._node("load", tuple(self._bare(index) for index in indices), dtype, tensor, least, most)

    # ---- all else ----

    def make(self, op: str, *args: Node, dtype: str | None = None) -> Node:
        """Of arguments of one type, but for where and shifts. `dtype`: of a conversion."""
        if op == "convert":
            assert dtype is not None
            return self._convert(args[0], dtype)
        if op in COMPARISONS:
            args = tuple(self._bare(arg) for arg in args)
            dtype = BOOL
        else:
            dtype = args[-1].dtype
        if all(arg.is_constant for arg in args):
            folded = self._folded(op, args, dtype)
            if folded is not None:
                return folded
        simple = getattr(self, f"_simplified_{op}", None)
        if simple is not None:
            found: Node | None = simple(*args)
            if found is not None:
                return found
        if op in _COMMUTATIVE and (args[0].is_constant, args[0].digest) > (args[1].is_constant, args[1].digest):
            args = (args[1], args[0])
        least, most = (0, 0) if dtype == FLOAT else self._range(op, args, dtype)
        return self._node(op, args, dtype, None, least, most)

    def _node(self, op: str, args: tuple[Node, ...], dtype: str, value: Any, least: int = 0, most: int = 0) -> Node:
        key = (op, dtype, _text(value), *map(id, args))
        node = self._nodes.get(key)
        if node is None:
            node = self._nodes[key] = Node(op, args, dtype, value, least, most)
        return node

    # ---- conversions ----

    @staticmethod
    def _bare(node: Node) -> Node:
        """An integer without conversions that leave its value."""
        while node.op == "convert" and not node.is_float and _keeps_value(node.args[0], node.dtype):
            node = node.args[0]
        return node

    def _convert(self, node: Node, dtype: str) -> Node:
        if node.dtype == dtype:
            return node
        if node.is_constant:
            return self._converted_constant(node.value, dtype)
        if dtype == BOOL:
            return self.make("ne", node, self.constant(0, node.dtype))
        if node.is_float:
            least, most = RANGES[dtype]
            return self._node("convert", (node,), dtype, None, max(least, INT32[0]), min(most, INT32[1]))
        bare = self._bare(node)
        if bare.dtype == dtype:
            return bare
        if dtype == FLOAT:
            return self._node("convert", (bare,), FLOAT, None)
        if _keeps_value(bare, dtype):
            return self._node("convert", (bare,), dtype, None, bare.least, bare.most)
        return self._node("convert", (bare,), dtype, None, *RANGES[dtype])

    def _converted_constant(self, value: Any, dtype: str) -> Node:
        if type(value) is float and dtype not in (FLOAT, BOOL):
            value = 0 if math.isnan(value) else int(min(max(value, INT32[0]), INT32[1]))
        if dtype == BOOL:
            value = value != 0
        return self.constant(value, dtype)

    # ---- constants ----

    def _folded(self, op: str, args: tuple[Node, ...], dtype: str) -> Node | None:
        fold = FOLDS.get(op)
        if fold is None:
            return None
        try:
            return self.constant(fold(*(arg.value for arg in args)), dtype)
        except (ArithmeticError, ValueError):  # what Python refuses and the machine has a number for
            return None

    # ---- what simplifies; None: nothing ----

    def _simplified_add(self, a: Node, b: Node) -> Node | None:
        for one, other in ((a, b), (b, a)):
            if one.is_constant and one.value == 0:
                return other
            if one.op == "neg" and one.is_float:
                return self.make("sub", other, one.args[0])
        return None

    def _simplified_sub(self, a: Node, b: Node) -> Node | None:
        if b.is_constant and b.value == 0:
            return a
        if b.is_constant and b.is_float:
            return self.make("add", a, self.constant(-b.value, FLOAT))
        if a.is_constant and a.value == 0:
            return self.make("neg", b)
        if b.op == "neg" and b.is_float:
            return self.make("add", a, b.args[0])
        return self.constant(0, a.dtype) if a is b and not a.is_float else None

    def _simplified_mul(self, a: Node, b: Node) -> Node | None:
        for one, other in ((a, b), (b, a)):
            if one.is_constant and one.value == 1:
                return other
            if one.is_constant and one.value == -1:
                return self.make("neg", other)
            if one.is_constant and one.value == 0 and not one.is_float:
                return one
            if one.op == "neg" and one.is_float and not other.is_constant:
                return self.make("neg", self.make("mul", one.args[0], other))
            if one.op == "neg" and one.is_float and other.is_constant:
                return self.make("mul", one.args[0], self.constant(-other.value, FLOAT))
        return None

    def _simplified_div(self, a: Node, b: Node) -> Node | None:
        if b.is_constant and b.value in (1, -1):
            return a if b.value == 1 else self.make("neg", a)
        if b.is_constant and math.frexp(b.value)[0] in (0.5, -0.5) and 1e-30 < abs(b.value) < 1e30:
            return self.make("mul", a, self.constant(1 / b.value, FLOAT))  # exact: of a power of two
        return None

    def _simplified_neg(self, a: Node) -> Node | None:
        if a.op == "sub" and a.is_float:
            return self.make("sub", a.args[1], a.args[0])
        return a.args[0] if a.op == "neg" else None

    def _simplified_abs(self, a: Node) -> Node | None:
        if a.is_float:
            return self.make("abs", a.args[0]) if a.op == "neg" else a if a.op == "abs" else None
        return a if a.least >= 0 else None

    def _simplified_maximum(self, a: Node, b: Node) -> Node | None:
        if a is b:
            return a
        if not a.is_float and (a.least >= b.most or b.least >= a.most):
            return a if a.least >= b.most else b
        return None

    def _simplified_minimum(self, a: Node, b: Node) -> Node | None:
        if a is b:
            return a
        if not a.is_float and (a.most <= b.least or b.most <= a.least):
            return a if a.most <= b.least else b
        return None

    def _simplified_where(self, condition: Node, a: Node, b: Node) -> Node | None:
        if condition.is_constant:
            return a if condition.value else b
        if a is b:
            return a
        if condition.op == "not":
            return self.make("where", condition.args[0], b, a)
        # One after the other on the same condition.
        if a.op == "where" and a.args[0] is condition:
            return self.make("where", condition, a.args[1], b)
        if b.op == "where" and b.args[0] is condition:
            return self.make("where", condition, a, b.args[2])
        return None

    def _simplified_not(self, a: Node) -> Node | None:
        if a.op == "not":
            return a.args[0]
        if a.is_constant:
            return self.constant(not a.value if a.dtype == BOOL else ~a.value, a.dtype)
        if a.dtype == BOOL and a.op in COMPARISONS:
            if a.op in ("eq", "ne"):
                return self.make("ne" if a.op == "eq" else "eq", *a.args)
            if not a.args[0].is_float:
                return self.make("lt" if a.op == "le" else "le", a.args[1], a.args[0])
        return None

    def _simplified_and(self, a: Node, b: Node) -> Node | None:
        for one, other in ((a, b), (b, a)):
            if one.is_constant and one.value == 0:
                return one
            if one.is_constant and (one.value == -1 or (one.dtype == BOOL and one.value == 1)):
                return other
        return a if a is b else None

    def _simplified_or(self, a: Node, b: Node) -> Node | None:
        for one, other in ((a, b), (b, a)):
            if one.is_constant and one.value == 0:
                return other
            if one.is_constant and (one.value == -1 or (one.dtype == BOOL and one.value == 1)):
                return one
        return a if a is b else None

    def _simplified_xor(self, a: Node, b: Node) -> Node | None:
        for one, other in ((a, b), (b, a)):
            if one.is_constant and one.value == 0:
                return other
            if one.is_constant and one.dtype == BOOL:
                return self.make("not", other)
        return None

    def _simplified_eq(self, a: Node, b: Node) -> Node | None:
        if not a.is_float and (a is b or a.most < b.least or b.most < a.least):
            return self.constant(a is b, BOOL)
        return None

    def _simplified_ne(self, a: Node, b: Node) -> Node | None:
        if not a.is_float and (a is b or a.most < b.least or b.most < a.least):
            return self.constant(a is not b, BOOL)
        if a.dtype == BOOL and b.is_constant:
            return a if b.value == 0 else self.make("not", a)
        return None

    def _simplified_lt(self, a: Node, b: Node) -> Node | None:
        if a.is_float:
            return None
        if a is b or a.least >= b.most:
            return self.constant(False, BOOL)
        return self.constant(True, BOOL) if a.most < b.least else None

    def _simplified_le(self, a: Node, b: Node) -> Node | None:
        if a.is_float:
            return None
        if a is b or a.most <= b.least:
            return self.constant(True, BOOL)
        return self.constant(False, BOOL) if a.least > b.most else None

    def _simplified_pow(self, a: Node, b: Node) -> Node | None:
        if b.is_constant and b.value in (0, 1):
            return a if b.value == 1 else self.constant(1, FLOAT)
        return None

    def _simplified_shl(self, a: Node, b: Node) -> Node | None:
        if b.is_constant and 0 <= b.value < _BITS[a.dtype][1] - 1:
            return self.make("mul", a, self.constant(1 << b.value, a.dtype))
        return None

    # ---- the least and the most of integers ----

    def _range(self, op: str, args: tuple[Node, ...], dtype: str) -> tuple[int, int]:
        if dtype == BOOL:
            return 0, 1
        rule = _RANGE_RULES.get(op)
        least, most = rule(*args[-2:]) if rule else RANGES[dtype]
        of_type = RANGES[dtype]
        # An integer of a tensor and a place, which 2^24 bounds: in 32 bits if both are.
        if op in ("add", "sub", "neg") and not any(arg.is_long for arg in args):
            of_type = max(of_type[0], INT32[0]), min(of_type[1], INT32[1])
        return (least, most) if of_type[0] <= least and most <= of_type[1] else of_type


def _keeps_value(node: Node, dtype: str) -> bool:
    least, most = RANGES[dtype]
    return not node.is_float and least <= node.least and node.most <= most


def _corners(combine: Callable[[int, int], int]) -> Callable[[Node, Node], tuple[int, int]]:
    def bounds(a: Node, b: Node) -> tuple[int, int]:
        values = [combine(x, y) for x in (a.least, a.most) for y in (b.least, b.most)]
        return min(values), max(values)

    return bounds


def _remainder_range(a: Node, b: Node) -> tuple[int, int]:
    if a.least >= 0 and b.least > 0:
        return 0, min(a.most, b.most - 1)
    return min(b.least + 1, 0), max(b.most - 1, 0)


def _fmod_range(a: Node, b: Node) -> tuple[int, int]:
    most = max(abs(b.least), abs(b.most), 1) - 1
    return (0 if a.least >= 0 else -most), (0 if a.most <= 0 else most)


def _quotient_range(a: Node, b: Node) -> tuple[int, int]:
    if b.least > 0:
        return _corners(lambda x, y: x // y)(a, b)
    most = max(abs(a.least), abs(a.most))
    return -most - 1, most + 1


def _bits_range(a: Node, b: Node) -> tuple[int, int]:
    bits = max(value.bit_length() for value in (a.least, a.most, b.least, b.most))
    return (0 if a.least >= 0 and b.least >= 0 else -(1 << bits)), (1 << bits) - 1


def _and_range(a: Node, b: Node) -> tuple[int, int]:
    for one, other in ((a, b), (b, a)):
        if one.least >= 0:
            return 0, min(one.most, other.most) if other.least >= 0 else one.most
    return _bits_range(a, b)


def _left_shift_range(a: Node, b: Node) -> tuple[int, int]:
    return _corners(lambda x, y: x << y)(a, b) if b.least >= 0 and b.most < 64 else RANGES["int64"]


def _right_shift_range(a: Node, b: Node) -> tuple[int, int]:
    return _corners(lambda x, y: x >> y)(a, b) if b.least >= 0 and b.most < 64 else (min(a.least, -1), max(a.most, 0))


_RANGE_RULES: dict[str, Callable[..., tuple[int, int]]] = {
    "add": lambda a, b: (a.least + b.least, a.most + b.most),
    "sub": lambda a, b: (a.least - b.most, a.most - b.least),
    "mul": _corners(lambda x, y: x * y),
    "neg": lambda a: (-a.most, -a.least),
    "abs": lambda a: (0 if a.least <= 0 <= a.most else min(abs(a.least), abs(a.most)), max(abs(a.least), abs(a.most))),
    "maximum": lambda a, b: (max(a.least, b.least), max(a.most, b.most)),
    "minimum": lambda a, b: (min(a.least, b.least), min(a.most, b.most)),
    "clamp_min": lambda a, b: (max(a.least, b.least), max(a.most, b.most)),
    "clamp_max": lambda a, b: (min(a.least, b.least), min(a.most, b.most)),
    "where": lambda a, b: (min(a.least, b.least), max(a.most, b.most)),
    "sign": lambda a: (-1 if a.least < 0 else 0, 1 if a.most > 0 else 0),
    "floordiv": _quotient_range,
    "truncdiv": _quotient_range,
    "remainder": _remainder_range,
    "fmod": _fmod_range,
    "and": _and_range,
    "or": _bits_range,
    "xor": _bits_range,
    "not": lambda a: (~a.most, ~a.least),
    "shl": _left_shift_range,
    "shr": _right_shift_range,
}


def _round_even(value: float) -> float:
    return float(round(value)) if math.isfinite(value) else value


def _whole(rounding: Callable[[float], int]) -> Callable[[float], float]:
    return lambda value: float(rounding(value)) if math.isfinite(value) else value


def _sign(value: Any) -> Any:
    return type(value)((value > 0) - (value < 0))


def _fmod(a: Any, b: Any) -> Any:
    return math.fmod(a, b) if isinstance(a, float) else abs(a) % abs(b) * (-1 if a < 0 else 1)


def _nan_first(choose: Callable[..., Any]) -> Callable[..., Any]:
    return lambda a, b: a if a != a else b if b != b else choose(a, b)


# Of constants.
FOLDS: dict[str, Callable[..., Any]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "neg": lambda a: -a,
    "abs": abs,
    "maximum": _nan_first(max),
    "minimum": _nan_first(min),
    "where": lambda condition, a, b: a if condition else b,
    "sign": _sign,
    "floordiv": lambda a, b: a // b,
    "remainder": lambda a, b: a % b,
    "fmod": _fmod,
    "truncdiv": lambda a, b: abs(a) // abs(b) * (-1 if (a < 0) != (b < 0) else 1),
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "shl": lambda a, b: a << min(b, 64),
    "shr": lambda a, b: a >> b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "floor": _whole(math.floor),
    "ceil": _whole(math.ceil),
    "trunc": _whole(math.trunc),
    "round": _round_even,
    "sqrt": math.sqrt,
    "rsqrt": lambda a: 1 / math.sqrt(a),
    "exp": math.exp,
    "exp2": lambda a: 2.0**a,
    "log": math.log,
    "log2": math.log2,
    "log1p": math.log1p,
    "tanh": math.tanh,
    "sin": math.sin,
    "cos": math.cos,
    "erf": math.erf,
    "sigmoid": lambda a: 1 / (1 + math.exp(-a)),
    "relu": lambda a: 0.0 if a < 0 else a,
    "clamp_min": _nan_first(max),
    "clamp_max": _nan_first(min),
    "pow": math.pow,
}
