"""CUDA-event timing: candidates take turns, so that a clock that sinks as the card warms hits all alike."""

from statistics import median
from typing import Any, Callable, Dict, List, Sequence

import torch

from .backends import Backend
from .problem import Inputs, Problem


def rotating_inputs(problem: Problem, most_sets: int = 32) -> List[Inputs]:
    """Enough input sets to pass the L2 cache twice over before one comes again."""
    l2_bytes = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    sets = min(most_sets, 1 + 2 * l2_bytes // problem.input_bytes)
    return [problem.inputs(seed) for seed in range(sets)]


def _burst_ms(call: Callable[[Inputs], torch.Tensor], inputs: Sequence[Inputs], calls: int) -> float:
    """Milliseconds a call, over `calls` of them back to back."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for i in range(calls):
        call(inputs[i % len(inputs)])
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / calls


def time_interleaved(
    backends: Sequence[Backend], inputs: Sequence[Inputs], rounds: int, burst_ms: float
) -> Dict[str, List[float]]:
    """Milliseconds a call, by backend: one sample a round, each over a burst of about `burst_ms`."""
    calls: Dict[str, int] = {}
    for backend in backends:
        with backend.selected():
            _burst_ms(backend.call(), inputs, 3)
            calls[backend.name] = max(3, round(burst_ms / _burst_ms(backend.call(), inputs, 3)))
    samples: Dict[str, List[float]] = {backend.name: [] for backend in backends}
    for turn in range(rounds):
        for i in range(len(backends)):
            backend = backends[(turn + i) % len(backends)]
            with backend.selected():
                samples[backend.name].append(_burst_ms(backend.call(), inputs, calls[backend.name]))
    return samples


def summary(problem: Problem, samples: Sequence[float]) -> Dict[str, Any]:
    middle = median(samples)
    return {
        "ms_median": middle,
        "ms_min": min(samples),
        "ms_max": max(samples),
        "ms_samples": list(samples),
        "tflops": problem.flops / middle * 1e-9,
    }


def run(problem: Problem, names: Sequence[str], rounds: int, burst_ms: float) -> List[Dict[str, Any]]:
    """One row a backend: its times, or why it does not run this problem."""
    with torch.no_grad():
        inputs = rotating_inputs(problem)
        reasons = {name: Backend(name, problem).why_not(inputs[0]) for name in names}
        running = [Backend(name, problem) for name in names if not reasons[name]]
        samples = time_interleaved(running, inputs, rounds, burst_ms)
    rows = []
    for name in names:
        row = {**problem.record(), "backend": name}
        row.update(summary(problem, samples[name]) if name in samples else {"skipped": reasons[name]})
        rows.append(row)
    return rows
