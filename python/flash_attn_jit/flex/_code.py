"""CUDA C++ of expressions: the structs UserScore and UserMask, made of what templates/user_reads.cuh includes.

What depends on a block's batch entry and head alone is computed in prepare() and kept in members."""

import math
from collections.abc import Callable, Iterable, Sequence

from ._derivative import addend_of, derivative_of, scaled_sum
from ._expressions import (
    _RANGE_RULES,
    BOOL,
    COMPARISONS,
    FLOAT,
    INT32,
    KEY,
    PLACES,
    QUERY,
    RANGES,
    Expressions,
    Node,
    in_order,
)
from ._lowering import lowered

_PLACE_ARGUMENTS = "int b, int h, int q, int k"
_HEAD = "  __device__ __forceinline__ "
_ELEMENTS = {
    "float32": "UserFloat32",
    "float16": "UserFloat16",
    "bfloat16": "UserBfloat16",
    "int64": "UserInt64",
    "int32": "UserInt32",
    "int16": "UserInt16",
    "int8": "UserInt8",
    "uint8": "UserUint8",
    "bool": "UserBool",
}


# A product's digits are below 1e-3 of what is greater; numbers that are put in the place of -inf are.
_LARGE = 1e4


def may_be_large(root: Node) -> bool:
    """Whether a score may become so large that its own digits are gone: by a constant, or by numbers that a tensor has
    for places of queries or keys, where masks keep theirs. What float16 holds is not."""
    for node in in_order([root]):
        if node.is_constant and math.isfinite(node.value) and abs(node.value) >= _LARGE:
            return True
        if node.op == "load" and node.value[1][0] in ("float32", "bfloat16") and node.depends & (QUERY | KEY):
            return True
    return False


def score_code(x: Expressions, root: Node | None) -> str:
    """The struct UserScore. None: a score stays what it is."""
    score = x.score()
    root = score if root is None else root
    addend = addend_of(x, root)
    derivative = derivative_of(x, root)
    is_one = derivative.is_constant and derivative.value == 1
    constants = {
        "kIsAdditive": addend is not None,
        "kIsLarge": may_be_large(root),
        "kHasDerivative": addend is None and not is_one,
    }
    struct = _Struct("UserScore", constants)
    struct.function(
        "float score(const UserTensors& tensors, float score, " + _PLACE_ARGUMENTS + ") const", lowered(x, [root])
    )
    slope = x.constant(1.0, FLOAT) if addend is not None else derivative
    struct.function(
        f"float score(const UserTensors& tensors, float score, {_PLACE_ARGUMENTS}, float& derivative) const",
        lowered(x, [root, slope]),
    )
    if addend is not None:
        struct.function(f"float addend(const UserTensors& tensors, {_PLACE_ARGUMENTS}) const", lowered(x, [addend]))
        struct.function(
            f"float scaled_sum(const UserTensors& tensors, float score, {_PLACE_ARGUMENTS}) const",
            lowered(x, [scaled_sum(x, addend)]),
        )
    return struct.text("const UserTensors& tensors, int b, int h, float unit = 1.0f")


def mask_code(x: Expressions, root: Node | None) -> str:
    """The struct UserMask. None: it shows all pairs."""
    root = x.constant(True, BOOL) if root is None else root
    struct = _Struct("UserMask", {"kIsTrivial": root.is_constant and bool(root.value)})
    struct.function(f"bool shows(const UserTensors& tensors, {_PLACE_ARGUMENTS}) const", lowered(x, [root]))
    return struct.text("const UserTensors& tensors, int b, int h")


