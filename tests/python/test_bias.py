"""Attention masks and biases, forward and backward, in the interpreter, against float64."""

import itertools
import random
from contextlib import suppress
from typing import Any

import pytest
import torch
from attention_reference import (
    attention,
    check_attention,
    check_gradients,
    check_varlen_attention,
    exact_gradients,
    exact_varlen_gradients,
    normal,
    normal_qkv,
)
from torch.utils.checkpoint import checkpoint

from flash_attn_jit import (
    _sdpa,
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
    route_sdpa,
    sdpa,
)

INF = float("inf")
DTYPES = [torch.bool, torch.float16, torch.float32]
# Rows and strides of multiples of 8 elements from an aligned base are read at once, all others one by one.
LAYOUTS = ["at once", "odd width", "last stride 2", "transposed", "offset storage"]
# Which of batch, heads, queries and keys are 1.
BROADCASTS = list(itertools.product([False, True], repeat=4))
SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])


def laid_out(values: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values, elsewhere in memory; what lies between them is nothing a kernel may use."""
    *outer, rows, width = values.shape
    if layout in ("at once", "odd width"):
        return values.clone()
    filler = True if values.dtype is torch.bool else float("nan")
    if layout == "last stride 2":
        memory = torch.full((*outer, rows, 2 * width), filler, dtype=values.dtype, device=values.device)
        view = memory[..., ::2]
    elif layout == "transposed":
        memory = torch.full((*outer, width, rows), filler, dtype=values.dtype, device=values.device)
        view = memory.mT
    else:
        memory = torch.full((values.numel() + 1,), filler, dtype=values.dtype, device=values.device)
        view = memory[1:].view(values.shape)
    view.copy_(values)
    return view


def values_of(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0, device: str = "cpu") -> torch.Tensor:
    """A bias some of whose pairs are hidden."""
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(100 + seed)).to(device)
    if dtype is torch.bool:
        return numbers > -0.8
    return numbers.masked_fill(numbers < -1.5, -INF).to(dtype)


def bias_of(
    whole: tuple[int, ...],
    dtype: torch.dtype,
    layout: str = "at once",
    ones: tuple[bool, ...] = (False,) * 4,
    seed: int = 0,
    device: str = "cpu",
) -> torch.Tensor:
    shape = tuple(1 if one else size for size, one in zip(whole, ones))
    return laid_out(values_of(shape, dtype, seed, device), layout)


def whole_of(q: torch.Tensor, k: torch.Tensor) -> tuple[int, int, int, int]:
    return q.shape[0], q.shape[2], q.shape[1], k.shape[1]


def check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> None:
    """out, softmax_lse and the gradients."""
    q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
    out, softmax_lse, _ = flash_attn_func(q, k, v, return_attn_probs=True, **options)
    check_attention(out.detach(), softmax_lse, q.detach(), k.detach(), v.detach(), **options)
    dout = normal(*out.shape, seed=9, device=str(q.device))
    check_gradients(torch.autograd.grad(out, (q, k, v), dout), exact_gradients(q, k, v, dout, **options))


# Every broadcast with every dtype, each with one layout or the other.
GRID = [
    (dtype, LAYOUTS[(number + 2 * DTYPES.index(dtype)) % len(LAYOUTS)], ones)
    for number, ones in enumerate(BROADCASTS)
    for dtype in DTYPES
]
# And every layout with every dtype where nothing is broadcast.
GRID += [
    case
    for dtype in DTYPES
    for layout in LAYOUTS
    for ones in ((False,) * 4,)
    if (case := (dtype, layout, ones)) not in GRID
]


def test_the_grid_has_every_value_of_every_factor():
    assert {ones for _, _, ones in GRID} == set(BROADCASTS)
    assert {(dtype, layout) for dtype, layout, _ in GRID} == set(itertools.product(DTYPES, LAYOUTS))


@pytest.mark.parametrize(("dtype", "layout", "ones"), GRID, ids=str)
def test_out_and_gradients(dtype, layout, ones):
    q, k, v = normal_qkv(2, 37, 55 if layout == "odd width" else 56, 4, 2, 32)
    check(q, k, v, attn_bias=bias_of(whole_of(q, k), dtype, layout, ones))


DECODED = [
    (queries, dtype, layout, (False, bool(number % 2), bool(number // 2 % 2), False))
    for number, (queries, dtype, layout) in enumerate(itertools.product([1, 3], DTYPES, LAYOUTS))
]


@pytest.mark.parametrize(("queries", "dtype", "layout", "ones"), DECODED, ids=str)
def test_few_queries(queries, dtype, layout, ones):
    q, k, v = normal_qkv(2, queries, 131 if layout == "odd width" else 136, 4, 2, 32)
    bias = bias_of(whole_of(q, k), dtype, layout, ones)
    for splits in (0, 3)[: 1 + (layout in LAYOUTS[:2])]:
        out, lse, _ = flash_attn_func(q, k, v, attn_bias=bias, num_splits=splits, return_attn_probs=True)
        check_attention(out, lse, q, k, v, attn_bias=bias)


OTHERS: list[dict[str, Any]] = [
    {"causal": True},
    {"window_size": (20, 9)},
    {"softcap": 3.0},
    {"alibi_slopes": SLOPES},
]
PAIRS = [{**one, **other} for one, other in itertools.combinations(OTHERS, 2)]


@pytest.mark.parametrize(("number", "options"), list(enumerate(OTHERS + PAIRS)), ids=str)
def test_with_other_options(number, options):
    q, k, v = normal_qkv(1, *((34, 56), (56, 32))[number % 2], 4, 2, 32)
    dtype, layout = DTYPES[number % 3], LAYOUTS[number % 2]
    if layout == "odd width":
        k, v = k[:, :-1], v[:, :-1]
    check(q, k, v, attn_bias=bias_of(whole_of(q, k), dtype, layout, seed=number), **options)


@pytest.mark.parametrize("options", OTHERS, ids=str)
def test_few_queries_with_other_options(options):
    q, k, v = normal_qkv(2, 3, 72, 4, 2, 32)
    bias = bias_of(whole_of(q, k), torch.float16)
    out, lse, _ = flash_attn_func(q, k, v, attn_bias=bias, return_attn_probs=True, **options)
    check_attention(out, lse, q, k, v, attn_bias=bias, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(72,), (1,), (45, 72), (45, 1), (4, 45, 72), (4, 1, 72), (1, 1, 1)], ids=str)
def test_fewer_dimensions(shape, dtype):
    q, k, v = normal_qkv(2, 45, 72, 4, 2, 32)
    bias = torch.ones(shape, dtype=dtype) if shape[-1] == 1 else values_of(shape, dtype)
    out = flash_attn_func(q, k, v, attn_bias=bias)
    assert torch.equal(out, flash_attn_func(q, k, v, attn_bias=bias[(None,) * (4 - bias.dim())]))
    check_attention(out, None, q, k, v, attn_bias=bias)


def test_a_bias_that_is_expanded():
    q, k, v = normal_qkv(2, 45, 72, 4, 2, 32)
    bias = values_of((2, 1, 1, 72), torch.float32)
    expanded = flash_attn_func(q, k, v, attn_bias=bias.expand(2, 4, 45, 72))
    assert torch.equal(expanded, flash_attn_func(q, k, v, attn_bias=bias))


# ---- sequences of different lengths, packed tensors, caches ----


def starts(*lengths: int) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


VARLEN = [
    (torch.bool, "at once", (False, True, False, False), {}),
    (torch.float16, "at once", (False, False, False, False), {"causal": True}),
    (torch.float32, "odd width", (True, False, False, False), {}),
    (torch.float32, "at once", (False, True, True, False), {"window_size": (12, 4)}),
    (torch.float16, "transposed", (True, True, False, False), {}),
    (torch.float16, "offset storage", (False, False, False, True), {}),
]


@pytest.mark.parametrize(("dtype", "layout", "ones", "options"), VARLEN, ids=str)
def test_varlen(dtype, layout, ones, options):
    lengths_q, lengths_k = [30, 0, 1, 45], [50, 10, 71 if layout == "odd width" else 72, 33]
    cu_q, cu_k, longest = starts(*lengths_q), starts(*lengths_k), (max(lengths_q), max(lengths_k))
    q = normal(sum(lengths_q), 4, 32, seed=1).requires_grad_()
    k, v = (normal(sum(lengths_k), 2, 32, seed=seed).requires_grad_() for seed in (2, 3))
    bias = bias_of((4, 4, *longest), dtype, layout, ones)
    out, lse, _ = flash_attn_varlen_func(
        q, k, v, cu_q, cu_k, *longest, attn_bias=bias, return_attn_probs=True, **options
    )
    options = {**options, "attn_bias": bias}
    check_varlen_attention(out.detach(), lse, q.detach(), k.detach(), v.detach(), cu_q, cu_k, **options)
    dout = normal(*out.shape, seed=9)
    gradients = torch.autograd.grad(out, (q, k, v), dout)
    check_gradients(gradients, exact_varlen_gradients(q, k, v, dout, cu_q, cu_k, **options))


def test_packed_tensors():
    """The bits of the separate ones."""
    q, k, v = normal_qkv(2, 45, 45, 4, 4, 32)
    bias = values_of((2, 4, 45, 45), torch.float16)
    dout = normal(2, 45, 4, 32, seed=9)

    def run(function, *inputs):
        inputs = [t.clone().requires_grad_() for t in inputs]
        out = function(*inputs)
        return out, torch.autograd.grad(out, inputs, dout.reshape(out.shape))

    expected, (dq, dk, dv) = run(lambda *t: flash_attn_func(*t, attn_bias=bias), q, k, v)
    out, (own_dq, dkv) = run(lambda q, kv: flash_attn_kvpacked_func(q, kv, attn_bias=bias), q, torch.stack([k, v], 2))
    assert torch.equal(out, expected) and torch.equal(own_dq, dq) and torch.equal(dkv, torch.stack([dk, dv], 2))
    out, (dqkv,) = run(lambda qkv: flash_attn_qkvpacked_func(qkv, attn_bias=bias), torch.stack([q, k, v], 2))
    assert torch.equal(out, expected) and torch.equal(dqkv, torch.stack([dq, dk, dv], 2))

    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    cu, longest = starts(45, 45), 45
    expected, (dq, dk, dv) = run(
        lambda *t: flash_attn_varlen_func(*t, cu, cu, longest, longest, attn_bias=bias), q, k, v
    )
    out, (own_dq, dkv) = run(
        lambda q, kv: flash_attn_varlen_kvpacked_func(q, kv, cu, cu, longest, longest, attn_bias=bias),
        q,
        torch.stack([k, v], 1),
    )
    assert torch.equal(out, expected) and torch.equal(own_dq, dq) and torch.equal(dkv, torch.stack([dk, dv], 1))
    out, (dqkv,) = run(
        lambda qkv: flash_attn_varlen_qkvpacked_func(qkv, cu, longest, attn_bias=bias), torch.stack([q, k, v], 1)
    )
    assert torch.equal(out, expected) and torch.equal(dqkv, torch.stack([dq, dk, dv], 1))


def check_cache(queries, dtype, layout, ones, rows, device="cpu", head_dim=32, paged=False, padded=False, **options):
    """Columns are the rows that the cache has room for, padding and what is not used yet among them."""
    dice = random.Random(str((queries, dtype, layout, ones, rows)))
    used = [rows, 0, dice.randint(1, rows), dice.randint(rows // 2, rows)]
    pads = [0, 0, dice.randint(0, used[2]), dice.randint(0, rows // 4)] if padded else [0] * 4
    q = normal(4, queries, 4, head_dim, device=device)
    cache = torch.full((2, 4, rows, 2, head_dim), float("nan"), dtype=torch.float16, device=device)
    for b in range(4):
        cache[:, b, pads[b] : used[b]] = normal(2, used[b] - pads[b], 2, head_dim, seed=b, device=device)
    bias = bias_of((4, 4, queries, rows), dtype, layout, ones, device=device)
    arguments = {"cache_seqlens": torch.tensor(used, dtype=torch.int32, device=device)}
    if padded:
        arguments["cache_leftpad"] = torch.tensor(pads, dtype=torch.int32, device=device)
    given = cache
    if paged:
        order = dice.sample(range(4 * rows // 8), 4 * rows // 8)
        given = torch.empty(2, len(order), 8, 2, head_dim, dtype=torch.float16, device=device)
        given[:, order] = cache.reshape(2, len(order), 8, 2, head_dim)
        arguments["block_table"] = torch.tensor(order, dtype=torch.int32, device=device).reshape(4, -1)
    out, lse = flash_attn_with_kvcache(q, *given, attn_bias=bias, return_softmax_lse=True, **arguments, **options)
    for b in range(4):
        own = bias.expand(4, 4, queries, rows)[b : b + 1, ..., pads[b] : used[b]]
        k, v = cache[:, b : b + 1, pads[b] : used[b]]
        check_attention(out[b : b + 1], lse[b : b + 1], q[b : b + 1], k, v, attn_bias=own, **options)


CACHES = [
    (queries, dtype, LAYOUTS[number % 5], ((False,) * 4, (False, True, True, False))[number % 2], paged, padded)
    for number, (queries, dtype, (paged, padded)) in enumerate(
        itertools.product([2, 150], DTYPES, [(False, False), (True, False), (False, True), (True, True)])
    )
]


@pytest.mark.parametrize(("queries", "dtype", "layout", "ones", "paged", "padded"), CACHES, ids=str)
def test_caches(queries, dtype, layout, ones, paged, padded):
    rows = 75 if layout == "odd width" and not paged else 72
    check_cache(queries, dtype, layout, ones, rows, paged=paged, padded=padded)


def test_a_cache_that_is_appended_to():
    k_cache, v_cache = normal(2, 40, 2, 32, seed=1), normal(2, 40, 2, 32, seed=2)
    q, k, v = normal_qkv(2, 2, 2, 4, 2, 32)
    bias = values_of((2, 1, 2, 40), torch.float16)
    used = torch.tensor([17, 38], dtype=torch.int32)
    out = flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=used, causal=True, attn_bias=bias)
    for b, end in enumerate((19, 40)):
        keys, values, own = k_cache[b : b + 1, :end], v_cache[b : b + 1, :end], bias[b : b + 1, ..., :end]
        assert torch.equal(keys[0, -2:], k[b])
        check_attention(out[b : b + 1], None, q[b : b + 1], keys, values, True, attn_bias=own)


# ---- rows that see nothing ----


def hide_rows(bias: torch.Tensor, number: float | bool) -> torch.Tensor:
    bias[:, :, 3] = bias[:, :, 17:20] = number
    return bias


HIDDEN = [3, 17, 18, 19]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_rows_that_see_no_key(dtype, layout):
    q, k, v = (t.requires_grad_() for t in normal_qkv(2, 45, 71 if layout == "odd width" else 72, 4, 2, 32))
    bias = hide_rows(bias_of(whole_of(q, k), dtype, layout), False if dtype is torch.bool else -INF)
    out, lse, _ = flash_attn_func(q, k, v, attn_bias=bias, return_attn_probs=True)
    assert not out[:, HIDDEN].any() and (lse[..., HIDDEN] == INF).all()
    check_attention(out.detach(), lse, q.detach(), k.detach(), v.detach(), attn_bias=bias)
    dout = normal(*out.shape, seed=9)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), dout)
    assert not dq[:, HIDDEN].any()
    check_gradients((dq, dk, dv), exact_gradients(q, k, v, dout, attn_bias=bias))
    # What reaches these rows alone reaches nothing.
    alone = torch.zeros_like(dout)
    alone[:, HIDDEN] = dout[:, HIDDEN]
    out = flash_attn_func(q, k, v, attn_bias=bias)
    assert not any(gradient.any() for gradient in torch.autograd.grad(out, (q, k, v), alone))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_sees_anything(dtype):
    q, k, v = (t.requires_grad_() for t in normal_qkv(2, 45, 72, 4, 2, 32))
    bias = torch.full((72,), False if dtype is torch.bool else -INF, dtype=dtype)
    out, lse, _ = flash_attn_func(q, k, v, attn_bias=bias, return_attn_probs=True)
    assert not out.any() and (lse == INF).all()
    assert not any(gradient.any() for gradient in torch.autograd.grad(out.sum(), (q, k, v)))
    with torch.no_grad():
        out, lse, _ = flash_attn_func(q[:, :2], k, v, attn_bias=bias, num_splits=2, return_attn_probs=True)
    assert not out.any() and (lse == INF).all()


@pytest.mark.parametrize("least", [torch.finfo(torch.float16).min, torch.finfo(torch.float32).min, -1e16, -1e9])
@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_the_least_number_instead_of_minus_infinity(least, layout):
    """Causal or padding masks as models write them, with rows all of which is masked."""
    dtype = torch.float16 if least > -1e5 else torch.float32
    q, k, v = (t.requires_grad_() for t in normal_qkv(2, 45, 71 if layout == "odd width" else 72, 4, 2, 32))
    bias = (torch.rand(whole_of(q, k), generator=torch.Generator().manual_seed(1)) < 0.3).to(dtype) * least
    bias = laid_out(hide_rows(bias, least), layout)
    out, lse, _ = flash_attn_func(q, k, v, attn_bias=bias, return_attn_probs=True)
    dout = normal(*out.shape, seed=9)
    gradients = torch.autograd.grad(out, (q, k, v), dout)
    assert all(tensor.isfinite().all() for tensor in (out, lse, *gradients))
    others = [i for i in range(45) if i not in HIDDEN]
    options = {"attn_bias": bias[:, :, others]}
    check_attention(out[:, others].detach(), None, q[:, others].detach(), k.detach(), v.detach(), **options)
    if least < -1e8:  # a score is nothing beside it, in float32
        mean = v.detach().float().mean(1).repeat_interleave(2, 1)
        torch.testing.assert_close(out[:, HIDDEN].float(), mean[:, None].expand(2, 4, 4, 32), atol=2e-3, rtol=0)
    else:
        # One unit of a float32 there is 2^-8: the weights are off by some of them.
        expected, expected_lse = attention(q.detach(), k.detach(), v.detach(), attn_bias=bias)
        torch.testing.assert_close(out.detach().double(), expected, atol=2e-2, rtol=0)
        torch.testing.assert_close(lse.double(), expected_lse, atol=2e-2, rtol=0)
    if least < -1e6:
        assert not gradients[0][:, HIDDEN].any()
        seen = dout.clone()
        seen[:, HIDDEN] = 0
        check_gradients(gradients, exact_gradients(q, k, v, seen, attn_bias=bias))
    else:
        for got, exact in zip(gradients, exact_gradients(q, k, v, dout, attn_bias=bias)):
            assert (got - exact).abs().max() <= 2e-2 * exact.abs().max()


@pytest.mark.parametrize("greatest", [1e6, 1e15, 1e16, torch.finfo(torch.float32).max])
@pytest.mark.parametrize("queries", [3, 45])
@pytest.mark.parametrize("softmax_scale", [None, 2.0**-20, 100.0], ids=str)
def test_a_key_of_each_query_with_a_great_number(greatest, queries, softmax_scale):
    """It has the row to itself, however many digits of float32 its number leaves."""
    q, k, v = (t.requires_grad_() for t in normal_qkv(2, queries, 72, 4, 2, 32))
    bias = values_of((2, 4, queries, 72), torch.float32)
    rows = torch.arange(queries)
    bias[:, :, rows, 7 * rows % 72] = greatest
    options = {"attn_bias": bias, "softmax_scale": softmax_scale}
    out, lse, _ = flash_attn_func(q, k, v, **options, return_attn_probs=True)
    dout = normal(*out.shape, seed=9)
    gradients = torch.autograd.grad(out, (q, k, v), dout)
    assert lse.isfinite().all()
    check_attention(out.detach(), None, q.detach(), k.detach(), v.detach(), **options)
    if softmax_scale == 100.0:  # which dS, all but 0 here, is multiplied by
        assert all(gradient.abs().max() < 2e-3 for gradient in gradients[:2])
        gradients = (torch.zeros_like(q), torch.zeros_like(k), gradients[2])
    check_gradients(gradients, exact_gradients(q, k, v, dout, **options))


def test_numbers_that_count_as_the_same():
    """Beyond 1e15 those of one sign do; 1e15 and what float32 tells from it do not."""
    q, k, v = normal_qkv(1, 45, 2, 2, 2, 32)
    for numbers, expected in (
        ([1e16, 2e16], v.float().mean(1)),
        ([-1e16, -2e16], v.float().mean(1)),
        ([-1e16, 2e16], v[:, 1].float()),
        ([9e14, 1e15], v[:, 1].float()),
    ):
        out = flash_attn_func(q, k, v, attn_bias=torch.tensor(numbers))
        torch.testing.assert_close(out.float(), expected[:, None].expand(out.shape), atol=2e-3, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_scores_that_are_low_themselves_have_gradients(dtype):
    """Below -1e6, where no number of a mask put them; of each query the mask leaves one key."""
    q, k = (torch.full((1, 20, 1, 32), value, dtype=torch.float16) for value in (60.0, -60.0))
    v = normal(1, 20, 1, 32).requires_grad_()
    visible = torch.eye(20, dtype=torch.bool)
    bias = visible if dtype is torch.bool else torch.zeros(20, 20, dtype=dtype).masked_fill(~visible, -INF)
    out, softmax_lse, _ = flash_attn_func(q, k, v, softmax_scale=20.0, attn_bias=bias, return_attn_probs=True)
    assert softmax_lse.max() < -1e6 and torch.equal(out, v)
    dout = normal(1, 20, 1, 32)
    (dv,) = torch.autograd.grad(out, v, dout)
    assert torch.equal(dv, dout)


def test_few_queries_all_of_whose_keys_have_the_least_number():
    q, k, v = normal_qkv(2, 2, 72, 4, 2, 32)
    for dtype in (torch.float16, torch.float32):
        bias = torch.full((2, 1, 2, 72), torch.finfo(dtype).min, dtype=dtype)
        for splits in (0, 2):
            out, lse, _ = flash_attn_func(q, k, v, attn_bias=bias, num_splits=splits, return_attn_probs=True)
            assert out.isfinite().all() and lse.isfinite().all()
            if dtype is torch.float32:
                mean = v.float().mean(1).repeat_interleave(2, 1)
                torch.testing.assert_close(out.float(), mean[:, None].expand(out.shape), atol=2e-3, rtol=0)


# ---- PyTorch's function ----


# What is hidden of 1100 keys: the runs are left out, those of padding before they are read.
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "hidden",
    [[(700, 1100)], [(0, 700)], [(0, 300), (800, 1100)], [(200, 900)], [(0, 1090)], [(1, 1100)], [(0, 1100)]],
    ids=str,
)
def test_keys_that_are_hidden_in_runs(hidden, causal):
    q, k, v = normal_qkv(2, 300, 1100, 2, 1, 16)
    mask = torch.ones(2, 1, 1, 1100, dtype=torch.bool)
    for first, end in hidden:
        mask[1, ..., first:end] = False
    check(q, k, v, attn_bias=mask, causal=causal)


@pytest.mark.parametrize("head_dim", [16, 128])
def test_tiles_that_are_hidden(head_dim):
    """Sequences one behind the other, each of which sees itself; and queries that see none of many keys in between."""
    q, k, v = normal_qkv(1, 320, 320, 2, 1, head_dim)
    of_row = torch.arange(320) // 70
    apart = of_row[:, None] == of_row
    check(q, k, v, attn_bias=apart)
    check(q, k, v, attn_bias=apart, causal=True)
    stripes = (torch.arange(320) // 40 % 2 == 0).expand(320, 320).clone()
    stripes[100:200] ^= True
    check(q, k, v, attn_bias=stripes)


def heads_first(*shape_q: int, seqlen_k: int, heads_k: int) -> list[torch.Tensor]:
    *batch, _, _, head_dim = shape_q
    shape_k = (*batch, heads_k, seqlen_k, head_dim)
    return [normal(*shape_q, seed=1), normal(*shape_k, seed=2), normal(*shape_k, seed=3)]


def check_sdpa(tensors: list[torch.Tensor], mask: torch.Tensor, function: Any = sdpa, **arguments: Any) -> None:
    """out and gradients against PyTorch's function in float64."""
    inputs = [t.detach().clone().requires_grad_() for t in tensors]
    out = function(*inputs, attn_mask=mask, **arguments)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    wide = (mask if mask.dtype is torch.bool else mask.double()).expand(*tensors[0].shape[:-1], tensors[1].shape[-2])
    group_size = tensors[0].shape[-3] // tensors[1].shape[-3]
    query, key, value = exact[0], *(t.repeat_interleave(group_size, -3) for t in exact[1:])
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=wide)
    assert out.shape == expected.shape and out.dtype == torch.float16
    torch.testing.assert_close(out.double(), expected, atol=2e-3, rtol=2e-3)
    dout = normal(*out.shape, seed=9)
    check_gradients(torch.autograd.grad(out, inputs, dout), torch.autograd.grad(expected, exact, dout.double()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 4, 45, 72), (2, 1, 1, 72), (45, 72), (4, 1, 72)], ids=str)
