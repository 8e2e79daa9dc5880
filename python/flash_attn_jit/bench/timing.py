"""CUDA-event timing: candidates take turns, so that a clock that sinks as the card warms hits all alike."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

import torch

from .backends import Backend
from .out_of_memory import OUT_OF_MEMORY, free_memory, is_out_of_memory
from .problem import FORWARD, Inputs, Problem


class Candidate(NamedTuple):
    """``selected()`` is entered around its calls, outside of what is timed."""

    name: str
    selected: Callable[[], AbstractContextManager[Any]]
    calls: list[Callable[[], object]]  # taken in turns


def rotating_inputs(problem: Problem, which: str, most_sets: int = 32) -> list[Inputs]:
    """Just enough input sets to pass the L2 cache twice over before one comes again. For the backward pass every
    backend keeps a graph for each."""
    l2_bytes = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    sets = min(most_sets, 1 + 2 * l2_bytes // problem.read_bytes(which))
    return [problem.inputs(seed, which) for seed in range(sets)]


def _burst_ms(calls: Sequence[Callable[[], object]], count: int) -> float:
    """Milliseconds a call, over `count` of them back to back."""
    if not torch.cuda.is_available():
        begin = perf_counter()
        for i in range(count):
            calls[i % len(calls)]()
        return (perf_counter() - begin) / count * 1e3
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for i in range(count):
        calls[i % len(calls)]()
    end.record()
    end.synchronize()
    milliseconds: float = start.elapsed_time(end)
    return milliseconds / count


def _sample(candidate: Candidate, count: int) -> float | None:
    """Milliseconds a call, or nothing where the candidate runs out of memory; it then forgets its calls, and with them
    the graphs that they keep."""
    try:
        with candidate.selected():
            return _burst_ms(candidate.calls, count)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    candidate.calls.clear()
    free_memory()
    return None


def _calls_in_a_burst(candidate: Candidate, burst_ms: float) -> int:
    """At least 3; 0 where the candidate runs out of memory."""
    if _sample(candidate, 3) is None:  # which warms it up
        return 0
    ms = _sample(candidate, 3)
    return max(3, round(burst_ms / ms)) if ms else 0


def time_interleaved(candidates: Sequence[Candidate], rounds: int, burst_ms: float) -> dict[str, list[float]]:
    """Milliseconds a call, by candidate: one sample a round, each over a burst of about `burst_ms`. A candidate that
    runs out of memory is not among them."""
    counts = {candidate.name: _calls_in_a_burst(candidate, burst_ms) for candidate in candidates}
    samples: dict[str, list[float]] = {name: [] for name, count in counts.items() if count}
    for turn in range(rounds):
        for i in range(len(candidates)):
            candidate = candidates[(turn + i) % len(candidates)]
            if candidate.name not in samples:
                continue
            ms = _sample(candidate, counts[candidate.name])
            if ms is None:
                del samples[candidate.name]
            else:
                samples[candidate.name].append(ms)
    return samples


def summary(samples: Sequence[float]) -> dict[str, Any]:
    return {
        "ms_median": median(samples),
        "ms_min": min(samples),
        "ms_max": max(samples),
        "ms_samples": list(samples),
    }


def row_of(problem: Problem, which: str, samples: Sequence[float]) -> dict[str, Any]:
    times = summary(samples)
    return {**times, "tflops": problem.flops(which) / times["ms_median"] * 1e-9}


def _candidate(backend: Backend, which: str, input_sets: Sequence[Inputs]) -> Candidate:
    """Without calls where making their graphs takes more memory than there is."""
    calls: list[Callable[[], object]] = []
    try:
        with backend.selected():
            calls = backend.calls(which, input_sets)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    if not calls:
        free_memory()
    return Candidate(backend.name, backend.selected, calls)


def run(problem: Problem, which: str, names: Sequence[str], rounds: int, burst_ms: float) -> list[dict[str, Any]]:
    """One row a backend: the times of the pass, or why the backend does not run it."""
    with torch.set_grad_enabled(which != FORWARD):
        input_sets = rotating_inputs(problem, which)
        reasons = {name: Backend(name, problem).why_not(input_sets[0]) for name in names}
        made = [_candidate(Backend(name, problem), which, input_sets) for name in names if not reasons[name]]
        samples = time_interleaved([each for each in made if each.calls], rounds, burst_ms)
    rows = []
    for name in names:
        row = {**problem.record(), "pass": which, "backend": name}
        if name in samples:
            row.update(row_of(problem, which, samples[name]))
        else:
            row["skipped"] = reasons[name] or OUT_OF_MEMORY
        rows.append(row)
    return rows
