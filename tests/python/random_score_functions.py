"""Random score functions and masks from a seed, as Python text: what flex_attention can be given, bounded, so that
float32 follows float64."""

import random
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

# Tensors that functions may capture, by name: (shape, made of a generator).
BATCH, HEADS, LONGEST = 3, 6, 256


def captured_tensors(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """`dtype`: of the floats, whose numbers are float16's: the same in all dtypes."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).half().to(dtype)

    def whole(least: int, end: int, *shape: int, of: torch.dtype) -> torch.Tensor:
        return torch.randint(least, end, shape, generator=generator).to(of)

    return {
        "slopes": normal(HEADS),
        "of_batch": normal(BATCH, HEADS),
        "of_query": normal(LONGEST),
        "relative": normal(HEADS, 2 * LONGEST),
        "pairs": normal(HEADS, LONGEST, LONGEST).transpose(1, 2),
        "buckets": normal(32, HEADS),
        "temperature": normal().abs() + 0.5,
        "document": whole(0, 4, LONGEST, of=torch.int64),
        "prefix": whole(0, LONGEST, BATCH, of=torch.int32),
        "kinds": whole(0, 4, LONGEST, of=torch.uint8),
        "shift": whole(-8, 8, HEADS, of=torch.int16),
        "hidden": whole(0, 2, BATCH, LONGEST, of=torch.bool),
    }


class ScoreFunction(NamedTuple):
    text: str  # Python
    is_mask: bool

    def over(self, tensors: dict[str, torch.Tensor]) -> Callable[..., Any]:
        """The function that captures these."""
        names: dict[str, Any] = {"torch": torch, **tensors}
        exec(self.text, names)
        return names["function"]

    def named(self) -> set[str]:
        return {name for name in captured_tensors(0) if name in self.text}


class _Maker:
    """Text of expressions, `depth` operators deep. Floats are at most about 4 from 0, so that exponentials are, too."""

    def __init__(self, seed: int, jumps: bool):
        self._random = random.Random(seed)
        self._jumps = jumps

    def pick(self, *choices: Any) -> Any:
        return self._random.choice(choices)

    def number(self, least: float, most: float) -> str:
        return repr(round(self._random.uniform(least, most), 3))

    # ---- integers ----

    def whole(self, depth: int) -> str:
        if depth <= 0:
            return self.pick(
                "q_idx", "kv_idx", "q_idx", "kv_idx", "h", "b", "shift[h]", "kinds[kv_idx]", "document[q_idx]"
            )
        a, b = self.whole(depth - 1), self.whole(depth - 2)
        constant = self._random.randint(1, 17)
        return self.pick(
            f"({a} + {b})",
            f"({a} - {b})",
            f"({a} - {b}).abs()",
            f"({a} * {constant})",
            f"({a} // {constant})",
            f"({a} % {constant})",
            f"(({a} - {b}) % {constant})",
            f"torch.minimum({a}, {b} + {constant})",
            f"({a}).clamp(-{constant}, {3 * constant})",
            f"torch.where({self.truth(depth - 1)}, {a}, {b})",
            f"(({a}) & {constant})",
            f"(({a}) >> 1)",
            f"torch.floor({a} / {constant}).int()",
        )

    # ---- bools, in which the score takes no part, but where there may be jumps ----

    def truth(self, depth: int) -> str:
        if depth <= 0:
            return self.pick(
                "(q_idx >= kv_idx)",
                "(document[q_idx] == document[kv_idx])",
                "(kv_idx < prefix[b])",
                "hidden[b, kv_idx]",
                "(h % 2 == 0)",
                "(kinds[q_idx] != kinds[kv_idx])",
            )
        a, b = self.truth(depth - 1), self.truth(depth - 2)
        return self.pick(
            f"({a} & {b})",
            f"({a} | {b})",
            f"({a} ^ {b})",
            f"~{a}",
            f"torch.logical_and({a}, {b})",
            f"({self.whole(depth - 1)} {self.pick('<', '<=', '>', '>=', '==', '!=')} {self.whole(depth - 1)})",
            f"(({self.whole(depth - 1)}).abs() < {self._random.randint(1, 40)})",
            f"({self.value(depth - 1, False)} < {self.number(-1, 1)})",
        )

    # ---- floats ----

    def value(self, depth: int, of_score: bool) -> str:
        if depth <= 0:
            places = (
                "slopes[h]",
                "of_batch[b, h]",
                "of_batch[b][h]",
                "relative[h, q_idx - kv_idx + 255]",
                "pairs[h, q_idx, kv_idx]",
                "of_query[q_idx]",
                "of_query[kv_idx]",
                "((q_idx - kv_idx) * 0.01)",
                "(kv_idx / 64)",
                f"buckets[({self.whole(1)}).long() % 32, h]",
                "temperature",
                self.number(-2, 2),
            )
            return self.pick(*(("score",) * 3 if of_score else ()), self.pick(*places))
        a, b = self.value(depth - 1, of_score), self.value(depth - 2, of_score)
        constant = self.number(0.5, 3)
        forms = [
            f"({a} + {b})",
            f"({a} - {b})",
            f"(torch.tanh({a}) * {b})",
            f"({a} * {self.number(-1.5, 1.5)})",
            f"({a} / {constant})",
            f"({a} / (1 + ({b}) * ({b})))",
            f"({constant} * torch.tanh({a} / {constant}))",
            f"torch.sigmoid(torch.as_tensor({a}))",
            f"torch.sin({a})",
            f"torch.cos({a})",
            f"torch.exp(torch.tanh({a}))",
            f"torch.log1p(torch.exp(torch.sin({a})))",
            f"torch.sqrt(({a}) * ({a}) + {constant})",
            f"torch.erf({a})",
            f"torch.nn.functional.silu({a})",
            f"-({a})",
            f"(1 - {a})",
            f"(torch.tanh({a}) ** {self.pick(2, 3)})",
            f"torch.where({self.truth(depth - 1)}, {a}, {b})",
        ]
        if self._jumps or not of_score:  # of a score, the derivative's
            forms += [
                f"torch.relu({a})",
                f"torch.abs({a})",
                f"torch.maximum({a}, {b} + 0.01)",
                f"torch.clamp({a}, -{constant}, {constant})",
                f"torch.where({a} > {self.number(-1, 1)}, {a}, {b})",
            ]
        text = self.pick(*forms)
        # Torch's functions take no Python numbers.
        return text.replace("(torch.as_tensor(", "((")

    def function(self, is_mask: bool) -> str:
        if is_mask:
            return f"def function(b, h, q_idx, kv_idx):\n    return {self.truth(3)}\n"
        value = self.value(self.pick(2, 3, 4), True)
        form = self.pick(
            "score + {0}", "torch.tanh({0}) * 4 + score * 0.5", "{0}", "torch.where({1}, {0}, -float('inf'))"
        )
        result = form.format(value, f"(q_idx == kv_idx) | {self.truth(2)}")
        return f"def function(score, b, h, q_idx, kv_idx):\n    return {result}\n"


def random_score_function(seed: int, jumps: bool = True) -> ScoreFunction:
    """`jumps`: whether the derivative may have some."""
    return _checked(seed, jumps, False)


def random_mask(seed: int) -> ScoreFunction:
    return _checked(seed, True, True)


def _checked(seed: int, jumps: bool, is_mask: bool) -> ScoreFunction:
    """The first of the seed's that torch runs: of numbers alone it computes nothing."""
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

    tensors = captured_tensors(0)
    for attempt in range(100):
        function = ScoreFunction(_Maker(1000 * seed + attempt, jumps).function(is_mask), is_mask)
        places = torch.zeros(4, dtype=torch.int64).unbind()
        try:
            with TransformGetItemToIndex():
                result = function.over(tensors)(*(() if is_mask else (torch.tensor(0.5),)), *places)
        except (TypeError, RuntimeError, AttributeError):
            continue
        if isinstance(result, torch.Tensor):
            return function
    raise AssertionError("no function of a hundred that torch runs")