def test_sdpa(shape, dtype):
    check_sdpa(heads_first(2, 4, 45, 32, seqlen_k=72, heads_k=2), values_of(shape, dtype), enable_gqa=True)


@pytest.mark.parametrize("batch", [(), (2, 3), (1, 2, 2)], ids=str)
def test_sdpa_of_other_ranks(batch):
    tensors = heads_first(*batch, 2, 45, 32, seqlen_k=72, heads_k=1)
    for shape in ((*batch, 2, 45, 72), (*(1 for _ in batch), 2, 45, 72), (45, 72), (72,)):
        check_sdpa(tensors, values_of(shape, torch.float16), enable_gqa=True)


@pytest.mark.parametrize("shape", [(72,), ()], ids=str)
def test_less_than_two_dimensions_beside_a_query_of_four(shape):
    """Are an IndexError in PyTorch, but for its math backend, and so they are here; the router leaves both to it."""
    tensors, mask = heads_first(2, 4, 45, 32, seqlen_k=72, heads_k=4), torch.ones(shape, dtype=torch.bool)
    with pytest.raises(IndexError, match=r"^attn_mask has [01] dimensions and query 4; accepted: 2 to 4"):
        sdpa(*tensors, mask)
    with route_sdpa() as router:
        with pytest.raises(IndexError):
            torch.nn.functional.scaled_dot_product_attention(*tensors, mask)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            torch.nn.functional.scaled_dot_product_attention(*tensors, mask)
    assert router.counts == {"flash_attn_jit": 0, "torch": 2} and "attn_mask has" in str(router)


