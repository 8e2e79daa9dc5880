"""bfloat16 tensors: accuracy, values that a float16 cannot hold, gradients of any size, and who takes them."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attention_reference import (
    attention,
    check_attention,
    check_gradients,
    delta_errors,
    exact_gradients,
    exact_varlen_gradients,
    leaves,
    normal,
    normal_qkv,
    varlen_attention,
)
from conftest import run_python

import flash_attn_jit
from flash_attn_jit import _sdpa, flash_attn_func, flash_attn_qkvpacked_func, flash_attn_varlen_func, route_sdpa, sdpa

BFLOAT16 = torch.bfloat16
FLOAT16_MOST = 65504.0


def qkv(*sizes: Any) -> Any:
    return [t.to(BFLOAT16) for t in normal_qkv(*sizes)]


def gradients_of(q: Any, k: Any, v: Any, dout: torch.Tensor, **options: Any) -> tuple[torch.Tensor, ...]:
    inputs: Any = leaves(q, k, v)
    return torch.autograd.grad(flash_attn_func(*inputs, **options), inputs, dout)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [1, 8, 33, 64, 96, 128, 256])
def test_forward(head_dim, causal):
    q, k, v = qkv(2, 70, 90, 4, 2, head_dim)
    out, lse, _ = flash_attn_func(q, k, v, causal=causal, return_attn_probs=True)
    check_attention(out, lse, q, k, v, causal=causal)


# One kernel that has all keys, three where there are more of them than it takes, and with odd head dims.
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("sizes", [(2, 70, 90, 4, 2, 64), (1, 140, 230, 2, 2, 64), (1, 40, 150, 2, 1, 33)], ids=str)
def test_gradients(sizes, causal):
    q, k, v = qkv(*sizes)
    dout = normal(*q.shape, seed=4).to(BFLOAT16)
    expected = exact_gradients(q, k, v, dout, causal=causal)
    of_delta = delta_errors(q, k, v, dout, causal=causal)
    check_gradients(gradients_of(q, k, v, dout, causal=causal), expected, BFLOAT16, of_delta)


def test_packed_sequences():
    q, k, v = (t[0] for t in qkv(1, 130, 130, 2, 2, 64))
    cu_seqlens = torch.tensor([0, 60, 60, 130], dtype=torch.int32)
    inputs = leaves(q, k, v)
    out = flash_attn_varlen_func(*inputs, cu_seqlens, cu_seqlens, 70, 70, causal=True)
    dout = normal(*q.shape, seed=4).to(BFLOAT16)
    expected, _ = varlen_attention(q, k, v, cu_seqlens, cu_seqlens, causal=True)
    torch.testing.assert_close(out.double(), expected, atol=2e-2, rtol=2**-8)
    exact = exact_varlen_gradients(q, k, v, dout, cu_seqlens, cu_seqlens, causal=True)
    check_gradients(torch.autograd.grad(out, inputs, dout), exact, BFLOAT16)
    packed = torch.stack([q, k, v], 1)[None]
    assert flash_attn_qkvpacked_func(packed).dtype is BFLOAT16


def _eager(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """As a model's own attention does it, every step in bfloat16 but for the softmax."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    scores = (q @ k.mT) * q.shape[-1] ** -0.5
    return (scores.float().softmax(-1).to(q.dtype) @ v).transpose(1, 2)


def _error(x: torch.Tensor, exact: torch.Tensor) -> float:
    return (x.double() - exact).pow(2).mean().sqrt().item()


def test_it_is_nearer_to_float64_than_eager_attention():
    q, k, v = qkv(1, 150, 150, 2, 2, 64)
    dout = normal(*q.shape, seed=4).to(BFLOAT16)
    expected, _ = attention(q, k, v)
    exact = (expected, *exact_gradients(q, k, v, dout))
    inputs = leaves(q, k, v)
    eager = _eager(*inputs)
    theirs = (eager, *torch.autograd.grad(eager, inputs, dout))
    ours = (flash_attn_func(q, k, v), *gradients_of(q, k, v, dout))
    for name, x, y, z in zip(("out", "dq", "dk", "dv"), ours, theirs, exact):
        assert _error(x, z) < 0.9 * _error(y, z), name


@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("rows", [5, 100])  # of q: the decode kernel, and the forward kernel
def test_values_beyond_float16s_count_as_its_greatest(name, rows):
    inputs = dict(zip("qkv", qkv(1, rows, 90, 2, 1, 64)))
    inputs[name][:, ::7, :, 3] = 3e38
    inputs[name][:, 2::7, :, 5] = -66000.0
    # Of scores only their order matters that far out, of v sums are exact.
    scale = 1.0 if name == "v" else 2.0**-20
    out = flash_attn_func(**inputs, softmax_scale=scale)
    assert out.isfinite().all()
    inputs[name] = inputs[name].clamp(-FLOAT16_MOST, FLOAT16_MOST).float()
    # 65504 is no number of bfloat16, and is rounded to 65536.
    inputs[name] = inputs[name].where(inputs[name].abs() < FLOAT16_MOST, inputs[name].sign() * FLOAT16_MOST)
    expected, _ = attention(**inputs, softmax_scale=scale)
    torch.testing.assert_close(out.double(), expected, atol=2e-2, rtol=2**-7)


