"""Errors against float64, beside SDPA's backends on the same inputs."""

from collections.abc import Sequence
from math import sqrt
from typing import Any

import torch

from .._reference import reference_gradients, reference_heads
from .backends import SDPA_FLASH, Backend
from .problem import BACKWARD, BOTH, FORWARD, Inputs, Problem

_SCORE_BYTES = 1 << 29  # of float64 scores at a time; the gradients need some such matrices at once

OUT = "out"
GRADIENTS = ("dq", "dk", "dv")


def tensors_of(passes: Sequence[str]) -> list[str]:
    """What a run that measures these passes compares."""
    names = [OUT] if any(which != BACKWARD for which in passes) else []
    return names + (list(GRADIENTS) if any(which != FORWARD for which in passes) else [])


def references(inputs: Inputs, causal: bool) -> dict[str, torch.Tensor]:
    """out and, where there is a dout, the gradients, in float64 and like q, k and v; some heads at a time."""
    (q, k, v), dout = inputs.qkv, inputs.dout
    group_size = q.shape[2] // k.shape[2]
    heads_at_once = max(1, _SCORE_BYTES // (8 * q.shape[1] * k.shape[1]))
    exact = {OUT: torch.zeros_like(q, dtype=torch.float64)}
    if dout is not None:
        exact.update({f"d{name}": torch.zeros_like(x, dtype=torch.float64) for name, x in zip("qkv", (q, k, v))})
    for b in range(q.shape[0]):
        for head in range(0, q.shape[2], heads_at_once):
            heads = slice(head, head + heads_at_once)
            key_heads = torch.arange(q.shape[2], device=q.device)[heads] // group_size
            queries = q[b, :, heads].transpose(0, 1)
            keys, values = (x[b].transpose(0, 1)[key_heads] for x in (k, v))
            mask = _mask_of(inputs, b, heads)
            exact[OUT][b, :, heads] = reference_heads(queries, keys, values, causal, mask).transpose(0, 1)
            if dout is None:
                continue
            dout_heads = dout[b, :, heads].transpose(0, 1)
            dq, dk, dv = reference_gradients(queries, keys, values, dout_heads, causal, mask)
            exact["dq"][b, :, heads] = dq.transpose(0, 1)
            for name, gradient in (("dk", dk), ("dv", dv)):  # summed over the heads of a group
                exact[name][b].index_add_(1, key_heads, gradient.transpose(0, 1))
    return exact


def _mask_of(inputs: Inputs, b: int, heads: slice) -> torch.Tensor | None:
    """That of some heads of a sequence; it may be one for all."""
    if inputs.attn_mask is None:
        return None
    mask = inputs.attn_mask[b if inputs.attn_mask.shape[0] > 1 else 0]
    return mask[heads] if mask.shape[0] > 1 else mask


def max_and_mean_square(got: torch.Tensor, exact: torch.Tensor) -> dict[str, float]:
    """The greatest error and the mean square of all."""
    error = got.double() - exact
    return {"max": error.abs().max().item(), "mean_square": error.square().mean().item()}


def _results(backend: Backend, inputs: Inputs) -> dict[str, torch.Tensor]:
    with backend.selected():
        out = backend.forward(inputs)
        if inputs.dout is None:
            return {OUT: out}
        gradients = torch.autograd.grad(out, inputs.qkv, inputs.dout)
    return {OUT: out.detach(), **dict(zip(GRADIENTS, gradients))}


def run(problem: Problem, passes: Sequence[str], names: Sequence[str], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """One row a tensor and backend: over all seeds the greatest error and the root mean square, and both beside SDPA
    flash's."""
    tensors = tensors_of(passes)
    which = FORWARD if tensors == [OUT] else BOTH
    errors: dict[str, dict[str, list[dict[str, float]]]] = {tensor: {} for tensor in tensors}
    skipped: dict[str, str] = {}
    for seed in seeds:
        inputs = problem.inputs(seed, which)
        with torch.no_grad():
            exact = references(inputs, problem.causal)
        for name in names:
            backend = Backend(name, problem)
            skipped[name] = backend.why_not(inputs)
            if skipped[name]:
                continue
            results = _results(backend, inputs)
            for tensor in tensors:
                errors[tensor].setdefault(name, []).append(max_and_mean_square(results[tensor], exact[tensor]))
    rows = []
    for tensor in tensors:
        of_tensor = [{**problem.record(), "tensor": tensor, "backend": name, "seeds": len(seeds)} for name in names]
        for row in of_tensor:
            name = row["backend"]
            row.update({"skipped": skipped[name]} if skipped[name] else _over_seeds(errors[tensor][name]))
        _add_ratios(of_tensor)
        rows += of_tensor
    return rows


def _over_seeds(errors: Sequence[dict[str, float]]) -> dict[str, float]:
    return {
        # Not Python's max(), which may pass over a NaN.
        "max_error": torch.tensor([error["max"] for error in errors], dtype=torch.float64).max().item(),
        "rms_error": sqrt(sum(error["mean_square"] for error in errors) / len(errors)),
    }


def _add_ratios(rows: list[dict[str, Any]]) -> None:
    flash = next((row for row in rows if row["backend"] == SDPA_FLASH and "skipped" not in row), None)
    for row in rows:
        if flash is not None and "skipped" not in row:
            row["max_over_flash"] = row["max_error"] / flash["max_error"]
            row["rms_over_flash"] = row["rms_error"] / flash["rms_error"]
