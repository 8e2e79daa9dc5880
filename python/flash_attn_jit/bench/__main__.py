"""``python -m flash_attn_jit.bench``: measures what its command line asks for, prints it and writes it as JSON."""

import argparse
import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import __version__, _core
from . import accuracy, beside, decode, flex, host_cost, memory, model, plot, prediction, timing
from .backends import KNOWS_ENABLE_GQA, default_names
from .options import (
    ACCURACY,
    BESIDE,
    DECODE,
    FLEX,
    HOST_COST,
    MEMORY,
    MODEL,
    PLOT,
    PREDICT,
    TARGET_VARIABLE,
    TIMING,
    parse_arguments,
)
from .problem import FP16, NO_MASK, Problem, sweep

_INTERPRET_VARIABLE = "FLASH_ATTN_JIT_INTERPRET"


def restart_with_target(target: str | None, arguments: Sequence[str]) -> None:
    """The configuration reads its variable once, so a process that lacks it is replaced by one that has it."""
    if target is None or os.environ.get(TARGET_VARIABLE) == target:
        return
    environment = {**os.environ, TARGET_VARIABLE: target}
    os.execve(sys.executable, [sys.executable, "-m", __package__, *arguments], environment)


def _require_folder(output: Path | None) -> None:
    """Before anything is measured: a figure that cannot be written is lost."""
    if output is not None and not output.parent.is_dir():
        raise SystemExit(f"--output is {output}: there is no folder {output.parent}.")


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise SystemExit(f"--plot is {path}: {error}; accepted: the JSON that a timing run has written") from None
    return record


def machine() -> dict[str, Any]:
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "devices": _core.devices(),
        "target": os.environ.get(TARGET_VARIABLE, "native"),
        "torch": torch.__version__,
        "cuda_of_torch": torch.version.cuda,
        "flash_attn_jit": __version__,
    }


def _problems(options: argparse.Namespace) -> Iterable[Problem]:
    causal = {"both": [False, True], "yes": [True], "no": [False]}[options.causal]
    heads_k = [options.heads_k or options.heads]
    if options.kind == MEMORY and options.heads_k is None:
        heads_k.append(1)
    for each in heads_k:
        heads = options.heads, each
        masks = options.attn_masks or [NO_MASK]
        dropout = options.dropout or [0.0]
        shared = options.batch, heads, options.head_dims, options.seqlens, causal, masks, dropout
        yield from sweep(*shared, options.dtypes or [FP16], options.head_dim_v or 0)


def _measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    if options.kind == HOST_COST:
        return _print_rows("", host_cost.run(options.rounds))
    if options.kind == MODEL:
        return _measure_model(options)
    if options.kind == DECODE:
        return _measure_decode(options)
    if options.kind == FLEX:
        return _measure_flex(options)
    rows: list[dict[str, Any]] = []
    for problem in _problems(options):
        if options.kind == PREDICT:
            rows += _print_rows(str(problem), prediction.run(problem, options.passes, options.predict))
            continue
        backends = options.backends or default_names(problem)
        if options.kind == MEMORY:
            rows += _print_rows(str(problem), memory.run(problem, backends))
        elif options.kind == ACCURACY:
            measured = accuracy.run(problem, options.passes, backends, range(options.seeds))
            rows += _print_rows(str(problem), measured)
        else:
            for which in options.passes:
                measured = timing.run(problem, which, backends, options.rounds, options.burst_ms)
                rows += _print_rows(str(problem), measured)
    return rows


def _put_beside(options: argparse.Namespace) -> None:
    database = beside.read_database(options.beside)
    rows = beside.run(database, options.rounds, options.burst_ms)
    if not rows:
        raise SystemExit(f"--beside is {options.beside}: no record is this GPU's, of a forward pass without features.")
    for row in rows:
        _print_rows(row["class"], [row])
    output = options.output or options.beside
    output.write_text(json.dumps(database) + "\n")
    print(output)


def _measure_decode(options: argparse.Namespace) -> list[dict[str, Any]]:
    copied = decode.copied_bytes_per_second(options.rounds, options.burst_ms)
    print(f"A copy on the device reads and writes {copied * 1e-9:.0f} GB/s")
    grid = options.batch, options.heads, options.heads_k, options.head_dims, options.queries, options.keys
    rows: list[dict[str, Any]] = []
    for problem in decode.problems(*grid):
        measured = decode.run(problem, options.page_size, copied, options.rounds, options.burst_ms)
        rows += _print_rows(str(problem), measured)
    return [{**row, "copied_bytes_per_second": copied} for row in rows]


def _measure_flex(options: argparse.Namespace) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for problem in sweep(options.batch, (options.heads, options.heads), options.head_dims, options.seqlens, [False]):
        for row in flex.run(problem, options.passes, options.rounds, options.burst_ms):
            rows += _print_rows(str(problem), [row])
    return rows