def test_out_is_rounded_to_nearest_even():
    q = torch.zeros(1, 200, 1, 64, dtype=BFLOAT16)
    v = normal(1, 2, 1, 64, seed=3).to(BFLOAT16)
    v[0, :, 0, 0] = torch.tensor([1.0, 1.0 + 2**-7])  # the mean lies in the middle of two numbers, twice
    v[0, :, 0, 1] = torch.tensor([1.0 + 2**-7, 1.0 + 2**-6])
    expected = v.float().mean(1, keepdim=True).to(BFLOAT16)
    assert torch.equal(flash_attn_func(q, q[:, :2], v), expected.expand(q.shape))


def test_what_is_no_number_stays_none():
    q, k, v = qkv(1, 40, 90, 1, 1, 64)
    v[0, 3, 0, 7] = math.inf
    v[0, 4, 0, 8] = math.nan
    out = flash_attn_func(q, k, v)
    assert out[..., 7].isinf().all() and out[..., 8].isnan().all()
    assert out[..., :7].isfinite().all() and out[..., 9:].isfinite().all()


@pytest.mark.parametrize("sizes", [(1, 60, 90, 4, 2, 64), (1, 70, 230, 2, 1, 64)], ids=str)
def test_gradients_of_any_size_are_the_same(sizes):
    """A power of two changes no bit of them: nothing is lost that is not lost at 1."""
    q, k, v = qkv(*sizes)
    bias = normal(1, 1, sizes[1], sizes[2], seed=5).to(BFLOAT16)
    dout = normal(*q.shape, seed=4).to(BFLOAT16)
    inputs: Any = leaves(q, k, v, bias)

    def gradients(exponent: int) -> tuple[torch.Tensor, ...]:
        q, k, v, bias = inputs
        out = flash_attn_func(q, k, v, causal=True, attn_bias=bias)
        return torch.autograd.grad(out, inputs, dout * 2.0**exponent)

    at_1 = gradients(0)
    for exponent in (-100, -40, -24, -10, 5, 20):
        for name, got, before in zip(("dq", "dk", "dv", "dbias"), gradients(exponent), at_1):
            assert torch.equal(got, before * 2.0**exponent), (name, exponent)


