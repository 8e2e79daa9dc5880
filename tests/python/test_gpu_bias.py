"""Attention masks and biases on a GPU: larger tensors, the same bits always, graphs, memory."""

import gc
import itertools
import random
from typing import Any

import pytest
import torch
from attention_reference import (
    check_attention,
    check_gradients,
    check_varlen_attention,
    exact_gradients,
    exact_varlen_gradients,
    normal,
    normal_qkv,
)
from test_bias import (
    BROADCASTS,
    DTYPES,
    GRID,
    INF,
    LAYOUTS,
    OTHERS,
    bias_of,
    check,
    check_cache,
    random_call,
    values_of,
    whole_of,
)
from test_bias_gradient import check as check_with_its_gradient

from flash_attn_jit import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache, route_sdpa, sdpa

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no NVIDIA GPU"),
]

HEAD_DIMS = [40, 64, 128]
SEQLENS = [(300, 1096), (1096, 304), (520, 520)]


@pytest.mark.parametrize(("number", "case"), list(enumerate(GRID)), ids=str)
def test_out_and_gradients(number, case):
    dtype, layout, ones = case
    seqlen_q, seqlen_k = SEQLENS[number % 3]
    head_dim = HEAD_DIMS[number // 3 % 3]
    q, k, v = normal_qkv(2, seqlen_q, seqlen_k - (layout == "odd width"), 4, 2, head_dim, device="cuda")
    check(q, k, v, attn_bias=bias_of(whole_of(q, k), dtype, layout, ones, device="cuda"))


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_few_queries(queries, dtype, head_dim):
    for number, (layout, keys) in enumerate(itertools.product(LAYOUTS, [304, 5000])):
        q, k, v = normal_qkv(2, queries, keys + (layout == "odd width"), 8, 2, head_dim, device="cuda")
        bias = bias_of(whole_of(q, k), dtype, layout, BROADCASTS[2 * number % 16], device="cuda")
        for splits in (0, 5):
            out, lse, _ = flash_attn_func(q, k, v, attn_bias=bias, num_splits=splits, return_attn_probs=True)
            check_attention(out, lse, q, k, v, attn_bias=bias)


def on_gpu(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in options.items()}


PAIRS = [{**one, **other} for one, other in itertools.combinations(OTHERS, 2)]


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("number", "options"), list(enumerate(OTHERS + PAIRS)), ids=str)
def test_with_other_options(number, options, head_dim):
    layout = LAYOUTS[number % 2]
    q, k, v = normal_qkv(2, 520, 520 - (layout == "odd width"), 4, 2, head_dim, device="cuda")
    bias = bias_of(whole_of(q, k), DTYPES[number % 3], layout, seed=number, device="cuda")
    check(q, k, v, attn_bias=bias, **on_gpu(options))


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ones", [(False,) * 4, (False, True, True, False)], ids=str)
def test_varlen(ones, dtype, head_dim):
    lengths_q, lengths_k = [300, 0, 129, 1, 700, 64], [300, 50, 257, 5, 65, 1096]
    cu_q, cu_k = (torch.tensor([0, *n], device="cuda").cumsum(0).int() for n in (lengths_q, lengths_k))
    longest = max(lengths_q), max(lengths_k)
    q = normal(sum(lengths_q), 4, head_dim, seed=1, device="cuda").requires_grad_()
    k, v = (normal(sum(lengths_k), 2, head_dim, seed=seed, device="cuda").requires_grad_() for seed in (2, 3))
    bias = bias_of((6, 4, *longest), dtype, ones=ones, device="cuda")
    out, lse, _ = flash_attn_varlen_func(q, k, v, cu_q, cu_k, *longest, attn_bias=bias, return_attn_probs=True)
    check_varlen_attention(out.detach(), lse, q.detach(), k.detach(), v.detach(), cu_q, cu_k, attn_bias=bias)
    dout = normal(*out.shape, seed=9, device="cuda")
    gradients = torch.autograd.grad(out, (q, k, v), dout)
    check_gradients(gradients, exact_varlen_gradients(q, k, v, dout, cu_q, cu_k, attn_bias=bias))


