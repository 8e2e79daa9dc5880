"""The command line of ``python -m flash_attn_jit.bench``."""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any, Dict, Iterable, List, Optional, Sequence

import torch

from .. import __version__, _core
from . import accuracy, host_cost, memory, plot, timing
from .backends import NAMES
from .problem import PASSES, Problem, sweep

_TARGET_VARIABLE = "FLASH_ATTN_JIT_TARGET"
_INTERPRET_VARIABLE = "FLASH_ATTN_JIT_INTERPRET"
_SEQLENS = [512, 1024, 2048, 4096, 8192, 16384]
_SEQLENS_OF_MEMORY = [1024, 4096]


def _integers(text: str) -> List[int]:
    return [int(part) for part in text.split(",")]


def _names(what: str, accepted: Sequence[str], text: str) -> List[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in accepted]
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown {what} {unknown[0]!r}; there are {', '.join(accepted)}")
    return names


def _backends(text: str) -> List[str]:
    return _names("backend", NAMES, text)


def _passes(text: str) -> List[str]:
    return _names("pass", PASSES, text)


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m flash_attn_jit.bench",
        description="Times attention, forward and backward, against PyTorch SDPA's backends and writes the figures as "
        "JSON.",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--accuracy",
        action="store_true",
        help="errors of the output and the gradients against float64 instead of times, sequences up to 4096",
    )
    what.add_argument(
        "--memory",
        action="store_true",
        help="the peak memory of a backward call, beside inputs, outputs, gradients and one float a query row and "
        "head, instead of times",
    )
    what.add_argument(
        "--host-cost", action="store_true", help="the cost of a Python call beside SDPA's instead of times"
    )
    what.add_argument(
        "--plot", type=Path, metavar="JSON", help="measure nothing: draw the PNG of this timing run"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="JSON to write (default: bench.json, bench-accuracy.json and so on), or --plot's PNG",
    )
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument(
        "--heads-k",
        type=int,
        help="heads of k and v (default: as many as --heads; --memory: these, then one for all)",
    )
    parser.add_argument("--head-dims", type=_integers, default=[64, 128], metavar="64,128")
    parser.add_argument(
        "--seqlens",
        type=_integers,
        metavar="512,...",
        help=f"(default: {','.join(map(str, _SEQLENS))}; --memory: {','.join(map(str, _SEQLENS_OF_MEMORY))})",
    )
    parser.add_argument("--causal", choices=["both", "yes", "no"], default="both")
    parser.add_argument(
        "--passes",
        type=_passes,
        default=list(PASSES),
        metavar=",".join(PASSES),
        help="fwd: forward; bwd: backward alone, over graphs made beforehand, counted as 2.5 times the forward pass; "
        "both: a forward and a backward pass, counted as 3.5 times; --accuracy: fwd is the output, bwd the gradients "
        "(default: all)",
    )
    parser.add_argument("--backends", type=_backends, default=list(NAMES), metavar=",".join(NAMES))
    parser.add_argument(
        "--rounds", type=int, default=5, help="samples of each backend, taken in turns (default: 5)"
    )
    parser.add_argument(
        "--burst-ms", type=float, default=50.0, help="calls back to back in a sample last about this long"
    )
    parser.add_argument("--seeds", type=int, default=5, help="--accuracy: how many (default: 5)")
    parser.add_argument(
        "--target",
        choices=["native", "compute_75"],
        help=f"sets {_TARGET_VARIABLE}: compute_75 runs the Turing code on a newer GPU",
    )
    return parser.parse_args(arguments)


def restart_with_target(target: Optional[str], arguments: Sequence[str]) -> None:
    """The configuration reads its variable once, so a process that lacks it is replaced by one that has it."""
    if target is None or os.environ.get(_TARGET_VARIABLE) == target:
        return
    environment = {**os.environ, _TARGET_VARIABLE: target}
    os.execve(sys.executable, [sys.executable, "-m", __package__, *arguments], environment)


def _require_folder(output: Optional[Path]) -> None:
    """Before anything is measured: a figure that cannot be written is lost."""
    if output is not None and not output.parent.is_dir():
        raise SystemExit(f"--output is {output}: there is no folder {output.parent}.")


def _read_record(path: Path) -> Dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise SystemExit(f"--plot is {path}: {error}. Accepted: the JSON that a timing run has written.") from None


