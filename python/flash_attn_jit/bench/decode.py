"""Inference calls: some queries over many keys, on the GPU alone, beside the bandwidth that copies on it get.

With ``causal``, which aligns the mask bottom-right, a query sees every key before it. SDPA's ``is_causal`` is aligned
top-left, so that the first of 16 queries would see one key of thousands: SDPA is called without a mask.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from statistics import median
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F

from .. import flash_attn_func, flash_attn_varlen_func
from .._reference import Exact, allowed_of_out
from . import accuracy, timing
from .backends import OURS, SDPA_EFFICIENT, SDPA_FLASH, Backend
from .out_of_memory import OUT_OF_MEMORY, free_memory, is_out_of_memory
from .problem import FORWARD, Inputs, Problem

_COPIED_BYTES = 1 << 28
_MOST_CALLS = 100  # of a graph
_MOST_SETS = 32
_MOST_OF_MEMORY = 0.8  # of what is free: for the inputs

_Call = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class DecodeProblem:
    batch: int
    num_heads: int
    num_heads_k: int
    head_dim: int
    queries: int
    keys: int

    def kv_bytes(self) -> int:
        return 2 * 2 * self.batch * self.keys * self.num_heads_k * self.head_dim

    def inputs(self, seed: int) -> Inputs:
        """From N(0, 1)."""
        generator = torch.Generator(_device()).manual_seed(seed)

        def normal(seqlen: int, heads: int) -> torch.Tensor:
            shape = (self.batch, seqlen, heads, self.head_dim)
            return torch.randn(shape, generator=generator, device=_device(), dtype=torch.float16)

        keys = self.keys, self.num_heads_k
        return Inputs(normal(self.queries, self.num_heads), normal(*keys), normal(*keys), None)

    def __str__(self) -> str:
        heads = f"{self.num_heads}" if self.num_heads == self.num_heads_k else f"{self.num_heads}/{self.num_heads_k}"
        return f"b{self.batch} h{heads} d{self.head_dim} q{self.queries} k{self.keys}"


def problems(
    batches: Sequence[int],
    heads: int,
    heads_k: Sequence[int],
    head_dims: Sequence[int],
    queries: Sequence[int],
    keys: Sequence[int],
) -> Iterator[DecodeProblem]:
    for each_keys, batch, each_queries, each_heads_k, head_dim in product(keys, batches, queries, heads_k, head_dims):
        yield DecodeProblem(batch, heads, each_heads_k, head_dim, each_queries, each_keys)


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def copied_bytes_per_second(rounds: int, burst_ms: float) -> float:
    """Of a copy on the device, in the median: bytes that are read and bytes that are written."""
    source = torch.empty(_COPIED_BYTES, dtype=torch.uint8, device=_device())
    copy = timing.Candidate("copy", nullcontext, [partial(torch.empty_like(source).copy_, source)])
    return 2 * _COPIED_BYTES / median(timing.time_interleaved([copy], rounds, burst_ms)["copy"]) * 1e3


def _ours(inputs: Inputs) -> torch.Tensor:
    return cast(torch.Tensor, flash_attn_func(*inputs.qkv, causal=True))


def _in_pages(x: torch.Tensor, page_size: int, table: torch.Tensor) -> torch.Tensor:
    """(pages, page size, heads, head_dim) of x (batch, keys, heads, head_dim), where the table says."""
    rows = F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % page_size)).unflatten(1, (-1, page_size)).flatten(0, 1)
    pages = torch.empty_like(rows)
    pages[table.flatten().long()] = rows
    return pages


def _paged(page_size: int, inputs: Inputs) -> _Call:
    """The call of flash_attn_varlen_func for pages in a random order."""
    q, k, v = inputs.qkv
    (batch, queries), keys = q.shape[:2], k.shape[1]
    columns = -(-keys // page_size)
    table = torch.randperm(batch * columns, device=q.device, dtype=torch.int32).reshape(batch, columns)
    starts = torch.arange(0, (batch + 1) * queries, queries, device=q.device, dtype=torch.int32)
    used = torch.full((batch,), keys, device=q.device, dtype=torch.int32)
    rows, k, v = q.flatten(0, 1), _in_pages(k, page_size, table), _in_pages(v, page_size, table)

    def call() -> torch.Tensor:
        out = flash_attn_varlen_func(
            rows, k, v, starts, None, queries, keys, causal=True, block_table=table, seqused_k=used
        )
        return cast(torch.Tensor, out).view_as(q)

    return call


def _expanded(inputs: Inputs) -> Inputs:
    """With a key head for every query head, as the memory-efficient kernel wants them."""
    q, k, v = inputs.qkv
    group_size = q.shape[2] // k.shape[2]
    if group_size == 1:
        return inputs
    return Inputs(q, k.repeat_interleave(group_size, 2), v.repeat_interleave(group_size, 2), None)


class _Contender(NamedTuple):
    name: str
    call: Callable[[Inputs], _Call]  # what its layout needs is made here, outside of what is timed
    why_not: Callable[[Inputs], str]
    selected: Callable[[], AbstractContextManager[None]]
    is_ours: bool


def _sdpa(problem: DecodeProblem, name: str) -> _Contender:
    prepared = _expanded if name == SDPA_EFFICIENT else (lambda inputs: inputs)
    heads_k = problem.num_heads if name == SDPA_EFFICIENT else problem.num_heads_k
    unmasked = Problem(problem.batch, problem.num_heads, heads_k, problem.head_dim, problem.keys, causal=False)
    backend = Backend(name, unmasked)
    return _Contender(
        name,
        lambda inputs: partial(backend.forward, prepared(inputs)),
        lambda inputs: backend.why_not(prepared(inputs)),
        backend.selected,
        is_ours=False,
    )


def contenders(problem: DecodeProblem, page_size: int | None) -> list[_Contender]:
    calls: dict[str, Callable[[Inputs], _Call]] = {OURS: lambda inputs: partial(_ours, inputs)}
    if page_size:
        calls[f"pages of {page_size}"] = partial(_paged, page_size)
    ours = [_Contender(name, call, lambda _: "", nullcontext, is_ours=True) for name, call in calls.items()]
    return ours + [_sdpa(problem, name) for name in (SDPA_FLASH, SDPA_EFFICIENT)]


def input_sets(problem: DecodeProblem, copies: int) -> list[Inputs]:
    """Enough to pass the L2 cache twice over before one comes again, where there is room for so many copies of each
    one's keys and values."""
    if not torch.cuda.is_available():
        return [problem.inputs(seed) for seed in range(2)]
    l2_bytes = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    free_bytes, _ = torch.cuda.mem_get_info()
    room = int(_MOST_OF_MEMORY * free_bytes) // (copies * problem.kv_bytes())
    sets = max(1, min(_MOST_SETS, room, 1 - (-2 * l2_bytes // problem.kv_bytes())))
    return [problem.inputs(seed) for seed in range(sets)]


def _captured(calls: Sequence[_Call]) -> Callable[[], object]:
    """All of them in a CUDA graph, where the host costs nothing; on the CPU one after the other."""
    if not torch.cuda.is_available():
        return lambda: [call() for call in calls]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


class _Launch(NamedTuple):
    go: Callable[[], object]
    calls: int
    kept: Sequence[_Call]  # a graph does not keep the tensors that it reads


def _launch(contender: _Contender, sets: Sequence[Inputs], burst_ms: float) -> _Launch | None:
    """Each set's call once, or of all together as many as a third of a burst has time for: a burst has three launches
    or more. None where the memory ends."""
    calls = [contender.call(inputs) for inputs in sets]
    alone = timing.Candidate(contender.name, nullcontext, list(calls))
    samples = timing.time_interleaved([alone], 1, burst_ms)
    if not samples:
        return None
    count = max(len(calls), min(_MOST_CALLS, round(burst_ms / 3 / samples[contender.name][0])))
    return _Launch(_captured([calls[i % len(calls)] for i in range(count)]), count, calls)


def _prepare(contender: _Contender, sets: Sequence[Inputs], burst_ms: float) -> _Launch | str:
    """What is timed, or why nothing is."""
    try:
        reason = contender.why_not(sets[0])
        if reason:
            return reason
        with contender.selected():
            launch = _launch(contender, sets, burst_ms)
        if launch:
            return launch
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    free_memory()
    return OUT_OF_MEMORY


def exact_out(inputs: Inputs) -> Exact:
    q, k, v = inputs.qkv
    value, weight = (accuracy.references(Inputs(q, k, x, None), causal=True)[accuracy.OUT] for x in (v, v.abs()))
    return Exact(value, allowed_of_out(value, weight))


def greatest_error(what: str, out: torch.Tensor, exact: Exact) -> float:
    """Of a result that is right; the times of another are worth nothing."""
    error = (out.double() - exact.value).abs()
    greatest = error.max().item()
    if not (error <= exact.allowed).all():
        raise SystemExit(f"{what} is WRONG: {greatest:.3e} off float64, more than float16 makes of it.")
    return greatest


def _figures(problem: DecodeProblem, launch: _Launch, samples: Sequence[float], copied: float) -> dict[str, Any]:
    each = [ms * 1e3 / launch.calls for ms in samples]
    us = median(each)
    return {
        "us_a_call": us,
        "us_samples": each,
        "calls_of_a_launch": launch.calls,
        "share_of_copies": problem.kv_bytes() / (us * 1e-6) / copied,
    }


def run(
    problem: DecodeProblem, page_size: int | None, copied: float, rounds: int, burst_ms: float
) -> list[dict[str, Any]]:
    """One row a contender: the microseconds of a call; which share of the bandwidth of copies, `copied` bytes a second,
    reading k and v once makes of them; and how many times as long as this library's they are."""
    all_of_them = contenders(problem, page_size)
    rows = [{**asdict(problem), "pass": FORWARD, "backend": each.name} for each in all_of_them]
    launches: dict[str, _Launch] = {}
    with torch.no_grad():
        sets = input_sets(problem, 1 + bool(page_size) + problem.num_heads // problem.num_heads_k)
        exact = exact_out(sets[0])
        for contender, row in zip(all_of_them, rows):
            if contender.is_ours:
                row["max_error"] = greatest_error(f"{problem}, {contender.name}", contender.call(sets[0])(), exact)
            found = _prepare(contender, sets, burst_ms)
            if isinstance(found, str):
                row["skipped"] = found
            else:
                launches[contender.name] = found
        candidates = [timing.Candidate(name, nullcontext, [launch.go]) for name, launch in launches.items()]
        samples = timing.time_interleaved(candidates, rounds, burst_ms)
    for row in rows:
        name = row["backend"]
        if name in samples:
            row.update(_figures(problem, launches[name], samples[name], copied))
        else:
            row.setdefault("skipped", OUT_OF_MEMORY)
    _compare(rows)
    return rows


def _compare(rows: Sequence[dict[str, Any]]) -> None:
    ours = rows[0].get("us_a_call")
    for row in rows[1:]:
        if ours and "us_a_call" in row:
            row["times_as_long"] = row["us_a_call"] / ours