@pytest.mark.parametrize("shape", [(2, 1, 1, 45, 72), (1, 3, 4, 1, 72), (2, 3, 4, 45, 72), (2, 3, 1, 1, 72)], ids=str)
def test_a_mask_broadcast_over_some_of_the_batch(shape):
    tensors, mask = heads_first(2, 3, 4, 45, 32, seqlen_k=72, heads_k=2), values_of(shape, torch.float16)
    check_sdpa(tensors, mask, enable_gqa=True)
    batch_dims = _sdpa._batch_dims(tensors[0], mask)
    read = [_sdpa._of_rank_4(tensor, batch_dims) for tensor in tensors] + [_sdpa._bias_of(mask, 5, batch_dims)]
    assert [x.data_ptr() for x in read] == [x.data_ptr() for x in (*tensors, mask)]


@pytest.mark.parametrize("shape", [(2, 1, 4, 45, 72), (1, 3, 1, 45, 72)], ids=str)
def test_a_mask_that_no_stride_broadcasts_is_refused(shape):
    tensors, mask = heads_first(2, 3, 4, 45, 32, seqlen_k=72, heads_k=2), values_of(shape, torch.float16)
    with pytest.raises(ValueError, match=r"of which no one stride .* Use attn_mask.expand\(2, 3, -1, -1, -1\)"):
        sdpa(*tensors, mask, enable_gqa=True)
    check_sdpa(tensors, mask.expand((2, 3, -1, -1, -1)), enable_gqa=True)


