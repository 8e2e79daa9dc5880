"""From Python functions to code, which is kept by what was traced: a function that is traced again costs that alone."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from . import _operators  # noqa: F401 (gives values their operators)
from ._code import mask_code, score_code
from ._derivative import addend_of
from ._expressions import FLOAT, PLACES, Expressions, Node, in_order
from ._recording import Entry, Recorder, Tensors, run


class Traced(NamedTuple):
    """`code`: the structs UserScore and UserMask, the same for functions that compute the same. `tensors`: those that
    it reads, by their numbers there. `only_adds`: whether the score has no part in what is added to it."""

    code: str
    tensors: tuple[torch.Tensor, ...]
    only_adds: bool


class _Made(NamedTuple):
    code: str
    read: tuple[int, ...]  # which of the tensors that were captured
    only_adds: bool


# It takes the place of templates/user_functions.cuh.
_HEAD = """\
#pragma once

#include "user_reads.cuh"

"""

_MOST_KEPT = 1024
_made: dict[tuple[Any, ...], _Made] = {}


def trace(score_mod: Callable[..., Any] | None, mask_mod: Callable[..., Any] | None, device: torch.device) -> Traced:
    """Code of functions with flex_attention's signatures. None leaves scores as they are, and shows all pairs."""
    tensors = Tensors()
    score = None if score_mod is None else _recorded(score_mod, "score_mod", ("score", *PLACES), device, tensors)
    mask = None if mask_mod is None else _recorded(mask_mod, "mask_mod", PLACES, device, tensors)
    key = (score, mask, tuple(tensors.known))
    made = _made.get(key)
    if made is None:
        if len(_made) >= _MOST_KEPT:
            _made.clear()
        made = _made[key] = _make(score, mask, tensors.known)
    return Traced(made.code, tuple(tensors.tensors[number] for number in made.read), made.only_adds)


def _recorded(
    function: Callable[..., Any], argument: str, places: tuple[str, ...], device: torch.device, tensors: Tensors
) -> tuple[Any, ...]:
    recorder = Recorder(argument, torch.device(device), tensors)
    result = run(function, recorder, places)
    return (result.number, *recorder.entries)


def _make(score: tuple[Any, ...] | None, mask: tuple[Any, ...] | None, known: list[Entry]) -> _Made:
    # Tensors that nothing reads in the end leave no gap in the numbers of the others.
    numbers = list(range(len(known)))
    roots = _roots(score, mask, known, numbers)
    read = _tensors_of(roots[1:])
    if len(read) < len(known):
        roots = _roots(score, mask, known, [read.index(number) if number in read else -1 for number in numbers])
    x, score_root, mask_root = roots
    only_adds = score_root is None or addend_of(x, score_root) is not None
    return _Made(_HEAD + score_code(x, score_root) + mask_code(x, mask_root), tuple(read), only_adds)


def _roots(
    score: tuple[Any, ...] | None, mask: tuple[Any, ...] | None, known: list[Entry], numbers: list[int]
) -> tuple[Expressions, Node | None, Node | None]:
    x = Expressions()
    both = [None if each is None else _expression(x, each[1:], each[0], known, numbers) for each in (score, mask)]
    return x, both[0], both[1]


def _tensors_of(roots: tuple[Node | None, ...]) -> list[int]:
    nodes = in_order(root for root in roots if root is not None)
    return sorted({node.value[0] for node in nodes if node.op == "load"})


def _expression(x: Expressions, entries: Any, result: int, known: list[Entry], numbers: list[int]) -> Node:
    nodes: list[Node] = []
    for op, dtype, *operands in entries:
        nodes.append(_node(x, nodes, op, dtype, operands, known, numbers))
    return nodes[result]


def _node(
    x: Expressions, nodes: list[Node], op: str, dtype: str, operands: list[Any], known: list[Entry], numbers: list[int]
) -> Node:
    if op == "score":
        return x.score()
    if op in PLACES:
        return x.place(op)
    if op == "constant":
        (value,) = operands
        return x.constant(float.fromhex(value) if dtype == FLOAT else value, dtype)
    if op == "load":
        number, *indices = operands
        return x.load((numbers[number], known[number]), dtype, [nodes[index] for index in indices])
    return x.make(op, *(nodes[operand] for operand in operands), dtype=dtype)
