"""What a score function does to a score: what it adds, where the score takes no part in that, or its derivative, by a
rule for each operator.

A derivative of None is 0 everywhere. Where a value is chosen its derivative is chosen, too: what is not chosen may be
infinite, and a product with it NaN."""

import math
from collections.abc import Callable

from ._expressions import FLOAT, SCORE, Expressions, Node, in_order

Derivative = Node | None
_Rule = Callable[..., Derivative]


def addend_of(x: Expressions, root: Node) -> Derivative:
    """Where it is score + addend, the addend; -inf where the function replaces the score with that."""
    addends: dict[int, Derivative] = {}
    for node in in_order([root]):
        addends[id(node)] = _addend(x, node, addends)
    return addends[id(root)]


def _addend(x: Expressions, node: Node, addends: dict[int, Derivative]) -> Derivative:
    if node.op == "score":
        return x.constant(0.0, FLOAT)
    if node.op == "add":
        for one, other in (node.args, node.args[::-1]):
            addend = addends[id(one)]
            if addend is not None and not other.depends & SCORE:
                return x.make("add", addend, other)
    if node.op == "sub" and not node.args[1].depends & SCORE:
        addend = addends[id(node.args[0])]
        return None if addend is None else x.make("sub", addend, node.args[1])
    if node.op == "where" and not node.args[0].depends & SCORE:
        first, second = (_hidden_or(each, addends[id(each)]) for each in node.args[1:])
        if first is not None and second is not None and node.depends & SCORE:
            return x.make("where", node.args[0], first, second)
    return None


def _hidden_or(node: Node, addend: Derivative) -> Derivative:
    return node if node.is_constant and node.value == -math.inf else addend


def scaled_sum(x: Expressions, addend: Node) -> Node:
    """score + addend x unit, of a score in units."""
    return _with_addend(x, x.score(), addend, _MOST_TERMS)


_MOST_TERMS = 50  # one after the other, each a product and a sum in one


def _with_addend(x: Expressions, total: Node, node: Node, depth: int) -> Node:
    if depth > 0 and not node.is_of_block:
        if node.op in ("add", "sub"):
            a, b = node.args
            total = _with_addend(x, total, a, depth - 1)
            return _with_addend(x, total, b if node.op == "add" else x.make("neg", b), depth - 1)
        if node.op == "where" and any(_ends_a_sum(arg) for arg in node.args[1:]):
            chosen = (_chosen_addend(x, total, arg, depth - 1) for arg in node.args[1:])
            return x.make("where", node.args[0], *chosen)
    return x.make("add", total, _in_units(x, node))


def _ends_a_sum(node: Node) -> bool:
    return node.is_constant and node.value in (0, -math.inf)


def _chosen_addend(x: Expressions, total: Node, node: Node, depth: int) -> Node:
    if not _ends_a_sum(node):
        return _with_addend(x, total, node, depth)
    return node if node.value else total


def _in_units(x: Expressions, node: Node) -> Node:
    """A value times unit: what a block knows is multiplied, rather than each pair's."""
    unit = x.unit()
    if node.is_constant and (node.value == 0 or math.isinf(node.value)):
        return node
    if node.op == "neg":
        return x.make("neg", _in_units(x, node.args[0]))
    if node.op == "mul":
        for factor, other in (node.args, node.args[::-1]):
            if factor.is_of_block and not other.is_of_block:
                return x.make("mul", x.make("mul", unit, factor), other)
    if node.op == "div" and node.args[1].is_of_block and not node.args[0].is_of_block:
        return x.make("mul", node.args[0], x.make("div", unit, node.args[1]))
    return x.make("mul", unit, node)


def derivative_of(x: Expressions, root: Node) -> Node:
    """d root / d score."""
    found: dict[int, Derivative] = {}
    for node in in_order([root]):
        if not node.depends & SCORE or not node.is_float:
            found[id(node)] = None
        elif node.op == "score":
            found[id(node)] = x.constant(1.0, FLOAT)
        else:
            inner = [found[id(arg)] for arg in node.args]
            rule = _RULES.get(node.op)
            found[id(node)] = None if rule is None else rule(x, node, *inner)
    return _or_zero(x, found[id(root)])


def _or_zero(x: Expressions, derivative: Derivative) -> Node:
    return x.constant(0.0, FLOAT) if derivative is None else derivative


def _is_zero(node: Node) -> bool:
    return node.is_constant and node.value == 0


def _plus(x: Expressions, a: Derivative, b: Derivative) -> Derivative:
    return b if a is None else a if b is None else x.make("add", a, b)


def _minus(x: Expressions, a: Derivative) -> Derivative:
    return None if a is None else x.make("neg", a)


def _times(x: Expressions, factor: Node, inner: Derivative) -> Derivative:
    """By the chain rule: 0 stays 0, whatever it is multiplied with."""
    if inner is None or _is_zero(inner):
        return None
    if inner.op == "where" and any(_is_zero(arg) for arg in inner.args[1:]):
        chosen = [_or_zero(x, _times(x, factor, arg)) for arg in inner.args[1:]]
        return x.make("where", inner.args[0], *chosen)
    # Constants meet: 20 tanh(score / 20) has none left.
    if factor.is_constant and inner.op == "mul" and inner.args[1].is_constant:
        return x.make("mul", inner.args[0], x.make("mul", factor, inner.args[1]))
    if inner.is_constant and factor.op == "mul" and factor.args[1].is_constant:
        return x.make("mul", factor.args[0], x.make("mul", inner, factor.args[1]))
    return x.make("mul", factor, inner)


