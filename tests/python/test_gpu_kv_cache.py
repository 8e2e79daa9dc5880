"""Caches of keys and values on a GPU: graphs whose lengths change between replays, streams, the same bits always."""

import random

import pytest
import torch
from attention_reference import check_attention, normal
from test_gpu import sanitize
from test_kv_cache import Model, check_call, int32, random_call

import flash_attn_jit
from flash_attn_jit import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]


def on_gpu(*shape: int, seed: int = 0) -> torch.Tensor:
    return normal(*shape, seed=seed, device="cuda")


@pytest.mark.parametrize("head_dim", [17, 64, 80, 128, 256])
@pytest.mark.parametrize("queries", [1, 16, 300])
@pytest.mark.parametrize("keys", [1, 100, 4096, 30011])
def test_lengths(head_dim, queries, keys):
    q, k, v = (
        on_gpu(2, queries, 8, head_dim),
        on_gpu(2, keys, 2, head_dim, seed=1),
        on_gpu(2, keys, 2, head_dim, seed=2),
    )
    for causal in (False, True):
        out, lse, _ = flash_attn_func(q, k, v, causal=causal, return_attn_probs=True)
        check_attention(out, lse, q, k, v, causal)


@pytest.mark.parametrize("page_size", [1, 3, 16, 256])
@pytest.mark.parametrize("queries", [1, 7, 400])
def test_pages(page_size, queries):
    used = [5000, 0, 1, 777]
    columns = -(-max(used) // page_size)
    table = torch.randperm(columns * 4 + 3)[: columns * 4].reshape(4, columns).int()
    cache = torch.full((columns * 4 + 3, page_size, 2, 256), float("nan"), dtype=torch.float16, device="cuda")
    q, keys = on_gpu(4, queries, 8, 128), []
    for b, end in enumerate(used):
        own = on_gpu(end, 2, 256, seed=b + 1)
        at = torch.arange(end)
        cache[table[b, at // page_size].cuda(), (at % page_size).cuda()] = own
        keys.append(own)
    out = flash_attn_varlen_func(
        q.flatten(0, 1),
        cache[..., :128],
        cache[..., 128:],
        int32([queries * b for b in range(5)]).cuda(),
        None,
        queries,
        columns * page_size,
        causal=True,
        block_table=table.cuda(),
        seqused_k=int32(used).cuda(),
    ).unflatten(0, q.shape[:2])
    for b, own in enumerate(keys):
        check_attention(out[b : b + 1], None, q[b : b + 1], own[None, ..., :128], own[None, ..., 128:], True)


@pytest.mark.parametrize("number", range(24))
def test_random_calls(number):
    dice = random.Random(1000 + number)
    check_call(random_call(dice), device="cuda", num_splits=dice.choice([0, 1, 2, 5]))


SANITIZED = """
import random
from test_kv_cache import check_call, random_call
for number in range(6):
    check_call(random_call(random.Random(number)), device="cuda", num_splits=number % 3)
"""


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer(tool):
    sanitize(tool, SANITIZED)


def test_nothing_outside_is_touched_whatever_lengths_and_tables_say():
    cache = on_gpu(10, 16, 2, 128)
    before, q, new = cache.clone(), on_gpu(3, 1, 4, 64), on_gpu(3, 1, 2, 64, seed=1)
    table = int32([-5, 10**9, 3, 4, 10, 5]).reshape(3, 2).cuda()
    for used in ([-7, 5, 31], [10**9, 32, 2**31 - 1]):
        flash_attn_with_kvcache(
            q,
            cache[..., :64],
            cache[..., 64:],
            new,
            new,
            cache_seqlens=int32(used).cuda(),
            block_table=table,
            causal=True,
        )
        torch.cuda.synchronize()
    changed = (cache != before).flatten(1).any(1).nonzero().flatten().tolist()
    assert set(changed) <= {3, 5}


def test_one_graph_serves_every_later_length():
    cache, used = torch.zeros(2, 3000, 2, 256, dtype=torch.float16, device="cuda"), int32([900, 7]).cuda()
    cache[:] = on_gpu(2, 3000, 2, 256, seed=5)
    q, k, v = on_gpu(2, 1, 8, 128), on_gpu(2, 1, 2, 128, seed=1), on_gpu(2, 1, 2, 128, seed=2)

    def step():
        return flash_attn_with_kvcache(q, cache[..., :128], cache[..., 128:], k, v, cache_seqlens=used, causal=True)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for lengths in ([900, 7], [0, 2999], [1500, 1], [2999, 2048]):
        used.copy_(int32(lengths))
        q.copy_(on_gpu(2, 1, 8, 128, seed=sum(lengths)))
        graph.replay()
        torch.cuda.synchronize()
        for b, n in enumerate(lengths):
            own = cache[b, : n + 1]
            assert torch.equal(own[n, :, :128], k[b, 0]) and torch.equal(own[n, :, 128:], v[b, 0])
            check_attention(out[b : b + 1], None, q[b : b + 1], own[None, ..., :128], own[None, ..., 128:], True)


@pytest.mark.parametrize("splits", [0, 1, 5])
def test_the_same_bits_every_time_on_two_streams(splits):
    q, k, v = on_gpu(1, 1, 32, 128), on_gpu(1, 20000, 8, 128, seed=1), on_gpu(1, 20000, 8, 128, seed=2)
    first = flash_attn_func(q, k, v, causal=True, num_splits=splits)
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    results = []
    for i in range(100):
        with torch.cuda.stream(streams[i % 2]):
            results.append(flash_attn_func(q, k, v, causal=True, num_splits=splits))
    torch.cuda.synchronize()
    assert all(torch.equal(result, first) for result in results)


def test_a_model_generates_the_same_tokens_with_every_cache():
    model, prompt = Model("cuda"), (torch.arange(14).reshape(2, 7) * 5 % 97).cuda()
    expected = model.without_cache(prompt, 40)
    for page_size in (None, 1, 16):
        assert torch.equal(model.with_cache(prompt, 40, page_size), expected)


def test_few_queries_take_the_decode_kernel():
    flash_attn_func(on_gpu(1, 1, 8, 96), on_gpu(1, 700, 8, 96), on_gpu(1, 700, 8, 96), causal=True)
    loaded = flash_attn_jit._core.loaded_kernels(torch.cuda.current_device())
    assert any(spec.startswith("decode hdim96 fp16 causal gqa1") for spec in loaded)
