"""The attention backends for vLLM and SGLang on a GPU, over stand-ins of both: longer batches than the interpreter's,
nothing that waits for the GPU, and CUDA graphs that are replayed with other lengths. Neither engine itself runs."""

import contextlib
from typing import Any

import pytest
import torch
from test_sglang_backend import LAYERS as SGLANG_LAYERS, sglang  # noqa: F401  a fixture
from test_vllm_backend import LAYERS as VLLM_LAYERS, vllm  # noqa: F401  a fixture

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]

SIZES = {"head_dim": 128, "longest": 2048}


@contextlib.contextmanager
def no_synchronisation() -> Any:
    """As torch sees it."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture(params=list(VLLM_LAYERS.values()), ids=list(VLLM_LAYERS))
def vllm_engine(request, vllm):  # noqa: F811
    from vllm_engine import Engine

    return Engine("cuda", **{**SIZES, **request.param})


@pytest.fixture(params=list(SGLANG_LAYERS.values()), ids=list(SGLANG_LAYERS))
def sglang_engine(request, sglang):  # noqa: F811
    from sglang_engine import Engine

    return Engine("cuda", **{**SIZES, **request.param})


def capture(step: Any) -> torch.cuda.CUDAGraph:
    """As the engines do: a step before, then the capture."""
    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def test_vllm_steps(vllm_engine):
    it = vllm_engine
    for new in ({0: 700, 1: 9}, {0: 1, 2: 300, 1: 1}, {2: 513, 0: 1, 3: 1}, {0: 1, 1: 1, 2: 1, 3: 1}):
        batch = it.prepare(new, rows=sum(new.values()) + 3, requests=len(new) + 1)
        it.run(*batch)  # compiles, if at all
        torch.cuda.synchronize()
        with no_synchronisation():
            it.run(*batch)
        it.check(new, batch[0], batch[3])


@pytest.mark.parametrize("queries", [1, 4])
def test_vllm_graph(vllm_engine, queries):
    it = vllm_engine
    it.step({0: 1500, 1: 3, 2: 1})
    static = it.prepare({0: queries, 1: queries}, requests=4, rows=4 * queries, capture=True)
    graph = capture(lambda: it.run(*static))
    for new in ({0: queries}, {2: queries, 1: queries, 0: queries}, {1: queries, 3: queries}):
        *fresh, _ = it.prepare(new, requests=4, rows=4 * queries)
        for kept, tensor in zip(static, fresh):
            kept.copy_(tensor)
        graph.replay()
        torch.cuda.synchronize()
        it.check(new, static[0], static[3])


def test_sglang_steps(sglang_engine):
    it = sglang_engine
    for new, mode in (
        ({0: 700, 1: 9}, "EXTEND"),
        ({2: 300, 1: 4}, "EXTEND"),
        ({2: 513, 0: 1, 1: 1}, "MIXED"),
        ({0: 1, 1: 1, 2: 1}, "DECODE"),
    ):
        q, k, v, batch = it.prepare(new, mode)
        it.backend.init_forward_metadata(batch)
        it.run(q, k, v, batch)  # compiles, if at all
        torch.cuda.synchronize()
        with no_synchronisation():
            out = it.run(q, k, v, batch)
        it.check(new, q, out)


def test_sglang_graph(sglang_engine):
    it = sglang_engine
    it.backend.init_cuda_graph_state(6, 6)
    it.step({0: 1500, 1: 3})
    q, k, v, batch = it.prepare({0: 1, 1: 1}, "DECODE", 4)
    it.backend.init_forward_metadata_out_graph(batch, in_capture=True)
    outs: list[torch.Tensor] = []

    def step() -> None:
        it.backend.init_forward_metadata_in_graph(batch)
        outs.append(it.run(q, k, v, batch))

    graph = capture(step)
    for new in ({0: 1}, {0: 1, 1: 1, 2: 1}, {1: 1, 3: 1, 0: 1}):
        *fresh, later = it.prepare(new, "DECODE", 4)
        for kept, tensor in zip((q, k, v), fresh):
            kept.copy_(tensor)
        batch.out_cache_loc.copy_(later.out_cache_loc)
        it.backend.init_forward_metadata_out_graph(later)
        graph.replay()
        torch.cuda.synchronize()
        it.check(new, q, outs[-1])
