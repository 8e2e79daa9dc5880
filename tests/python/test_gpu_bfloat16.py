"""bfloat16 on a GPU: the same kernels as on a T4, and who takes the calls. More in the interpreter:
test_bfloat16.py."""

import pytest
import torch
import torch.nn.functional as F
from attention_reference import (
    attention,
    check_attention,
    check_gradients,
    check_varlen_attention,
    delta_errors,
    exact_gradients,
    exact_varlen_gradients,
    head_dims,
    leaves,
    normal,
    normal_qkv,
)

from flash_attn_jit import (
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    route_sdpa,
    sdpa,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no NVIDIA GPU"),
]
BFLOAT16 = torch.bfloat16


def qkv(*sizes):
    return [t.to(BFLOAT16) for t in normal_qkv(*sizes, device="cuda")]


def dout_of(q):
    return normal(*q.shape, seed=4, device="cuda").to(BFLOAT16)


def gradients_of(q, k, v, dout, **options):
    inputs = leaves(q, k, v)
    return torch.autograd.grad(flash_attn_func(*inputs, **options), inputs, dout)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", head_dims())
def test_head_dims(head_dim, causal):
    q, k, v = qkv(2, 257, 300, 4, 2, head_dim)
    out, lse, _ = flash_attn_func(q, k, v, causal=causal, return_attn_probs=True)
    check_attention(out, lse, q, k, v, causal=causal)
    dout = dout_of(q)
    expected = exact_gradients(q, k, v, dout, causal=causal)
    of_delta = delta_errors(q, k, v, dout, causal=causal)
    check_gradients(gradients_of(q, k, v, dout, causal=causal), expected, BFLOAT16, of_delta)


@pytest.mark.parametrize("seqlens", [(1, 1), (64, 64), (100, 90), (129, 257), (1000, 1000)], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_lengths(head_dim, seqlens):
    q, k, v = qkv(2, *seqlens, 4, 2, head_dim)
    check_attention(flash_attn_func(q, k, v), None, q, k, v)
    dout = dout_of(q)
    of_delta = delta_errors(q, k, v, dout)
    check_gradients(gradients_of(q, k, v, dout), exact_gradients(q, k, v, dout), BFLOAT16, of_delta)


def test_packed_sequences():
    q, k, v = (t[0] for t in qkv(1, 500, 500, 4, 2, 64))
    cu_seqlens = torch.tensor([0, 129, 129, 500], dtype=torch.int32, device="cuda")
    inputs = leaves(q, k, v)
    out, lse, _ = flash_attn_varlen_func(*inputs, cu_seqlens, cu_seqlens, 371, 371, causal=True, return_attn_probs=True)
    check_varlen_attention(out, lse, q, k, v, cu_seqlens, cu_seqlens, causal=True)
    dout = dout_of(q)
    exact = exact_varlen_gradients(q, k, v, dout, cu_seqlens, cu_seqlens, causal=True)
    check_gradients(torch.autograd.grad(out, inputs, dout), exact, BFLOAT16)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("seqlen", [100, 700])  # one kernel with all keys, and three
def test_gradients_of_any_size_are_the_same(seqlen, head_dim):
    q, k, v = qkv(2, seqlen, seqlen, 4, 2, head_dim)
    dout = dout_of(q)
    at_1 = gradients_of(q, k, v, dout, causal=True)
    for exponent in (-40, -24, -10, 5, 20):
        for got, before in zip(gradients_of(q, k, v, dout * 2.0**exponent, causal=True), at_1):
            assert torch.equal(got, before * 2.0**exponent), exponent


@pytest.mark.parametrize("rows", [5, 300])  # the decode kernel, and the forward kernel
def test_values_beyond_float16s_count_as_its_greatest(rows):
    q, k, v = qkv(1, rows, 300, 2, 1, 64)
    v[:, ::7, :, 3] = 3e38
    out = flash_attn_func(q, k, v)
    expected, _ = attention(q, k, v.float().clamp(max=65504.0))
    torch.testing.assert_close(out.double(), expected, atol=2e-2, rtol=2**-7)


@pytest.mark.parametrize("keys", [5, 96, 300])
def test_a_mask_with_the_least_number(keys):
    q, k, v = qkv(2, 70, keys, 2, 2, 64)
    hidden = torch.rand(1, 1, 70, keys, generator=torch.Generator().manual_seed(1)).cuda() < 0.3
    hidden[..., 1] = False
    mask = torch.zeros(hidden.shape, dtype=BFLOAT16, device="cuda").masked_fill(hidden, torch.finfo(BFLOAT16).min)
    check_attention(flash_attn_func(q, k, v, attn_bias=mask), None, q, k, v, attn_bias=~hidden)


def test_a_cache():
    q, k, v = qkv(2, 1, 1, 4, 2, 64)
    _, keys, values = qkv(2, 1, 200, 4, 2, 64)
    used = torch.tensor([150, 40], dtype=torch.int32, device="cuda")
    out = flash_attn_with_kvcache(q, keys, values, k, v, cache_seqlens=used, causal=True)
    for b, rows in enumerate((151, 41)):
        assert torch.equal(keys[b, rows - 1], k[b, 0]) and torch.equal(values[b, rows - 1], v[b, 0])
        check_attention(out[b : b + 1], None, q[b : b + 1], keys[b : b + 1, :rows], values[b : b + 1, :rows])


def test_routed_where_nobody_multiplies_it():
    q, k, v = (t.transpose(1, 2) for t in qkv(1, 300, 300, 2, 2, 64))
    with route_sdpa() as router:
        F.scaled_dot_product_attention(q, k, v)
    turing = torch.cuda.get_device_capability() < (8, 0)
    assert router.counts == {"flash_attn_jit": int(turing), "torch": int(not turing)}
    assert sdpa(q, k, v).dtype is BFLOAT16
