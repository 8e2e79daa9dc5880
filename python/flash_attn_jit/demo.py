"""``python -m flash_attn_jit.demo``: builds a T4's kernels for some well-known models, on any machine, runs each, and
compares it with float64: on the GPU where there is one, else in the interpreter."""

import argparse
import os
import sys
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

import torch

from . import _core
from ._reference import reference_heads

_SEQLEN = 300  # no multiple of any tile's edge


@dataclass(frozen=True)
class Attention:
    """What a model asks of the forward kernel, from its published configuration."""

    models: str
    head_dim: int
    group_size: int
    causal: bool


MODELS = (
    Attention("Llama-3-8B", head_dim=128, group_size=4, causal=True),  # 32 heads, 8 of keys
    Attention("Qwen2.5-7B", head_dim=128, group_size=7, causal=True),  # 28 heads, 4 of keys
    Attention("GPT-2", head_dim=64, group_size=1, causal=True),  # 12 heads
    Attention("SDXL", head_dim=64, group_size=1, causal=False),  # 10 or 20 heads
)


def _specs(model: Attention) -> List[str]:
    """The kernels that the runtime may choose for the model's tensors, which are aligned."""
    specs = _core.select_kernels(["fwd"], [model.head_dim], [model.causal], [model.group_size], "sm_75")
    return [spec for spec in specs if " vec16 " in spec]


class _Progress:
    def __init__(self, total: int):
        self._total, self._done = total, 0

    def step(self, what: str) -> None:
        self._done += 1
        filled = 24 * self._done // self._total
        bar = f"[{'#' * filled}{'.' * (24 - filled)}] {self._done}/{self._total}"
        if sys.stderr.isatty():
            end = "\n" if self._done == self._total else ""
            print(f"\r\x1b[K{bar} {what}"[:120], end=end, file=sys.stderr, flush=True)
        else:
            print(f"{bar} {what}", file=sys.stderr, flush=True)


def prebuild(specs: Sequence[str], out: Path) -> Dict[str, Dict[str, Any]]:
    """Builds what is not there yet into the pack `out`; what is known of each kernel, by spec."""
    library = _core.open_pack_for_writing(str(out))
    progress = _Progress(len(specs))
    kernels: Dict[str, Dict[str, Any]] = {}
    with ThreadPoolExecutor(os.cpu_count()) as workers:
        jobs: Dict["Future[Dict[str, Any]]", str] = {
            workers.submit(library.find_or_compile, spec, "sm_75"): spec for spec in specs
        }
        for job in as_completed(jobs):
            kernel = kernels[jobs[job]] = job.result()
            is_new = kernel["origin"] == "compiled"
            progress.step(f"{kernel['name']} {'built' if is_new else 'there already'}")
    _core.write_manifest(str(out))
    return kernels


def error_of(model: Attention, tile: str, device: str) -> float:
    """The greatest difference from float64 on N(0, 1) inputs of two sequences, one group of heads."""
    generator = torch.Generator().manual_seed(0)

    def normal(heads: int) -> torch.Tensor:
        return torch.randn(2, _SEQLEN, heads, model.head_dim, generator=generator).to(device, torch.float16)

    q, k, v = normal(model.group_size), normal(1), normal(1)
    out = torch.empty_like(q)
    softmax_lse = torch.empty(2, model.group_size, _SEQLEN, dtype=torch.float32, device=device)
    _core.forward(q, k, v, out, softmax_lse, None, model.causal, tile=tile)
    greatest = 0.0
    for b in range(2):
        keys, values = (t[b].transpose(0, 1).expand(model.group_size, -1, -1) for t in (k, v))
        reference = reference_heads(q[b].transpose(0, 1), keys, values, model.causal)
        greatest = max(greatest, (out[b].transpose(0, 1).double() - reference).abs().max().item())
    return greatest


def choose_device(pack: Path) -> str:
    """The device to run on, with the variables that make it take the Turing code; set before they are read."""
    os.environ["FLASH_ATTN_JIT_PREBUILT"] = str(pack.resolve())
    if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (7, 5):
        if torch.cuda.get_device_capability() != (7, 5):
            os.environ["FLASH_ATTN_JIT_TARGET"] = "compute_75"
        return "cuda"
    os.environ["FLASH_ATTN_JIT_INTERPRET"] = "1"
    return "cpu"


def _row(model: Attention, kernel: Dict[str, Any], error: float) -> List[str]:
    spills = kernel["spill_stores"] + kernel["spill_loads"]
    family = kernel["name"].removesuffix("_" + kernel["tile"])
    return [
        model.models,
        family,
        kernel["tile"],
        str(kernel["registers"]),
        f"{spills} B",
        f"{kernel['seconds']:.2f} s",
        f"{error:.1e}",
    ]


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def main(arguments: Optional[Sequence[str]] = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m flash_attn_jit.demo", description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=Path("demo-pack"), help="the pack's folder (default: demo-pack)"
    )
    out: Path = parser.parse_args(arguments).out
    out.mkdir(parents=True, exist_ok=True)
    device = choose_device(out)

    specs = {model: _specs(model) for model in MODELS}
    kernels = prebuild([spec for of_model in specs.values() for spec in of_model], out)
    where = torch.cuda.get_device_name() if device == "cuda" else "the interpreter"
    print(
        f"Kernels for sm_75 in {out}; FLASH_ATTN_JIT_PREBUILT={out} makes a T4 load them. Running each on {where}."
    )
    rows = [["model", "kernel", "tile", "registers", "spills", "compiled in", "max error vs float64"]]
    for model, of_model in specs.items():
        for spec in of_model:
            rows.append(_row(model, kernels[spec], error_of(model, kernels[spec]["tile"], device)))
    _print_table(rows)


if __name__ == "__main__":
    main()