class _Struct:
    """A struct's functions, and the members that they share."""

    def __init__(self, name: str, constants: dict[str, bool]):
        self._name, self._constants = name, constants
        self._functions: list[str] = []
        self._members: dict[int, tuple[Node, str]] = {}  # a node's id -> it, and its member's name
        self._offsets: dict[str, tuple[str, str]] = {}  # what an offset is the sum of -> its type and its member's name
        self.prepared = _Function(self, is_prepare=True)

    def function(self, signature: str, roots: Sequence[Node]) -> None:
        body = _Function(self)
        names = [body.name_of(root) for root in roots]
        if len(names) > 1:
            body.lines.append(f"derivative = {names[1]};")
        body.lines.append(f"return {names[0]};")
        self._functions.append(_block(signature, body.lines))

    def member_of(self, node: Node) -> str:
        found = self._members.get(id(node))
        if found is None:
            found = self._members[id(node)] = node, f"m{len(self._members)}_"
            self.prepared.lines.append(f"{found[1]} = {self.prepared.name_of(node)};")
        return found[1]

    def offset_member(self, terms: str, type_name: str) -> str:
        if terms not in self._offsets:
            self._offsets[terms] = type_name, f"at{len(self._offsets)}_"
            self.prepared.lines.append(f"{self._offsets[terms][1]} = {terms};")
        return self._offsets[terms][1]

    def text(self, arguments: str) -> str:
        constants = ", ".join(f"{name} = {'true' if value else 'false'}" for name, value in self._constants.items())
        members = [f"  {_type(node)} {name};" for node, name in self._members.values()]
        members += [f"  {type_name} {name};" for type_name, name in self._offsets.values()]
        parts = [f"struct {self._name} {{", f"  static constexpr bool {constants};"]
        parts += [_block(f"void prepare({arguments})", self.prepared.lines), *self._functions]
        if members:
            parts += [" private:", *members]
        return "\n".join(parts) + "\n};\n"


def _block(signature: str, lines: Iterable[str]) -> str:
    return "\n".join([f"{_HEAD}{signature} {{", *(f"    {line}" for line in lines), "  }"])


class _Function:
    """Statements that give nodes names, each its own."""

    def __init__(self, struct: _Struct, is_prepare: bool = False):
        self._struct, self._is_prepare = struct, is_prepare
        self.lines: list[str] = []
        self._names: dict[int, str] = {}

    def name_of(self, root: Node) -> str:
        for node in self._needed(root):
            self._names[id(node)] = self._name(node)
        return self._names[id(root)]

    def _needed(self, root: Node) -> list[Node]:
        """What is not made by prepare()."""
        if self._is_prepare:
            return [node for node in in_order([root]) if id(node) not in self._names]
        ordered: list[Node] = []
        stack = [(root, False)]
        seen: set[int] = set()
        while stack:
            node, is_done = stack.pop()
            if is_done:
                ordered.append(node)
            elif id(node) not in seen and id(node) not in self._names:
                seen.add(id(node))
                stack.append((node, True))
                if not self._is_member(node):
                    skipped = _block_indices(node)
                    stack.extend((arg, False) for arg in reversed(node.args) if arg not in skipped)
        return ordered

    def _is_member(self, node: Node) -> bool:
        return not self._is_prepare and node.is_of_block and not node.is_constant and node.op not in PLACES

    def _name(self, node: Node) -> str:
        if node.is_constant:
            return _literal(node)
        if node.op in ("score", *PLACES) or (self._is_prepare and node.op == "unit"):
            return node.op
        if self._is_member(node):
            return self._struct.member_of(node)
        name = f"v{len(self.lines)}"
        code = self._load(node) if node.op == "load" else _code_of(node, [self._names[id(arg)] for arg in node.args])
        self.lines.append(f"const {_type(node)} {name} = {code};")
        return name

    def _load(self, node: Node) -> str:
        number, (element, are_units, is_narrow) = node.value[0], node.value[1]
        tensor = f"tensors.tensor[{number}]"
        offset = "int" if is_narrow else "long long"

        def term(dim: int, index: str) -> str:
            kinds = [offset, *("true" if each else "false" for each in (node.args[dim].least < 0, are_units[dim]))]
            return f"user_offset<{', '.join(kinds)}>({tensor}, {dim}, {index})"

        of_block = [] if self._is_prepare else [dim for dim, arg in enumerate(node.args) if arg.is_of_block]
        terms = []
        if of_block:
            prepared = self._struct.prepared
            indices = [prepared.name_of(node.args[dim]) for dim in of_block]
            terms.append(self._struct.offset_member(" + ".join(map(term, of_block, indices)), offset))
        terms += [term(dim, self._names[id(arg)]) for dim, arg in enumerate(node.args) if dim not in of_block]
        return f"load_user<{_ELEMENTS[element]}>({tensor}, {' + '.join(terms) or '0'})"