@pytest.mark.parametrize("exponent", [-16, 18])
@pytest.mark.parametrize("keys", [90, 230])  # one kernel, and three
def test_gradients_whatever_the_scale(exponent, keys):
    """What softmax_scale has too much or too little, q and k have too little or too much."""
    q, k, v = qkv(1, 70, keys, 2, 1, 64)
    dout = normal(*q.shape, seed=4).to(BFLOAT16)
    of_q = 2.0 ** ((-3 - exponent) // 2)
    of_k = 2.0 ** (-3 - exponent) / of_q
    inputs = leaves(q * of_q, k * of_k, v)
    dq, dk, dv = torch.autograd.grad(flash_attn_func(*inputs, softmax_scale=2.0**exponent), inputs, dout)
    check_gradients((dq * of_q, dk * of_k, dv), exact_gradients(q, k, v, dout), BFLOAT16, delta_errors(q, k, v, dout))


def test_a_dout_of_zeros():
    q, k, v = qkv(1, 60, 90, 2, 1, 64)
    assert not any(x.any() for x in gradients_of(q, k, v, torch.zeros_like(q)))


def test_sequences_have_scales_of_their_own():
    """The greatest dout of a batch is no measure of the others."""
    q, k, v = qkv(2, 40, 50, 2, 2, 64)
    dout = normal(*q.shape, seed=4).to(BFLOAT16)
    dout[0] *= 2.0**-60
    expected = exact_gradients(q, k, v, dout)
    for b in (0, 1):
        of_one = zip(gradients_of(q, k, v, dout), expected)
        check_gradients(*zip(*((got[b] * 2.0**60, exact[b] * 2.0**60) for got, exact in of_one)), BFLOAT16)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_dout_that_is_no_number(value):
    q, k, v = qkv(1, 40, 50, 2, 2, 64)
    dout = normal(*q.shape, seed=4).to(BFLOAT16)
    dout[0, 3, 1, 5] = value
    dq, dk, dv = gradients_of(q, k, v, dout)
    assert not dq[0, 3, 1].isfinite().any() and dq[:, :, 0].isfinite().all()
    assert not dk[0, :, 1].isfinite().any() and dk[:, :, 0].isfinite().all()
    assert not dv[0, :, 1, 5].isfinite().any() and dv[:, :, 0].isfinite().all()


def test_large_values_leave_gradients_finite():
    """dS grows with v."""
    q, k, v = qkv(1, 60, 90, 2, 1, 64)
    v = v * 1000
    dout = normal(*q.shape, seed=4).to(BFLOAT16)
    check_gradients(gradients_of(q, k, v, dout), exact_gradients(q, k, v, dout), BFLOAT16)


def test_a_mask_of_bfloat16():
    q, k, v = qkv(1, 60, 96, 2, 1, 64)
    hidden = torch.rand(1, 1, 60, 96, generator=torch.Generator().manual_seed(1)) < 0.3
    hidden[..., 7, :] = True
    hidden[..., 7, 1] = False
    mask = torch.zeros(hidden.shape, dtype=BFLOAT16).masked_fill(hidden, torch.finfo(BFLOAT16).min)
    out = flash_attn_func(q, k, v, attn_bias=mask)
    check_attention(out, None, q, k, v, attn_bias=~hidden)
    with pytest.raises(ValueError, match=r"^attn_bias has shape .* and dtype torch.float16; .*q's dtype"):
        flash_attn_func(q, k, v, attn_bias=mask.half())
    sinks = torch.tensor([0.5, -1.0], dtype=BFLOAT16)
    out = flash_attn_func(q, k, v, s_aux=sinks)
    check_attention(out, None, q, k, v, s_aux=sinks)


def test_a_cache_with_rotary_embedding():
    q, k, v = qkv(2, 1, 1, 4, 2, 64)
    k_cache, v_cache = (torch.zeros(2, 20, 2, 64, dtype=BFLOAT16) for _ in range(2))
    angles = torch.arange(20)[:, None] * 10000.0 ** -(torch.arange(32) / 32)
    rotary = {"rotary_cos": angles.cos().to(BFLOAT16), "rotary_sin": angles.sin().to(BFLOAT16)}
    used = torch.tensor([0, 0], dtype=torch.int32)
    out = flash_attn_jit.flash_attn_with_kvcache(q, k_cache, v_cache, k, v, **rotary, cache_seqlens=used)
    # Place 0 turns nothing, and of one key out is its value.
    assert torch.equal(k_cache[:, :1], k) and torch.equal(v_cache[:, :1], v)
    assert torch.equal(out, v.repeat_interleave(2, 2))
    with pytest.raises(ValueError, match=r"^rotary_cos has .*dtype torch.float16; accepted: .*k's dtype"):
        half = {name: x.half() for name, x in rotary.items()}
        flash_attn_jit.flash_attn_with_kvcache(q, k_cache, v_cache, k, v, **half, cache_seqlens=used)


def test_a_compiled_function():
    q, k, v = qkv(1, 30, 30, 2, 2, 64)
    inputs = leaves(q, k, v)
    compiled = torch.compile(flash_attn_func, backend="aot_eager", fullgraph=True)
    out = compiled(*inputs, causal=True)
    assert torch.equal(out, flash_attn_func(*inputs, causal=True))
    dout = normal(*q.shape, seed=4).to(BFLOAT16)
    for got, plain in zip(torch.autograd.grad(out, inputs, dout), gradients_of(q, k, v, dout, causal=True)):
        assert torch.equal(got, plain)


# ---- Who takes them


def test_routed():
    q, k, v = (t.transpose(1, 2) for t in qkv(1, 30, 30, 2, 2, 64))
    with route_sdpa() as router:
        out = F.scaled_dot_product_attention(q, k, v)
    assert router.counts == {"flash_attn_jit": 1, "torch": 0}
    assert torch.equal(out, sdpa(q, k, v)) and out.dtype is BFLOAT16


@pytest.mark.parametrize("capability, taken", [((7, 5), True), ((8, 0), False), ((9, 0), False), (None, True)])
def test_gpus_that_multiply_it_keep_it(monkeypatch, capability, taken):
    monkeypatch.setattr(_sdpa, "_capability", lambda ordinal: capability)
    query: Any = SimpleNamespace(device=torch.device("cuda", 0), dtype=BFLOAT16, is_floating_point=lambda: True)
    refusal = _sdpa.refusal_where_others_are_better(query)
    assert (refusal is None) == taken
    if refusal:
        assert refusal.reason().startswith("query has dtype torch.bfloat16 on cuda:0, an sm_")
    query.dtype = torch.float16
    assert _sdpa.refusal_where_others_are_better(query) is None


REFUSED = """
import torch, flash_attn_jit
from torch.nn.functional import scaled_dot_product_attention
q = torch.zeros(1, 8, 1, 64, dtype=torch.bfloat16)
for function in (flash_attn_jit.flash_attn_func, flash_attn_jit.sdpa):
    try:
        function(q, q, q)
    except flash_attn_jit.UnsupportedError as error:
        assert "FLASH_ATTN_JIT_BFLOAT16 is refuse; accepted: torch.float16. Cast it: q" in str(error), error
    else:
        raise AssertionError(function)
with flash_attn_jit.route_sdpa() as router:
    scaled_dot_product_attention(q, q, q)
assert router.counts == {"flash_attn_jit": 0, "torch": 1}
flash_attn_jit.flash_attn_func(q.half(), q.half(), q.half())
"""


def test_the_option_that_refuses_it():
    done = run_python(REFUSED, FLASH_ATTN_JIT_BFLOAT16="refuse")
    assert done.returncode == 0, done.stderr
    done = run_python(REFUSED, FLASH_ATTN_JIT_BFLOAT16="no")
    assert "FLASH_ATTN_JIT_BFLOAT16 is 'no'; accepted: convert, refuse" in done.stderr
