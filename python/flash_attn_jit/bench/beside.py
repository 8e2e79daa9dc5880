"""Puts the time of PyTorch's memory-efficient SDPA into tuning records, so that reports show it beside the tiles."""

import json
from pathlib import Path
from typing import Any

import torch

from ..report.records import DATABASE, BadRecord, Record, parse_record
from . import timing
from .backends import SDPA_EFFICIENT
from .problem import FORWARD, Problem

_MASKS = {"full": False, "causal": True}


def problem_of(record: Record) -> Problem | None:
    """The record's problem, where the bench has it: a forward pass as long on both sides, without features."""
    kernel, sizes = record.problem.kernel, record.sizes
    if kernel.kind != FORWARD or kernel.features or kernel.mask not in _MASKS or sizes.seqlen_q != sizes.seqlen_k:
        return None
    causal = _MASKS[kernel.mask]
    return Problem(sizes.batch, sizes.num_heads, sizes.num_heads_k, kernel.head_dim, sizes.seqlen_q, causal)


def read_database(path: Path) -> dict[str, Any]:
    try:
        database = json.loads(path.read_text())
        if database["format"] != DATABASE:
            raise ValueError(f"its format is {database['format']!r}")
        for record in database["records"]:
            parse_record(record)
    except (OSError, ValueError, KeyError, TypeError, BadRecord) as error:
        raise SystemExit(f"--beside is {path}: {error}; accepted: what `flash-attn-jit tune --export` wrote") from None
    whole: dict[str, Any] = database
    return whole


def run(database: dict[str, Any], rounds: int, burst_ms: float) -> list[dict[str, Any]]:
    """Times SDPA for the records of the current GPU that problem_of() knows, and notes it in them. A row each."""
    rows: list[dict[str, Any]] = []
    for raw in database["records"]:
        record = parse_record(raw)
        problem = problem_of(record)
        if problem is None or record.is_predicted or record.device.name != torch.cuda.get_device_name():
            continue
        (row,) = timing.run(problem, FORWARD, [SDPA_EFFICIENT], rounds, burst_ms)
        if "ms_median" in row:
            raw["others"][SDPA_EFFICIENT] = row["ms_median"] * 1e-3
        rows.append({**row, "class": str(record.problem)})
    return rows