def _block_indices(node: Node) -> list[Node]:
    """Of a load's indices those whose part of the address prepare() computes."""
    return [arg for arg in node.args if arg.is_of_block] if node.op == "load" else []


# ---- a node's type, and the text of constants ----


def _type(node: Node) -> str:
    if node.dtype in (FLOAT, BOOL):
        return "float" if node.dtype == FLOAT else "bool"
    return "long long" if node.is_long else "int"


def _literal(node: Node) -> str:
    value = node.value
    if node.dtype == BOOL:
        return "true" if value else "false"
    if not node.is_float:
        if value == RANGES["int64"][0]:
            return f"({value + 1}ll - 1)"
        if value == INT32[0]:
            return f"({value + 1} - 1)"
        text = f"{value}ll" if node.is_long else str(value)
        return f"({text})" if value < 0 else text
    if math.isnan(value):
        return "not_a_number()"
    if math.isinf(value):
        return "infinity()" if value > 0 else "(-infinity())"
    text = repr(value) if value == round(value) and abs(value) < 1e6 else _hexadecimal(value)
    return f"({text}f)" if math.copysign(1, value) < 0 else f"{text}f"


def _hexadecimal(value: float) -> str:
    """Without the zeros that float32 leaves of a double's digits."""
    digits, exponent = value.hex().split("p")
    return f"{digits.rstrip('0').rstrip('.')}p{exponent}"


# ---- operators ----


def _code_of(node: Node, names: list[str]) -> str:
    if node.op == "convert":
        return _conversion(node, names[0])
    if node.op in COMPARISONS:
        sign = {"lt": "<", "le": "<=", "eq": "==", "ne": "!="}[node.op]
        return f"{names[0]} {sign} {names[1]}"
    if node.op == "where":
        return f"{names[0]} ? {names[1]} : {names[2]}"
    if node.dtype == BOOL:
        return _OF_BOOLS[node.op].format(*names)
    if not node.is_float:
        return _integer_code(node, names)
    if node.op in ("maximum", "clamp_min") and _is_number(node.args[1]):
        return f"{names[0]} < {names[1]} ? {names[1]} : {names[0]}"
    if node.op in ("minimum", "clamp_max") and _is_number(node.args[1]):
        return f"{names[1]} < {names[0]} ? {names[1]} : {names[0]}"
    form = _OF_FLOATS.get(node.op)
    return form.format(*names) if form else f"{_NAMES.get(node.op, node.op + '_of')}({', '.join(names)})"


def _is_number(node: Node) -> bool:
    """Whether it is never NaN: a comparison with it is false where the other one is."""
    return (node.is_constant and node.value == node.value) or (node.op == "convert" and not node.args[0].is_float)


def _conversion(node: Node, name: str) -> str:
    (arg,) = node.args
    if arg.dtype == BOOL and node.is_float:
        return f"{name} ? 1.0f : 0.0f"
    if node.is_float:
        return f"static_cast<float>({name})"
    if arg.is_float:
        return _narrowed(node.dtype, f"to_int({name})")
    return _narrowed(node.dtype, name) if _type(node) == "int" else f"static_cast<long long>({name})"


_NARROW = {"int8": "signed char", "uint8": "unsigned char", "int16": "short", "int32": "int"}


def _narrowed(dtype: str, code: str) -> str:
    return f"static_cast<{_NARROW[dtype]}>({code})" if dtype in _NARROW else code


