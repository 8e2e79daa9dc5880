"""A step of inference compared with float64: keys turned and appended to a cache in pages, and queries over it."""

from dataclasses import dataclass, replace
from typing import NamedTuple, cast

import torch

from .. import flash_attn_with_kvcache
from .._reference import Exact, Scores, exact_attention, rounded


@dataclass(frozen=True)
class CacheCase:
    name: str
    head_dim: int = 64
    heads: int = 4
    heads_k: int = 1
    used: tuple[int, ...] = (1000, 0, 77)  # rows of each sequence before
    queries: int = 1  # and rows that are appended
    page_size: int = 16

    def small(self) -> "CacheCase":
        """The same at a size that the interpreter runs in a moment."""
        return replace(self, heads=2, used=tuple(length // 20 for length in self.used))


class CacheInputs(NamedTuple):
    q: torch.Tensor  # (batch, queries, heads, head_dim)
    k: torch.Tensor  # as many rows, of keys' heads
    v: torch.Tensor
    k_cache: torch.Tensor  # (pages, page size, heads of keys, head_dim)
    v_cache: torch.Tensor
    table: torch.Tensor  # (batch, pages of a sequence)
    used: torch.Tensor
    cos: torch.Tensor  # (places, head_dim / 2)
    sin: torch.Tensor


def inputs_of(case: CacheCase, device: str) -> CacheInputs:
    """From N(0, 1), in pages in a random order."""
    generator = torch.Generator().manual_seed(1)
    batch, places = len(case.used), max(case.used) + case.queries
    columns = -(-places // case.page_size)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn((*shape, case.head_dim), generator=generator).to(device, torch.float16)

    new, pages = (batch, case.queries, case.heads_k), (batch * columns, case.page_size, case.heads_k)
    angles = torch.rand((places, case.head_dim // 2), generator=generator) * 6
    table = torch.randperm(batch * columns, generator=generator).reshape(batch, columns)
    return CacheInputs(
        normal(batch, case.queries, case.heads),
        normal(*new),
        normal(*new),
        normal(*pages),
        normal(*pages),
        table.to(device, torch.int32),
        torch.tensor(case.used, dtype=torch.int32, device=device),
        angles.cos().to(device, torch.float16),
        angles.sin().to(device, torch.float16),
    )


def run(inputs: CacheInputs) -> dict[str, torch.Tensor]:
    """out, and the caches as they are then; the inputs' stay as they were."""
    k_cache, v_cache = inputs.k_cache.clone(), inputs.v_cache.clone()
    q, k, v, _, _, table, used, cos, sin = inputs
    out = flash_attn_with_kvcache(
        q, k_cache, v_cache, k, v, cos, sin, cache_seqlens=used, block_table=table, causal=True
    )
    return {"out": cast(torch.Tensor, out), "k_cache": k_cache, "v_cache": v_cache}


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rows (rows, heads, head_dim) in float64, each pair of neighbours by its row's angle."""
    even, odd = x.double().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = (angle.double()[:, None] for angle in (cos, sin))
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)


def _exact_out(inputs: CacheInputs, results: dict[str, torch.Tensor]) -> Exact:
    """Over the keys that are in the cache, whose own errors are theirs."""
    found = []
    for b, used in enumerate(inputs.used.tolist()):
        places = slice(used, used + inputs.q.shape[1])
        q = _turned(inputs.q[b], inputs.cos[places], inputs.sin[places]).half()
        k, v = (results[name][inputs.table[b].long()].flatten(0, 1)[: places.stop] for name in ("k_cache", "v_cache"))
        found.append(exact_attention(q, k, v, torch.zeros_like(q), Scores(causal=True))["out"])
    return Exact(*(torch.stack(parts) for parts in zip(*found)))


def exact_results(inputs: CacheInputs, results: dict[str, torch.Tensor]) -> dict[str, Exact]:
    """What each of run()'s results should be, in float64."""
    k_cache, v_cache = inputs.k_cache.double(), inputs.v_cache.double()
    page_size = k_cache.shape[1]
    for b, used in enumerate(inputs.used.tolist()):
        places = torch.arange(used, used + inputs.k.shape[1], device=inputs.k.device)
        at = inputs.table[b].long()[places // page_size], places % page_size
        k_cache[at] = _turned(inputs.k[b], inputs.cos[places], inputs.sin[places])
        v_cache[at] = inputs.v[b].double()
    return {"out": _exact_out(inputs, results), "k_cache": rounded(k_cache), "v_cache": rounded(v_cache)}


def results_of(case: CacheCase, device: str) -> dict[str, tuple[torch.Tensor, Exact]]:
    """By tensor, what came and what should have."""
    inputs = inputs_of(case, device)
    results = run(inputs)
    exact = exact_results(inputs, results)
    return {name: (results[name], exact[name]) for name in results}