@pytest.mark.parametrize("queries", [1, 300])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("paged", "padded"), list(itertools.product([False, True], repeat=2)))
def test_caches(queries, dtype, paged, padded):
    for head_dim, layout in zip(HEAD_DIMS, LAYOUTS):
        rows = 1091 if layout == "odd width" and not paged else 1096
        ones = (False, True, layout == "at once", False)
        check_cache(queries, dtype, layout, ones, rows, "cuda", head_dim, paged, padded, causal=True)


@pytest.mark.parametrize("number", range(40))
def test_random_calls(number):
    random_call(random.Random(9000 + number), 1100, (40, 64, 128), "cuda")


@pytest.mark.parametrize("head_dim", [64, 128])
def test_rows_that_see_no_key(head_dim):
    q, k, v = (t.requires_grad_() for t in normal_qkv(2, 520, 520, 4, 2, head_dim, device="cuda"))
    dout = normal(*q.shape, seed=9, device="cuda")
    for dtype in DTYPES:
        bias = values_of((2, 4, 520, 520), dtype, device="cuda")
        bias[:, :, 100:300] = False if dtype is torch.bool else -INF
        out, lse, _ = flash_attn_func(q, k, v, attn_bias=bias, return_attn_probs=True)
        assert not out[:, 100:300].any() and (lse[..., 100:300] == INF).all()
        gradients = torch.autograd.grad(out, (q, k, v), dout)
        assert not gradients[0][:, 100:300].any()
        check_gradients(gradients, exact_gradients(q, k, v, dout, attn_bias=bias))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_the_least_number_instead_of_minus_infinity(dtype):
    q, k, v = (t.requires_grad_() for t in normal_qkv(2, 520, 520, 4, 2, 64, device="cuda"))
    bias = torch.zeros(2, 1, 520, 520, dtype=dtype, device="cuda")
    bias[..., 400:] = torch.finfo(dtype).min
    bias[:, :, 100:300] = torch.finfo(dtype).min
    out, lse, _ = flash_attn_func(q, k, v, attn_bias=bias, return_attn_probs=True)
    gradients = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    assert all(tensor.isfinite().all() for tensor in (out, lse, *gradients))
    if dtype is torch.float32:
        mean = v.detach().float().mean(1).repeat_interleave(2, 1)[:, None].expand(2, 200, 4, 64)
        torch.testing.assert_close(out[:, 100:300].float(), mean, atol=2e-3, rtol=0)
        assert not gradients[0][:, 100:300].any()


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_every_time(dtype, head_dim):
    q, k, v = (t.requires_grad_() for t in normal_qkv(2, 520, 1096, 4, 2, head_dim, device="cuda"))
    bias = values_of((2, 1, 520, 1096), dtype, device="cuda")
    few, dout = q[:, :2].detach(), normal(*q.shape, seed=9, device="cuda")
    first: list[torch.Tensor] = []
    for _ in range(20):
        out = flash_attn_func(q, k, v, attn_bias=bias)
        results = [out, *torch.autograd.grad(out, (q, k, v), dout)]
        with torch.no_grad():
            results.append(flash_attn_func(few, k, v, attn_bias=bias[:, :, :2], num_splits=4))
        first = first or results
        assert all(torch.equal(one, other) for one, other in zip(results, first))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_graph_serves_every_content_of_a_mask(dtype):
    q, k, v = (t.requires_grad_() for t in normal_qkv(2, 300, 520, 4, 2, 64, device="cuda"))
    dout, mask = normal(*q.shape, seed=9, device="cuda"), values_of((2, 1, 300, 520), dtype, device="cuda")
    token, column = q[:, :1].detach(), values_of((2, 1, 1, 520), dtype, device="cuda")

    def step():
        out = flash_attn_func(q, k, v, attn_bias=mask)
        gradients = torch.autograd.grad(out, (q, k, v), dout)
        with torch.no_grad():
            decoded = flash_attn_with_kvcache(token, k, v, attn_bias=column)
        return out, *gradients, decoded

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in range(3):
        mask.copy_(values_of((2, 1, 300, 520), dtype, 10 + seed, "cuda"))
        column.copy_(values_of((2, 1, 1, 520), dtype, 20 + seed, "cuda"))
        graph.replay()
        replayed = [tensor.clone() for tensor in captured]
        assert all(torch.equal(one, other) for one, other in zip(replayed, step()))
        check_attention(replayed[0].detach(), None, q.detach(), k.detach(), v.detach(), attn_bias=mask)


