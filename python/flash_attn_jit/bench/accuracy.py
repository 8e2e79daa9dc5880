"""Error against float64, beside SDPA's backends on the same inputs."""

from math import sqrt
from typing import Any, Dict, List, Sequence

import torch

from .._reference import reference_heads
from .backends import SDPA_FLASH, Backend
from .problem import Inputs, Problem

_SCORE_BYTES = 1 << 30  # of float64 scores at a time


def squared_and_max_error(out: torch.Tensor, inputs: Inputs, causal: bool) -> Dict[str, float]:
    """Of `out` (batch, seqlen, heads, head_dim) against float64: the greatest error and the mean square."""
    q, k, v = inputs
    group_size = q.shape[2] // k.shape[2]
    heads_at_once = max(1, _SCORE_BYTES // (8 * q.shape[1] * k.shape[1]))
    greatest, squares = 0.0, 0.0
    for b in range(q.shape[0]):
        for head in range(0, q.shape[2], heads_at_once):
            heads = slice(head, head + heads_at_once)
            key_heads = torch.arange(q.shape[2], device=q.device)[heads] // group_size
            reference = reference_heads(
                q[b, :, heads].transpose(0, 1),
                k[b].transpose(0, 1)[key_heads],
                v[b].transpose(0, 1)[key_heads],
                causal,
            )
            error = (out[b, :, heads].transpose(0, 1).double() - reference).abs()
            greatest = max(greatest, error.max().item())
            squares += error.square().sum().item()
    return {"max": greatest, "mean_square": squares / out.numel()}


def run(problem: Problem, names: Sequence[str], seeds: Sequence[int]) -> List[Dict[str, Any]]:
    """One row a backend: over all seeds the greatest error and the root mean square, and both beside SDPA flash's."""
    errors: Dict[str, List[Dict[str, float]]] = {}
    skipped: Dict[str, str] = {}
    with torch.no_grad():
        for seed in seeds:
            inputs = problem.inputs(seed)
            for name in names:
                backend = Backend(name, problem)
                skipped[name] = backend.why_not(inputs)
                if skipped[name]:
                    continue
                with backend.selected():
                    out = backend.call()(inputs)
                errors.setdefault(name, []).append(squared_and_max_error(out, inputs, problem.causal))
    rows = []
    for name in names:
        row: Dict[str, Any] = {**problem.record(), "backend": name, "seeds": len(seeds)}
        if skipped[name]:
            rows.append({**row, "skipped": skipped[name]})
            continue
        row["max_error"] = max(error["max"] for error in errors[name])
        row["rms_error"] = sqrt(sum(error["mean_square"] for error in errors[name]) / len(seeds))
        rows.append(row)
    _add_ratios(rows)
    return rows


def _add_ratios(rows: List[Dict[str, Any]]) -> None:
    flash = next((row for row in rows if row["backend"] == SDPA_FLASH and "skipped" not in row), None)
    for row in rows:
        if flash is not None and "skipped" not in row:
            row["max_over_flash"] = row["max_error"] / flash["max_error"]
            row["rms_over_flash"] = row["rms_error"] / flash["rms_error"]