def _measure_model(options: argparse.Namespace) -> list[dict[str, Any]]:
    if not KNOWS_ENABLE_GQA:
        raise SystemExit(f"--model needs torch 2.5, whose SDPA has enable_gqa, or newer; this is {torch.__version__}.")
    shape = model.Shape(
        options.layers,
        options.heads,
        options.heads_k,
        options.head_dims[0],
        options.intermediate,
        options.vocabulary,
        options.tokens,
    )
    print(f"{shape}; SDPA, left to the memory-efficient and the math backend, takes {model.sdpa_backend(shape)}")
    rows: list[dict[str, Any]] = []
    for row in model.run(shape, options.seqlens, options.rounds, options.burst_ms):
        rows += _print_rows(f"b{row['batch']} s{row['seqlen']}", [row])
    return rows


def _print_rows(problem: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for row in rows:
        what = row.get("tensor") or row["pass"]
        skipped = "is not predicted" if row["backend"].startswith("predicted") else "does not run"
        figures = f"{skipped}: {row['skipped']}" if "skipped" in row else _figures(row)
        widths = (12, 8) if what in model.STEPS else (32, 4)
        line = f"{problem:{widths[0]}} {what:{widths[1]}} {row['backend']:16} {figures}"
        print(line.lstrip(), flush=True)
    return rows


def _figures(row: dict[str, Any]) -> str:
    if "share_of_copies" in row:
        text = f"{row['us_a_call']:9.2f} us  {row['share_of_copies']:.3f} of a copy's bandwidth"
        return text + (f"  {row['times_as_long']:6.2f} times as long" if "times_as_long" in row else "")
    if "ms_users" in row:
        text = f"{row['ms_users']:9.3f} ms, built in {row['ms_built_in']:9.3f} ms"
        return f"{text}  {row['times_as_long']:.3f} times as long"
    if "us_median" in row:
        return (
            f"{row['device']:4} {row['mode']:30} {row['us_median']:8.2f} us a call"
            f"  ({row['us_min']:.2f} to {row['us_max']:.2f})"
            + (f"  {row['us_over_plain']:.1f} over the plain function" if "us_over_plain" in row else "")
        )
    if "needed_bytes" in row:
        peak, needed, extra = (row[f"{name}_bytes"] / 2**20 for name in ("peak", "needed", "extra"))
        return f"peak {peak:9.2f} MiB  needed {needed:9.2f} MiB  over it {extra:9.2f} MiB"
    if "ms_median" in row:
        return _times(row)
    if "ms_predicted" in row:
        return f"{row['ms_predicted']:9.3f} ms  {row['tflops']:7.1f} TFLOP/s"
    text = f"max {row['max_error']:.3e}  rms {row['rms_error']:.3e}"
    if "max_over_flash" in row:
        text += f"  over SDPA flash: {row['max_over_flash']:.2f} and {row['rms_over_flash']:.2f}"
    return text


def _times(row: dict[str, Any]) -> str:
    text = f"{row['ms_median']:9.3f} ms"
    if "tflops" in row:
        text += f"  {row['tflops']:7.1f} TFLOP/s"
    if row.get("peak_bytes"):
        text += f"  peak {row['peak_bytes'] / 2**30:6.2f} GiB"
    text += f"  (median of {len(row['ms_samples'])}, {row['ms_min']:.3f} to {row['ms_max']:.3f} ms)"
    if "times_faster" in row:
        text += f"  {row['times_faster']:.2f} times as fast"
    return text


def _can_measure(kind: str) -> bool:
    if kind == PREDICT:
        return True
    on_any_machine = kind in (HOST_COST, MODEL) and os.environ.get(_INTERPRET_VARIABLE) == "1"
    return on_any_machine or torch.cuda.is_available()


def main(arguments: Sequence[str]) -> None:
    options = parse_arguments(arguments)
    _require_folder(options.output)
    if options.kind == PLOT:
        png = options.output or options.plot.with_suffix(".png")
        plot.plot(_read_record(options.plot), png)
        print(png)
        return
    restart_with_target(options.target, arguments)
    if not _can_measure(options.kind):
        raise SystemExit(
            f"This measures on a GPU, and torch sees none. --plot JSON and --predict CARD run without one, and "
            f"--host-cost and --model where {_INTERPRET_VARIABLE}=1 is set."
        )
    if options.kind == BESIDE:
        _put_beside(options)
        return
    rows = _measure(options)
    if options.kind == PREDICT and all("skipped" in row for row in rows):
        raise SystemExit("Nothing was predicted, and nothing is written.")
    record = {
        "kind": options.kind,
        "machine": machine(),
        "command": list(arguments),
        "rows": rows,
    }
    # Each mode has a file of its own, so that none overwrites another's.
    default = "bench.json" if options.kind == TIMING else f"bench-{options.kind.replace('_', '-')}.json"
    output = options.output or Path(default)
    output.write_text(json.dumps(record, indent=1) + "\n")
    print(output)


if __name__ == "__main__":
    main(sys.argv[1:])