def test_a_mask_broadcast_over_heads_that_lie_apart_is_refused():
    tensors = [
        t.transpose(-2, -3).contiguous().transpose(-2, -3) for t in heads_first(2, 3, 4, 45, 32, seqlen_k=72, heads_k=4)
    ]
    mask = values_of((2, 1, 1, 45, 72), torch.float16)
    with pytest.raises(ValueError, match=r"^attn_mask has shape \(2, 1, 1, 45, 72\), of which no one stride"):
        sdpa(*tensors, mask)
    check_sdpa(tensors, mask.expand(2, 3, -1, -1, -1))


def test_the_router_takes_masks():
    tensors = heads_first(2, 4, 45, 32, seqlen_k=72, heads_k=4)
    for number, dtype in enumerate(DTYPES):
        with route_sdpa() as router:
            for shape in ((45, 72), (2, 1, 1, 72)):
                routed = torch.nn.functional.scaled_dot_product_attention
                mask = values_of(shape, dtype, seed=number)
                out = routed(*tensors, attn_mask=mask)
                assert torch.equal(out, sdpa(*tensors, attn_mask=mask))
        assert router.counts == {"flash_attn_jit": 2, "torch": 0}, router


def test_is_causal_beside_a_mask():
    tensors, mask = heads_first(2, 4, 45, 32, seqlen_k=45, heads_k=4), torch.ones(45, 45, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"^is_causal is True and attn_mask is given"):
        sdpa(*tensors, mask, is_causal=True)
    with route_sdpa() as router, suppress(RuntimeError):  # which PyTorch raises on some devices
        torch.nn.functional.scaled_dot_product_attention(*tensors, mask, is_causal=True)
    assert router.counts == {"flash_attn_jit": 0, "torch": 1} and "is_causal is True" in str(router)