def _chosen(x: Expressions, condition: Node, a: Derivative, b: Derivative) -> Derivative:
    if a is None and b is None:
        return None
    return x.make("where", condition, _or_zero(x, a), _or_zero(x, b))


# ---- the rules: of a node and its arguments' derivatives ----


def _product(x: Expressions, node: Node, da: Derivative, db: Derivative) -> Derivative:
    a, b = node.args
    if a is b:
        return _times(x, x.make("mul", a, x.constant(2.0, FLOAT)), da)
    return _plus(x, _times(x, b, da), _times(x, a, db))


def _quotient(x: Expressions, node: Node, da: Derivative, db: Derivative) -> Derivative:
    _, b = node.args
    one = x.make("div", x.constant(1.0, FLOAT), b)
    return _plus(x, _times(x, one, da), _minus(x, _times(x, x.make("div", node, b), db)))


def _extreme(is_maximum: bool) -> _Rule:
    """Where both are the same, half of each, as torch has it."""

    def rule(x: Expressions, node: Node, da: Derivative, db: Derivative) -> Derivative:
        a, b = node.args
        half = x.make("mul", _or_zero(x, _plus(x, da, db)), x.constant(0.5, FLOAT))
        otherwise = _chosen(x, x.make("eq", a, b), half, db)
        return _chosen(x, x.make("lt", b, a) if is_maximum else x.make("lt", a, b), da, otherwise)

    return rule


def _power(x: Expressions, node: Node, da: Derivative, db: Derivative) -> Derivative:
    base, exponent = node.args
    less = x.make("sub", exponent, x.constant(1.0, FLOAT))
    of_base = _times(x, x.make("mul", exponent, x.make("pow", base, less)), da)
    if db is None:
        return of_base
    zero = x.constant(0.0, FLOAT)
    is_flat = x.make("and", x.make("eq", base, zero), x.make("le", zero, exponent))
    of_exponent = _times(x, x.make("mul", node, x.make("log", base)), db)
    return _plus(x, of_base, _chosen(x, is_flat, None, of_exponent))


def _rest(rounding: str) -> _Rule:
    """Of what a division leaves."""

    def rule(x: Expressions, node: Node, da: Derivative, db: Derivative) -> Derivative:
        whole = x.make(rounding, x.make("div", *node.args))
        return _plus(x, da, _minus(x, _times(x, whole, db)))

    return rule


def _function(slope: Callable[[Expressions, Node, Node], Node]) -> _Rule:
    """Of one argument: its slope there, given the node and the argument."""
    return lambda x, node, da: _times(x, slope(x, node, node.args[0]), da)


def _constant_times(x: Expressions, constant: float, node: Node) -> Node:
    return x.make("mul", node, x.constant(constant, FLOAT))


def _one_over(x: Expressions, constant: float, node: Node) -> Node:
    return x.make("div", x.constant(constant, FLOAT), node)


_RULES: dict[str, _Rule] = {
    "add": lambda x, node, da, db: _plus(x, da, db),
    "sub": lambda x, node, da, db: _plus(x, da, _minus(x, db)),
    "mul": _product,
    "div": _quotient,
    "neg": lambda x, node, da: _minus(x, da),
    "where": lambda x, node, _, da, db: _chosen(x, node.args[0], da, db),
    "maximum": _extreme(True),
    "minimum": _extreme(False),
    "clamp_min": lambda x, node, da, db: _chosen(x, x.make("le", node.args[1], node.args[0]), da, db),
    "clamp_max": lambda x, node, da, db: _chosen(x, x.make("le", *node.args), da, db),
    "relu": lambda x, node, da: _chosen(x, x.make("lt", x.constant(0.0, FLOAT), node.args[0]), da, None),
    "pow": _power,
    "remainder": _rest("floor"),
    "fmod": _rest("trunc"),
    "abs": _function(lambda x, node, a: x.make("sign", a)),
    "exp": _function(lambda x, node, a: node),
    "exp2": _function(lambda x, node, a: _constant_times(x, math.log(2), node)),
    "log": _function(lambda x, node, a: _one_over(x, 1.0, a)),
    "log2": _function(lambda x, node, a: _one_over(x, 1 / math.log(2), a)),
    "log1p": _function(lambda x, node, a: _one_over(x, 1.0, x.make("add", a, x.constant(1.0, FLOAT)))),
    "sqrt": _function(lambda x, node, a: _one_over(x, 0.5, node)),
    "rsqrt": _function(lambda x, node, a: _constant_times(x, -0.5, x.make("mul", x.make("mul", node, node), node))),
    "tanh": _function(lambda x, node, a: x.make("sub", x.constant(1.0, FLOAT), x.make("mul", node, node))),
    "sigmoid": _function(lambda x, node, a: x.make("sub", node, x.make("mul", node, node))),
    "sin": _function(lambda x, node, a: x.make("cos", a)),
    "cos": _function(lambda x, node, a: x.make("neg", x.make("sin", a))),
    "erf": _function(
        lambda x, node, a: _constant_times(x, 2 / math.sqrt(math.pi), x.make("exp", x.make("neg", x.make("mul", a, a))))
    ),
}