_OF_BOOLS = {
    "and": "{0} & {1}",
    "or": "{0} | {1}",
    "xor": "{0} != {1}",
    "not": "!{0}",
    "maximum": "{0} | {1}",
    "minimum": "{0} & {1}",
}
_OF_FLOATS = {
    "add": "{0} + {1}",
    "sub": "{0} - {1}",
    "mul": "{0} * {1}",
    "neg": "-{0}",
    "relu": "{0} < 0.0f ? 0.0f : {0}",
}
# Functions of the templates; others are called after their operators.
_NAMES = {
    "abs": "absolute",
    "div": "divide",
    "fma": "fma_rounded",
    "mul_rounded": "multiply_rounded",
    "reciprocal": "reciprocal",
    "maximum": "maximum_or_nan",
    "minimum": "minimum_or_nan",
    "clamp_min": "maximum_or_nan",
    "clamp_max": "minimum_or_nan",
    "floor": "round_down",
    "ceil": "round_up",
    "trunc": "round_to_zero",
    "round": "round_to_even",
    "floordiv": "floor_quotient",
    "truncdiv": "truncated_quotient",
    "remainder": "floor_remainder",
    "fmod": "truncated_remainder",
    "shl": "shift_left",
    "shr": "shift_right",
}
_OF_INTEGERS: dict[str, str] = {
    "add": "{0} + {1}",
    "sub": "{0} - {1}",
    "mul": "{0} * {1}",
    "neg": "-{0}",
    "abs": "{0} < 0 ? -{0} : {0}",
    "maximum": "{0} < {1} ? {1} : {0}",
    "minimum": "{1} < {0} ? {1} : {0}",
    "clamp_min": "{0} < {1} ? {1} : {0}",
    "clamp_max": "{1} < {0} ? {1} : {0}",
    "sign": "(0 < {0}) - ({0} < 0)",
    "and": "{0} & {1}",
    "or": "{0} | {1}",
    "xor": "{0} ^ {1}",
    "not": "~{0}",
}
_WRAPPED = {"add": "add_wrapped", "sub": "subtract_wrapped", "mul": "multiply_wrapped", "neg": "negate_wrapped"}


def _integer_code(node: Node, names: list[str]) -> str:
    is_long = node.is_long or any(arg.is_long for arg in node.args)
    names = [
        f"static_cast<long long>({name})" if is_long and not arg.is_long else name
        for name, arg in zip(names, node.args)
    ]
    code = _in_registers(node, names, RANGES["int64" if is_long else "int32"])
    if is_long and not node.is_long:
        code = f"static_cast<int>({code})"
    return code if node.dtype == "int64" or _bounds(node) == (node.least, node.most) else _narrowed(node.dtype, code)


def _bounds(node: Node) -> tuple[int, int]:
    """What it would be without an overflow."""
    rule: Callable[..., tuple[int, int]] | None = _RANGE_RULES.get(node.op)
    return rule(*node.args[-2:]) if rule else (node.least, node.most)


def _in_registers(node: Node, names: list[str], register: tuple[int, int]) -> str:
    least, most = _bounds(node)
    divisor = node.args[-1]
    if node.op == "abs" and most > register[1]:
        return f"{names[0]} < 0 ? negate_wrapped({names[0]}) : {names[0]}"
    if node.op in _WRAPPED and not (register[0] <= least and most <= register[1]):
        return f"{_WRAPPED[node.op]}({', '.join(names)})"
    if node.op in ("floordiv", "remainder") and divisor.is_constant and divisor.value > 0:
        if divisor.value & (divisor.value - 1) == 0:
            shift = divisor.value.bit_length() - 1
            return f"{names[0]} >> {shift}" if node.op == "floordiv" else f"{names[0]} & {divisor.value - 1}"
        if node.args[0].least >= 0 and register == INT32:
            sign = "/" if node.op == "floordiv" else "%"
            return f"static_cast<int>(static_cast<unsigned>({names[0]}) {sign} {divisor.value}u)"
    if node.op == "shr" and divisor.is_constant and 0 <= divisor.value < 32:
        return f"{names[0]} >> {divisor.value}"
    form = _OF_INTEGERS.get(node.op)
    return form.format(*names) if form else f"{_NAMES[node.op]}({', '.join(names)})"
