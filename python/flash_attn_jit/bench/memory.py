"""The peak of a backward call's memory, beside what it cannot do without."""

from collections.abc import Sequence
from typing import Any

import torch

from .backends import Backend
from .problem import BACKWARD, Inputs, Problem

_ROUNDING = 512  # PyTorch gives out CUDA memory in blocks of so many bytes


def rounded_bytes(elements: int, bytes_each: int) -> int:
    return -(-elements * bytes_each // _ROUNDING) * _ROUNDING


def needed_bytes(problem: Problem) -> int:
    """q, k, v, out and dout, the gradients dq, dk and dv, the softmax's log-sum-exp, and one more float a query row
    and head, each rounded up as PyTorch does."""
    rows = problem.batch * problem.seqlen * problem.num_heads
    rows_k = problem.batch * problem.seqlen * problem.num_heads_k
    both = problem.head_dim, problem.value_head_dim
    of_queries = sum(2 * rounded_bytes(rows * dims, 2) for dims in both)  # q, dq; out, dout
    of_keys = sum(2 * rounded_bytes(rows_k * dims, 2) for dims in both)  # k, dk; v, dv
    return of_queries + of_keys + 2 * rounded_bytes(rows, 4)


def _peak_bytes(backend: Backend, problem: Problem) -> int:
    """Of a backward call, with all that a forward call left there."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    inputs: Inputs = problem.inputs(0, BACKWARD)
    (call,) = backend.calls(BACKWARD, [inputs])
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def run(problem: Problem, names: Sequence[str]) -> list[dict[str, Any]]:
    """One row a backend: the peak, what is needed, and what the peak is over it."""
    rows = []
    for name in names:
        row: dict[str, Any] = {**problem.record(), "pass": BACKWARD, "backend": name}
        backend = Backend(name, problem)
        reason = backend.why_not(problem.inputs(0, BACKWARD))  # and so its kernels are loaded
        if reason:
            rows.append({**row, "skipped": reason})
            continue
        with backend.selected():
            peak = _peak_bytes(backend, problem)
        needed = needed_bytes(problem)
        rows.append({**row, "peak_bytes": peak, "needed_bytes": needed, "extra_bytes": peak - needed})
    return rows