# ---- graphs, checkpoints ----


def test_compiled():
    torch.compiler.reset()
    compiled = torch.compile(
        lambda q, k, v, bias: flash_attn_func(q, k, v, attn_bias=bias), fullgraph=True, backend="aot_eager"
    )
    dout = normal(2, 45, 4, 32, seed=9)
    for bias in (values_of((2, 1, 45, 72), torch.float16), values_of((45, 72), torch.bool)):
        results = []
        for function in (compiled, lambda q, k, v, bias: flash_attn_func(q, k, v, attn_bias=bias)):
            inputs = [t.requires_grad_() for t in normal_qkv(2, 45, 72, 4, 2, 32)]
            out = function(*inputs, bias)
            results.append((out, *torch.autograd.grad(out, inputs, dout)))
        assert all(torch.equal(one, other) for one, other in zip(*results))


@pytest.mark.parametrize("function", ["flash_attn_func", "sdpa", "routed"])
def test_a_checkpoint(function):
    mask = values_of((2, 1, 45, 72), torch.float16)

    def attend(q, k, v, mask):
        if function == "flash_attn_func":
            return flash_attn_func(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_bias=mask)
        if function == "sdpa":
            return sdpa(q, k, v, attn_mask=mask)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    def gradients(run):
        inputs = [t.requires_grad_() for t in heads_first(2, 4, 45, 32, seqlen_k=72, heads_k=4)]
        with route_sdpa():
            out = run(*inputs, mask)
        return torch.autograd.grad(out.float().square().sum(), inputs)

    recomputed = gradients(lambda *inputs: checkpoint(attend, *inputs, use_reentrant=False))
    assert all(torch.equal(one, other) for one, other in zip(recomputed, gradients(attend)))