def machine() -> Dict[str, Any]:
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "devices": _core.devices(),
        "target": os.environ.get(_TARGET_VARIABLE, "native"),
        "torch": torch.__version__,
        "cuda_of_torch": torch.version.cuda,
        "flash_attn_jit": __version__,
    }


def _problems(options: argparse.Namespace) -> Iterable[Problem]:
    causal = {"both": [False, True], "yes": [True], "no": [False]}[options.causal]
    seqlens = options.seqlens or (_SEQLENS_OF_MEMORY if options.memory else _SEQLENS)
    if options.accuracy:
        seqlens = [seqlen for seqlen in seqlens if seqlen <= 4096]
    heads_k = [options.heads_k] if options.heads_k else [options.heads, 1] if options.memory else [options.heads]
    for each in heads_k:
        yield from sweep(options.batch, (options.heads, each), options.head_dims, seqlens, causal)


def _measure(options: argparse.Namespace) -> List[Dict[str, Any]]:
    if options.host_cost:
        return _print_rows("", host_cost.run())
    rows: List[Dict[str, Any]] = []
    for problem in _problems(options):
        if options.memory:
            rows += _print_rows(str(problem), memory.run(problem, options.backends))
        elif options.accuracy:
            measured = accuracy.run(problem, options.passes, options.backends, range(options.seeds))
            rows += _print_rows(str(problem), measured)
        else:
            for which in options.passes:
                measured = timing.run(problem, which, options.backends, options.rounds, options.burst_ms)
                rows += _print_rows(str(problem), measured)
    return rows


def _print_rows(problem: str, rows: List[Dict[str, Any]]) -> List[Dict[str, Any]]:
    for row in rows:
        what = row.get("tensor") or row["pass"]
        print(f"{problem:32} {what:4} {row['backend']:16} {_figures(row)}".lstrip(), flush=True)
    return rows


def _figures(row: Dict[str, Any]) -> str:
    if "skipped" in row:
        return f"does not run: {row['skipped']}"
    if "us_median" in row:
        return (
            f"{row['device']:4} {row['mode']:30} {row['us_median']:8.2f} us a call"
            f"  ({row['us_min']:.2f} to {row['us_max']:.2f})"
        )
    if "peak_bytes" in row:
        peak, needed, extra = (row[f"{name}_bytes"] / 2**20 for name in ("peak", "needed", "extra"))
        return f"peak {peak:9.2f} MiB  needed {needed:9.2f} MiB  over it {extra:9.2f} MiB"
    if "tflops" in row:
        return (
            f"{row['ms_median']:9.3f} ms  {row['tflops']:7.1f} TFLOP/s"
            f"  (median of {len(row['ms_samples'])}, {row['ms_min']:.3f} to {row['ms_max']:.3f} ms)"
        )
    text = f"max {row['max_error']:.3e}  rms {row['rms_error']:.3e}"
    if "max_over_flash" in row:
        text += f"  over SDPA flash: {row['max_over_flash']:.2f} and {row['rms_over_flash']:.2f}"
    return text


def main(arguments: Sequence[str]) -> None:
    options = parse_arguments(arguments)
    _require_folder(options.output)
    if options.plot:
        png = options.output or options.plot.with_suffix(".png")
        plot.plot(_read_record(options.plot), png)
        print(png)
        return
    restart_with_target(options.target, arguments)
    if not torch.cuda.is_available() and not (options.host_cost and os.environ.get(_INTERPRET_VARIABLE) == "1"):
        raise SystemExit(
            f"This measures on a GPU, and torch sees none. --plot JSON runs without one, and --host-cost where "
            f"{_INTERPRET_VARIABLE}=1 is set."
        )
    kinds = ("host_cost", "accuracy", "memory")
    kind = next((kind for kind in kinds if getattr(options, kind)), "timing")
    record = {"kind": kind, "machine": machine(), "command": list(arguments), "rows": _measure(options)}
    # Each mode has a file of its own, so that none overwrites another's.
    default = "bench.json" if kind == "timing" else f"bench-{kind.replace('_', '-')}.json"
    output = options.output or Path(default)
    output.write_text(json.dumps(record, indent=1) + "\n")
    print(output)


if __name__ == "__main__":
    main(sys.argv[1:])
