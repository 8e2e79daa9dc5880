"""CUDA-event timing: candidates take turns, so that a clock that sinks as the card warms hits all alike."""

from statistics import median
from typing import Any, Callable, Dict, List, Sequence

import torch

from .backends import Backend
from .problem import FORWARD, Inputs, Problem


def rotating_inputs(problem: Problem, which: str, most_sets: int = 32) -> List[Inputs]:
    """Just enough input sets to pass the L2 cache twice over before one comes again. For the backward pass every
    backend keeps a graph for each."""
    l2_bytes = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    sets = min(most_sets, 1 + 2 * l2_bytes // problem.read_bytes(which))
    return [problem.inputs(seed, which) for seed in range(sets)]


def _burst_ms(calls: Sequence[Callable[[], object]], count: int) -> float:
    """Milliseconds a call, over `count` of them back to back."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for i in range(count):
        calls[i % len(calls)]()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / count


def time_interleaved(
    backends: Sequence[Backend], which: str, input_sets: Sequence[Inputs], rounds: int, burst_ms: float
) -> Dict[str, List[float]]:
    """Milliseconds a call, by backend: one sample a round, each over a burst of about `burst_ms`."""
    calls: Dict[str, List[Callable[[], object]]] = {}
    counts: Dict[str, int] = {}
    for backend in backends:
        with backend.selected():
            calls[backend.name] = backend.calls(which, input_sets)
            _burst_ms(calls[backend.name], 3)
            counts[backend.name] = max(3, round(burst_ms / _burst_ms(calls[backend.name], 3)))
    samples: Dict[str, List[float]] = {backend.name: [] for backend in backends}
    for turn in range(rounds):
        for i in range(len(backends)):
            backend = backends[(turn + i) % len(backends)]
            with backend.selected():
                samples[backend.name].append(_burst_ms(calls[backend.name], counts[backend.name]))
    return samples


def summary(problem: Problem, which: str, samples: Sequence[float]) -> Dict[str, Any]:
    middle = median(samples)
    return {
        "ms_median": middle,
        "ms_min": min(samples),
        "ms_max": max(samples),
        "ms_samples": list(samples),
        "tflops": problem.flops(which) / middle * 1e-9,
    }


def run(
    problem: Problem, which: str, names: Sequence[str], rounds: int, burst_ms: float
) -> List[Dict[str, Any]]:
    """One row a backend: the times of the pass, or why the backend does not run it."""
    with torch.set_grad_enabled(which != FORWARD):
        input_sets = rotating_inputs(problem, which)
        reasons = {name: Backend(name, problem).why_not(input_sets[0]) for name in names}
        running = [Backend(name, problem) for name in names if not reasons[name]]
        samples = time_interleaved(running, which, input_sets, rounds, burst_ms)
    rows = []
    for name in names:
        row = {**problem.record(), "pass": which, "backend": name}
        row.update(
            summary(problem, which, samples[name]) if name in samples else {"skipped": reasons[name]}
        )
        rows.append(row)
    return rows