def test_a_mask_that_is_changed_before_the_backward_pass():
    q, k, v = (t.requires_grad_() for t in normal_qkv(2, 45, 72, 4, 2, 32))
    bias = values_of((45, 72), torch.float16)
    out = flash_attn_func(q, k, v, attn_bias=bias)
    bias.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


# ---- what is refused ----


@pytest.mark.parametrize(
    "error, words, bias",
    [
        (ValueError, "^attn_bias has shape .*broadcasts", torch.zeros(2, 4, 45, 71)),
        (ValueError, "^attn_bias has shape .*broadcasts", torch.zeros(2, 2, 45, 72)),
        (ValueError, "^attn_bias has shape .*broadcasts", torch.zeros(3, 1, 1, 1)),
        (ValueError, "^attn_bias has shape .*broadcasts", torch.zeros(44, 72)),
        (ValueError, "^attn_bias has shape .*broadcasts", torch.zeros(0)),
        (ValueError, "^attn_bias has shape .* and dtype torch.bfloat16", torch.zeros(45, 72, dtype=torch.bfloat16)),
        (ValueError, "^attn_bias has shape .* and dtype torch.float64", torch.zeros(45, 72, dtype=torch.float64)),
        (ValueError, "^attn_bias has shape .* and dtype torch.int64", torch.zeros(45, 72, dtype=torch.int64)),
        (ValueError, r"^attn_bias has shape \(\) .*1 to 4 dimensions", torch.zeros(())),
        (ValueError, r"^attn_bias has shape \(1, 1, 1, 45, 72\) .*1 to 4 dimensions", torch.zeros(1, 1, 1, 45, 72)),
        (ValueError, "^attn_bias is a list", [[0.0] * 72] * 45),
        (ValueError, "^attn_bias is a float", 0.0),
        (ValueError, "^attn_bias is on device meta", torch.zeros(45, 72, device="meta")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refusals(error, words, bias):
    q, k, v = normal_qkv(2, 45, 72, 4, 2, 32)
    with pytest.raises(error, match=words):
        flash_attn_func(q, k, v, attn_bias=bias)


def test_a_bias_need_not_require_a_gradient_where_grad_mode_is_off():
    q, k, v = normal_qkv(2, 45, 72, 4, 2, 32)
    bias = torch.nn.Parameter(values_of((45, 72), torch.float16))
    with torch.no_grad():
        out = flash_attn_func(q, k, v, attn_bias=bias)
    assert torch.equal(out, flash_attn_func(q, k, v, attn_bias=bias.detach()))


# ---- anything that is legal ----


def random_bias(dice: random.Random, whole: tuple[int, ...], device: str) -> torch.Tensor:
    """Of any rank, broadcast anywhere, with any order of its dimensions in memory, any steps and any offset."""
    ones = tuple(dice.random() < 0.3 for _ in whole)
    values = bias_of(whole, dice.choice(DTYPES), ones=ones, seed=dice.randint(0, 1000))
    order = dice.sample(range(4), 4) if dice.random() < 0.4 else list(range(4))
    steps = [dice.choice([1, 1, 1, 2, 3]) for _ in whole]
    sizes = [values.shape[d] * steps[d] + dice.choice([0, 0, 3, 8]) for d in order]
    memory = torch.zeros(*sizes, dtype=values.dtype, device=device).permute([order.index(d) for d in range(4)])
    begins = [dice.randint(0, size - n * step) for size, n, step in zip(memory.shape, values.shape, steps)]
    view = memory[tuple(slice(b, b + n * s, s) for b, n, s in zip(begins, values.shape, steps))]
    view.copy_(values)
    while view.dim() > 1 and view.shape[0] == 1 and dice.random() < 0.7:
        view = view[0]
    return view.expand(whole) if dice.random() < 0.15 else view


def random_call(
    dice: random.Random, most: int = 70, head_dims: tuple[int, ...] = (32, 32, 32, 32, 17), device: str = "cpu"
) -> None:
    heads_k, group_size = dice.choice([1, 2]), dice.choice([2, 2, 2, 2, 2, 1, 3])
    decode = dice.random() < 0.3
    head_dim = dice.choice(head_dims)
    seqlen_q, seqlen_k = dice.randint(1, 4) if decode else dice.randint(5, most), dice.randint(1, most)
    tensors = normal_qkv(dice.choice([1, 3]), seqlen_q, seqlen_k, heads_k * group_size, heads_k, head_dim, device)
    q, k, v = tensors
    options: dict[str, Any] = {"attn_bias": random_bias(dice, whole_of(q, k), device)}
    if dice.random() < 0.3:
        options["causal"] = True
    elif dice.random() < 0.3:
        options["window_size"] = (dice.randint(0, most), dice.randint(0, most))
    if dice.random() < 0.2:
        options["softcap"] = dice.uniform(1, 20)
    if dice.random() < 0.2:
        options["alibi_slopes"] = torch.tensor([dice.uniform(0, 0.25) for _ in range(q.shape[2])], device=device)
    if dice.random() < 0.3:
        options["softmax_scale"] = dice.uniform(0.05, 0.4)
    if not decode:
        check(q, k, v, **options)
        return
    with torch.no_grad():
        splits = dice.choice([0, 1, 2])
        out, lse, _ = flash_attn_func(q, k, v, num_splits=splits, return_attn_probs=True, **options)
    check_attention(out, lse, q, k, v, **options)


@pytest.mark.parametrize("number", range(25))
def test_random_calls(number):
    random_call(random.Random(7000 + number))
