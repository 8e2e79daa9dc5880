"""``python -m flash_attn_jit.demo``: builds a T4's kernels for some well-known models, on any machine, runs each, and
compares it with float64: on the GPU where there is one, else in the interpreter. Then a training step, and a token over
a cache."""

import argparse
import copy
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from . import _core, flash_attn_func
from ._options import Options
from ._reference import reference_gradients, reference_heads
from .check import cache

# Of a training step.
_KINDS = tuple(family.word for family in _core.kernel_families() if family.word.startswith(("fwd", "bwd")))
_ALL_KEYS = 64  # that every block of the last kind can have
_SEQLEN = 300  # no multiple of any tile's edge


@dataclass(frozen=True)
class Attention:
    """What a model asks of the kernels, from its published configuration."""

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


def _specs(model: Attention) -> list[str]:
    """The kernels that the runtime may choose for the model's tensors, which are aligned."""
    specs = _core.select_kernels(_KINDS, [model.head_dim], [model.causal], [model.group_size], "sm_75")
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


def prebuild(specs: Sequence[str], out: Path) -> dict[str, dict[str, Any]]:
    """Builds what is not there yet into the pack `out`; what is known of each kernel, by spec."""
    library = _core.open_pack_for_writing(str(out))
    progress = _Progress(len(specs))
    kernels: dict[str, dict[str, Any]] = {}
    with ThreadPoolExecutor(os.cpu_count()) as workers:
        jobs: dict[Future[dict[str, Any]], str] = {
            workers.submit(library.find_or_compile, spec, "sm_75"): spec for spec in specs
        }
        for job in as_completed(jobs):
            kernel = kernels[jobs[job]] = job.result()
            is_new = kernel["origin"] == "compiled"
            progress.step(f"{kernel['name']} {'built' if is_new else 'there already'}")
    _core.write_manifest(str(out))
    return kernels


class _Problem:
    """N(0, 1) inputs of two sequences, one group of heads; float64's out, dq, dk and dv beside them."""

    def __init__(self, model: Attention, device: str, seqlen: int = _SEQLEN):
        generator = torch.Generator().manual_seed(0)

        def normal(heads: int) -> torch.Tensor:
            shape = (2, seqlen, heads, model.head_dim)
            return torch.randn(shape, generator=generator).to(device, torch.float16)

        self._causal = model.causal
        self.q, self.k, self.v = normal(model.group_size), normal(1), normal(1)
        self.dout = normal(model.group_size)
        self.exact = {name: torch.empty_like(x, dtype=torch.float64) for name, x in self._outputs().items()}
        for b in range(2):
            q, dout = (x[b].transpose(0, 1) for x in (self.q, self.dout))
            k, v = (x[b].transpose(0, 1).expand_as(q) for x in (self.k, self.v))
            self.exact["out"][b] = reference_heads(q, k, v, model.causal).transpose(0, 1)
            dq, dk, dv = reference_gradients(q, k, v, dout, model.causal)
            self.exact["dq"][b] = dq.transpose(0, 1)
            for name, gradient in (("dk", dk), ("dv", dv)):  # summed over the group
                self.exact[name][b] = gradient.sum(0)[:, None]

    def _outputs(self) -> dict[str, torch.Tensor]:
        return {"out": self.q, "dq": self.q, "dk": self.k, "dv": self.v}

    def errors(self, tile: str | None = None, **backward_tiles: Any) -> dict[str, float]:
        """The greatest difference from float64 of each tensor, with these tiles or the default ones."""
        results = {name: torch.empty_like(x) for name, x in self._outputs().items()}
        out, dq, dk, dv = results.values()
        batch, seqlen, heads, _ = self.q.shape
        softmax_lse = torch.empty(batch, heads, seqlen, dtype=torch.float32, device=self.q.device)
        options = Options(causal=self._causal)
        _core.forward(self.q, self.k, self.v, out, softmax_lse, options, tile=tile)
        _core.backward(
            self.dout,
            self.q,
            self.k,
            self.v,
            out,
            softmax_lse,
            None,
            dq,
            dk,
            dv,
            None,
            torch.empty_like(softmax_lse),
            None,
            options,
            **backward_tiles,
        )
        return {name: (results[name].double() - self.exact[name]).abs().max().item() for name in results}


def _greatest(errors: Sequence[float]) -> float:
    """NaN where one is: Python's max() may pass over it."""
    return torch.tensor(errors, dtype=torch.float64).max().item()


def errors_of(model: Attention, kernels: dict[str, dict[str, Any]], device: str) -> dict[str, float | None]:
    """By spec, the greatest error of what its kernel writes: out, and of gradients its own. The preprocess kernel
    writes none of these: None."""
    problem = _Problem(model, device)
    of_kind = {kind: [spec for spec in kernels if spec.split()[0] == kind] for kind in _KINDS}
    errors: dict[str, float | None] = dict.fromkeys(kernels)
    for specs in zip_longest(of_kind["fwd"], of_kind["bwd_dkdv"], of_kind["bwd_dq"]):
        tile, dkdv_tile, dq_tile = (kernels[spec]["tile"] if spec else None for spec in specs)
        found = problem.errors(tile, dkdv_tile=dkdv_tile, dq_tile=dq_tile)
        for spec, written in zip(specs, (["out"], ["dk", "dv"], ["dq"])):
            if spec:
                errors[spec] = _greatest([found[name] for name in written])
    short = _Problem(model, device, _ALL_KEYS)
    for spec in of_kind["bwd_all_keys"]:
        found = short.errors(all_keys_tile=kernels[spec]["tile"])
        errors[spec] = _greatest([found[name] for name in ("dq", "dk", "dv")])
    return errors


_Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return cast(torch.Tensor, flash_attn_func(q.half(), k.half(), v.half(), causal=True)).to(q.dtype)


def _attend_in_float64(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return reference_heads(q, k, v, causal=True).transpose(1, 2)


class _Layer(nn.Module):
    """Causal self-attention with its projections, normalisation and residual."""

    def __init__(self, width: int, head_dim: int):
        super().__init__()
        self._head_dim = head_dim
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, attend: _Attend) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, -1, self._head_dim)).unbind(2)
        attended: torch.Tensor = self.projection(attend(q, k, v).flatten(-2))
        return x + attended


class TrainingStep(NamedTuple):
    layers: int
    loss: float
    loss_in_float64: float
    gradient_error: float  # the greatest of any weight's gradient, over that gradient's largest element in float64
    loss_after: float


def _loss(layers: nn.ModuleList, x: torch.Tensor, target: torch.Tensor, attend: _Attend) -> torch.Tensor:
    for layer in layers:
        x = layer(x, attend)
    return nn.functional.mse_loss(x, target)


def training_step(device: str) -> TrainingStep:
    """One step of two attention layers like GPT-2's, of float32 weights, with loss scaling: the attention is float16.
    The same weights in float64 say what loss and gradients should be."""
    torch.manual_seed(0)
    batch, width = 2, 2 * 64
    layers = nn.ModuleList(_Layer(width, head_dim=64) for _ in range(2)).to(device)
    x, target = torch.randn(2, batch, _SEQLEN, width).to(device).unbind()
    exact_layers = copy.deepcopy(layers).double()
    exact_loss = _loss(exact_layers, x.double(), target.double(), _attend_in_float64)
    exact_loss.backward()

    optimizer = torch.optim.AdamW(layers.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler(device)
    loss = _loss(layers, x, target, _attend)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    error = _greatest(
        [
            ((got.grad - exact.grad).abs().max() / exact.grad.abs().max()).item()
            for got, exact in zip(layers.parameters(), exact_layers.parameters())
            if got.grad is not None and exact.grad is not None
        ]
    )
    scaler.step(optimizer)
    with torch.no_grad():
        loss_after = _loss(layers, x, target, _attend)
    return TrainingStep(len(layers), loss.item(), exact_loss.item(), error, loss_after.item())


def token_errors(device: str) -> dict[str, float]:
    """Of a token over a cache in pages, for heads like Llama-3-8B's, its keys and queries turned: the greatest
    difference from float64 of out and of the caches that it was appended to."""
    case = cache.CacheCase("a token", head_dim=128, heads=4, heads_k=1, used=(_SEQLEN, 0, 77))
    results = cache.results_of(case, device)
    return {name: (got.double() - exact.value).abs().max().item() for name, (got, exact) in results.items()}


def choose_device(pack: Path) -> str:
    """The device to run on, with the variables that make it take the Turing code; set before they are read."""
    os.environ["FLASH_ATTN_JIT_PREBUILT"] = str(pack.resolve())
    if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (7, 5):
        if torch.cuda.get_device_capability() != (7, 5):
            os.environ["FLASH_ATTN_JIT_TARGET"] = "compute_75"
        return "cuda"
    os.environ["FLASH_ATTN_JIT_INTERPRET"] = "1"
    return "cpu"


def _row(model: Attention, kernel: dict[str, Any], error: float | None) -> list[str]:
    spills = (kernel["spill_stores"], kernel["spill_loads"])
    family = kernel["name"].removesuffix("_" + kernel["tile"])
    return [
        model.models,
        family,
        kernel["tile"],
        "unknown" if kernel["registers"] is None else str(kernel["registers"]),
        "unknown" if None in spills else f"{sum(spills)} B",
        f"{kernel['seconds']:.2f} s",
        "-" if error is None else f"{error:.1e}",
    ]


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m flash_attn_jit.demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo-pack"), help="the pack's folder (default: demo-pack)")
    out: Path = parser.parse_args(arguments).out
    out.mkdir(parents=True, exist_ok=True)
    device = choose_device(out)

    specs = {model: _specs(model) for model in MODELS}
    kernels = prebuild(list(dict.fromkeys(spec for of_model in specs.values() for spec in of_model)), out)
    where = torch.cuda.get_device_name() if device == "cuda" else "the interpreter"
    print(f"Kernels for sm_75 in {out}; FLASH_ATTN_JIT_PREBUILT={out} makes a T4 load them. Running each on {where}.")
    rows = [["model", "kernel", "tile", "registers", "spills", "compiled in", "max error vs float64"]]
    for model, of_model in specs.items():
        errors = errors_of(model, {spec: kernels[spec] for spec in of_model}, device)
        rows += [_row(model, kernels[spec], errors[spec]) for spec in of_model]
    _print_table(rows)
    step = training_step(device)
    print(
        f"A training step of {step.layers} causal attention layers on {where}: loss {step.loss:.6f} (float64: "
        f"{step.loss_in_float64:.6f}), the greatest relative error of a gradient {step.gradient_error:.1e}, "
        f"loss after the step {step.loss_after:.6f}."
    )
    token = token_errors(device)
    print(
        f"A token for each of 3 sequences over a cache in pages on {where}, appended to it and turned: max error vs "
        f"float64 {token['out']:.1e} (out), {token['k_cache']:.1e} (keys), {token['v_cache']:.1e} (values)."
    )


if __name__ == "__main__":
    main()
