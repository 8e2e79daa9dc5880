"""What the model of the card says of a problem: the program is asked, which needs no GPU for it."""

import json
import re
import subprocess
from collections.abc import Iterable, Sequence
from typing import Any

from .._environment_report import nvrtc_for_packs, program_path
from .problem import BACKWARD, BOTH, FORWARD, Problem

# The kernels of a pass; of several sets the library takes the one that is done first.
_FORWARD_SETS: list[tuple[str, ...]] = [("fwd",), ("fwd_wide",)]
_BACKWARD_SETS: list[tuple[str, ...]] = [("bwd_preprocess", "bwd_dkdv", "bwd_dq"), ("bwd_all_keys",)]
_SETS: dict[str, list[list[tuple[str, ...]]]] = {
    FORWARD: [_FORWARD_SETS],
    BACKWARD: [_BACKWARD_SETS],
    BOTH: [_FORWARD_SETS, _BACKWARD_SETS],
}
_MOST_SECONDS = 120.0  # for a kernel: it is compiled and played


def card_word(name: str) -> str:
    """Of a GPU's name, as `--gpu` takes it: "NVIDIA GeForce RTX 2080 Ti" is rtx2080ti."""
    return re.sub(r"nvidia|tesla|geforce|quadro|[^a-z0-9]", "", name.lower())


def _ask(kind: str, problem: Problem, card: str, seconds: float) -> dict[str, Any]:
    program = program_path()
    if program is None:
        return {"error": "there is no program flash-attn-jit"}
    command = [program, "model", "--kind", kind, "--head-dim", str(problem.head_dim), "--gpu", card, "--json"]
    command += ["--head-dim-v", str(problem.head_dim_v)] if problem.head_dim_v else []
    command += ["--causal"] if problem.causal else []
    command += problem.feature_flags()
    command += ["--gqa", str(problem.num_heads // problem.num_heads_k)]
    command += ["--batch", str(problem.batch), "--heads", str(problem.num_heads)]
    command += ["--seqlen-q", str(problem.seqlen), "--seqlen-k", str(problem.seqlen)]
    if nvrtc := nvrtc_for_packs():  # Python knows more folders than the program
        command += ["--nvrtc", nvrtc]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
        if done.returncode != 0:
            return {"error": done.stderr.strip()}
        answer = json.loads(done.stdout)
        return {"kernel": str(answer["kernel"]), "seconds": float(answer["seconds"])}
    except (OSError, ValueError, KeyError, TypeError, subprocess.TimeoutExpired) as error:
        return {"error": f"{type(error).__name__}: {error}"[:300]}


def _seconds_of(parts: Iterable[dict[str, Any]]) -> float:
    return sum(float(part["seconds"]) for part in parts)


def predict(problem: Problem, which: str, card: str, seconds: float) -> dict[str, Any]:
    """The sum over the kernels of the pass, "ms", or "error" where one is not to be had within these seconds."""
    parts: list[dict[str, Any]] = []
    for sets in _SETS[which]:
        found = [[_ask(kind, problem, card, seconds) for kind in kinds] for kinds in sets]
        whole = [each for each in found if not any("error" in part for part in each)]
        if not whole:  # the last set is for few problems: why the first cannot be had says more
            return next(part for part in found[0] if "error" in part)
        parts += min(whole, key=_seconds_of)
    return {"ms": 1e3 * _seconds_of(parts), "kernels": [part["kernel"] for part in parts]}


def run(problem: Problem, passes: Sequence[str], card: str) -> list[dict[str, Any]]:
    """A row a pass, its "ms_predicted" and "tflops", or why there is none."""
    rows = []
    for which in passes:
        found = predict(problem, which, card, _MOST_SECONDS)
        row = {"problem": problem.record(), "pass": which, "backend": f"predicted, {card}"}
        if "error" in found:
            rows.append({**row, "skipped": found["error"]})
            continue
        tflops = problem.flops(which) / found["ms"] * 1e-9
        rows.append({**row, "ms_predicted": found["ms"], "tflops": tflops, "kernels": found["kernels"]})
    return rows
