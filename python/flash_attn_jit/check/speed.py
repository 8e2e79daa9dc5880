"""Speed beside PyTorch's own attention, as far as this GPU has it, with what the card did meanwhile."""

import time
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

from ..bench import timing
from ..bench.backends import OURS, default_names
from ..bench.problem import BACKWARD, FORWARD, Problem
from .card import Watch

_ROUNDS, _BURST_MS = 5, 50.0


def problems() -> list[tuple[Problem, str]]:
    """With the pass that is timed; the most telling first."""
    sizes = product((4096, 1024), (FORWARD, BACKWARD), (64, 128), (False, True))
    plain = [(Problem(4, 16, 16, head_dim, seqlen, causal), which) for seqlen, which, head_dim, causal in sizes]
    grouped = [(Problem(1, 32, 8, 128, 2048, True), which) for which in (FORWARD, BACKWARD)]
    short = [(Problem(32, 12, 12, 64, 128, causal), FORWARD) for causal in (False, True)]
    return plain[:8] + grouped + plain[8:] + short


def measure(problem: Problem, which: str, watch: Watch) -> dict[str, Any]:
    begin = time.monotonic()
    rows = timing.run(problem, which, default_names(problem), _ROUNDS, _BURST_MS)
    return {"problem": problem.record(), "pass": which, "backends": rows, "card": watch.since(begin)}


def run(gpu: str, is_time_over: Callable[[], bool]) -> Iterator[dict[str, Any]]:
    """One result a problem, until the time is over."""
    with Watch(gpu) as watch:
        for problem, which in problems():
            if is_time_over():
                return
            yield measure(problem, which, watch)


def milliseconds(result: dict[str, Any]) -> dict[str, float]:
    """Medians by backend, of those that ran."""
    return {row["backend"]: row["ms_median"] for row in result["backends"] if "ms_median" in row}


def times_as_fast(result: dict[str, Any]) -> float | None:
    """As the fastest of PyTorch's."""
    times = milliseconds(result)
    others = [ms for name, ms in times.items() if name != OURS]
    return min(others) / times[OURS] if others and OURS in times else None