FLOATS = [torch.float16, torch.float32]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("number", "ones"), list(enumerate(BROADCASTS)), ids=str)
def test_its_gradient(number, ones, dtype):
    seqlen_q, seqlen_k = SEQLENS[number % 3]
    layout = LAYOUTS[number % len(LAYOUTS)]
    head_dim = (*HEAD_DIMS, 256)[number // 3 % 4]
    q, k, v = normal_qkv(2, seqlen_q, seqlen_k - (layout == "odd width"), 4, 2, head_dim, device="cuda")
    bias = bias_of(whole_of(q, k), dtype, layout, ones, device="cuda")
    check_with_its_gradient(q, k, v, bias, with_lse=bool(number % 2), with_others=True, causal=number % 3 == 1)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("ones", [(True, True, False, False), (True, False, False, False), (False, True, True, False)])
def test_its_gradient_has_the_same_bits_every_time(ones, dtype):
    q, k, v = normal_qkv(4, 520, 1096, 4, 2, 64, device="cuda")
    bias = bias_of(whole_of(q, k), dtype, ones=ones, device="cuda").requires_grad_()
    dout = normal(*q.shape, seed=9, device="cuda")
    first = torch.autograd.grad(flash_attn_func(q, k, v, attn_bias=bias), bias, dout)[0]
    for _ in range(20):
        assert torch.equal(torch.autograd.grad(flash_attn_func(q, k, v, attn_bias=bias), bias, dout)[0], first)


def peak(function: Any) -> int:
    """Bytes above what is allocated before."""
    function()
    gc.collect()  # what a graph still holds of the call
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("shape", [(1, 1, 1, 4096), (2, 1, 1, 4096), (1, 1, 4096, 4096), (1, 4, 4096, 1)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_is_copied(dtype, shape):
    q, k, v = (t.requires_grad_() for t in normal_qkv(2, 4096, 4096, 4, 4, 64, device="cuda"))
    bias = values_of(shape, dtype, device="cuda").expand(2, 4, 4096, 4096)

    def step(**options):
        torch.autograd.grad(flash_attn_func(q, k, v, **options).sum(), (q, k, v))

    plain = peak(step)
    assert peak(lambda: step(attn_bias=bias)) <= plain + 2**20 < plain + 4096 * 4096


@pytest.mark.parametrize("shape", [(2, 1, 1, 4096), (1, 4, 4096, 4096), (1, 1, 4096, 4096), (4, 4096, 1)], ids=str)
def test_what_its_gradient_takes(shape):
    q, k, v = (t.requires_grad_() for t in normal_qkv(2, 4096, 4096, 4, 4, 64, device="cuda"))
    bias = values_of(shape, torch.float16, device="cuda").requires_grad_()

    def step(*wanted):
        torch.autograd.grad(flash_attn_func(q, k, v, attn_bias=bias).sum(), (q, k, v, *wanted))

    assert peak(lambda: step(bias)) <= peak(step) + bias.numel() * 2 + 2**20


def test_sdpa_and_the_router():
    q, k, v = (normal(2, 4, 520, 64, seed=seed, device="cuda") for seed in (1, 2, 3))
    for dtype, shape in itertools.product(DTYPES, [(520, 520), (2, 1, 1, 520), (2, 4, 520, 520)]):
        mask = values_of(shape, dtype, device="cuda")
        with route_sdpa() as router:
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        assert router.counts == {"flash_attn_jit": 1, "torch": 0}
        assert torch.equal(out, sdpa(q, k, v, attn_mask=mask))
        check_attention(out.transpose(1, 2), None, *(t.transpose(1, 2) for t in (q, k, v)), attn_bias=mask)
