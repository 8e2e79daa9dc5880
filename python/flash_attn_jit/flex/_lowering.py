"""Expressions as the machine should compute them: divisions become products where that is as good, products and sums
one instruction, powers products."""

import math
from collections.abc import Sequence

from ._expressions import COMPARISONS, FLOAT, SCORE, Expressions, Node, in_order

# Where a value has a jump: an error of the last digit before it is one of a whole step behind it.
_JUMPS = {"floor", "ceil", "trunc", "round", "floordiv", "remainder", "fmod", "sign", "convert", *COMPARISONS}
_MOST_MULTIPLIED_POWER = 16


def lowered(x: Expressions, roots: Sequence[Node]) -> list[Node]:
    nodes = in_order(roots)
    exact = _before_jumps(nodes)
    done: dict[int, Node] = {}
    for node in nodes:
        args = tuple(done[id(arg)] for arg in node.args)
        done[id(node)] = _lowered(x, node, args, id(node) in exact)
    return [done[id(root)] for root in roots]


def _before_jumps(nodes: list[Node]) -> set[int]:
    """Nodes of which a jump is made, rounded as torch rounds them. Those of a score differ from torch's anyway."""
    exact: set[int] = set()
    for node in reversed(nodes):
        if node.op in _JUMPS or id(node) in exact:
            exact.update(id(arg) for arg in node.args if arg.is_float and not arg.depends & SCORE)
    return exact


def _lowered(x: Expressions, node: Node, args: tuple[Node, ...], is_exact: bool) -> Node:
    if node.op == "detach":
        return args[0]
    if not node.is_float or not args:
        return _same(x, node, args)
    if node.op == "pow":
        return _power(x, *args)
    if node.op == "div" and not is_exact:
        return _divided(x, *args)
    if node.op == "mul" and is_exact:
        return x.make("mul_rounded", *args)
    if node.op in ("add", "sub") and not is_exact:
        return _fused(x, node.op, *args)
    return _same(x, node, args)


def _same(x: Expressions, node: Node, args: tuple[Node, ...]) -> Node:
    if not args:
        return node
    if node.op == "load":
        return x.load(node.value, node.dtype, args)
    return x.make(node.op, *args, dtype=node.dtype)


def _divided(x: Expressions, a: Node, b: Node) -> Node:
    if b.is_constant:
        is_ordinary = 2.0**-100 < abs(b.value) < 2.0**100
        return x.make("mul", a, x.constant(1 / b.value, FLOAT)) if is_ordinary else x.make("div", a, b)
    return x.make("mul", a, x.make("reciprocal", b))


def _fused(x: Expressions, op: str, a: Node, b: Node) -> Node:
    """a x b + c of one product; one that a block knows is computed before."""
    if b.op == "mul" and not b.is_of_block:
        factor = x.make("neg", b.args[0]) if op == "sub" else b.args[0]
        return x.make("fma", factor, b.args[1], a)
    if a.op == "mul" and not a.is_of_block:
        return x.make("fma", *a.args, x.make("neg", b) if op == "sub" else b)
    # -(a b) + c is c - a b to Expressions.
    return x.make(op, a, b)


def _power(x: Expressions, base: Node, exponent: Node) -> Node:
    if exponent.is_constant and math.isfinite(exponent.value):
        if exponent.value in (0.5, -0.5):
            return x.make("sqrt" if exponent.value > 0 else "rsqrt", base)
        whole = int(exponent.value)
        if whole == exponent.value and abs(whole) <= _MOST_MULTIPLIED_POWER:
            power = _product(x, base, abs(whole))
            return power if whole >= 0 else x.make("reciprocal", power)
    return x.make("pow", base, exponent)


def _product(x: Expressions, base: Node, exponent: int) -> Node:
    if exponent <= 1:
        return base if exponent else x.constant(1.0, FLOAT)
    half = _product(x, base, exponent // 2)
    square = x.make("mul", half, half)
    return x.make("mul", square, base) if exponent % 2 else square
