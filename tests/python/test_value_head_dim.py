"""v with another head dim than q and k, in the interpreter, against float64."""

import pytest
import torch
import torch.nn.functional as F
from attention_reference import (
    check_attention,
    check_gradients,
    check_varlen_attention,
    exact_gradients,
    exact_varlen_gradients,
    leaves,
    normal,
    normal_qkv,
)
from conftest import needs_enable_gqa
from torch.utils.flop_counter import FlopCounterMode

import flash_attn_jit
from flash_attn_jit import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache, sdpa

# DeepSeek's; fewer and more, halves of gradients with and without a rest, and rows that are read element by element.
HEAD_DIMS = [(192, 128), (64, 24), (40, 72), (24, 256), (256, 8), (33, 64), (64, 33)]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim, head_dim_v", HEAD_DIMS)
def test_both_passes(head_dim, head_dim_v, causal):
    q, k, v = leaves(*normal_qkv(1, 70, 150, 4, 2, head_dim, head_dim_v=head_dim_v))
    out, softmax_lse, _ = flash_attn_func(q, k, v, causal=causal, return_attn_probs=True)
    assert out.is_contiguous()
    check_attention(out.detach(), softmax_lse.detach(), q.detach(), k.detach(), v.detach(), causal)
    dout = normal(*out.shape, seed=9)
    out.backward(dout)
    check_gradients((q.grad, k.grad, v.grad), exact_gradients(q, k, v, dout, causal=causal))


@pytest.mark.parametrize("head_dim, head_dim_v", [(64, 40), (40, 128)])
def test_one_kernel_makes_all_gradients(head_dim, head_dim_v):
    """A block has all of few keys."""
    q, k, v = leaves(*normal_qkv(2, 90, 60, 2, 1, head_dim, head_dim_v=head_dim_v))
    out = flash_attn_func(q, k, v, causal=True)
    dout = normal(*out.shape, seed=9)
    out.backward(dout)
    check_gradients((q.grad, k.grad, v.grad), exact_gradients(q, k, v, dout, causal=True))
    kernels = flash_attn_jit.interpreter_report().kernel
    assert f"hdim{head_dim}v{head_dim_v}" in kernels


def test_sequences_of_different_lengths():
    q, k, v = leaves(normal(90, 4, 48, seed=1), normal(110, 2, 48, seed=2), normal(110, 2, 32, seed=3))
    starts = torch.tensor([0, 30, 30, 90]).int(), torch.tensor([0, 50, 60, 110]).int()
    out, softmax_lse, _ = flash_attn_varlen_func(q, k, v, *starts, 60, 50, causal=True, return_attn_probs=True)
    check_varlen_attention(out.detach(), softmax_lse.detach(), q.detach(), k.detach(), v.detach(), *starts, causal=True)
    dout = normal(*out.shape, seed=9)
    out.backward(dout)
    check_gradients((q.grad, k.grad, v.grad), exact_varlen_gradients(q, k, v, dout, *starts, causal=True))


def test_a_bias_with_a_gradient():
    q, k, v = leaves(*normal_qkv(1, 40, 50, 2, 2, 32, head_dim_v=48))
    bias = normal(1, 2, 40, 50, seed=4).requires_grad_()
    out = flash_attn_func(q, k, v, attn_bias=bias)
    dout = normal(*out.shape, seed=9)
    got = torch.autograd.grad(out, (q, k, v, bias), dout)
    inputs = [x.detach().double().requires_grad_() for x in (q, k, v, bias)]
    scores = torch.einsum("bqhd,bkhd->bhqk", *inputs[:2]) / 32**0.5 + inputs[3]
    exact = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), inputs[2])
    check_gradients(got, torch.autograd.grad(exact, inputs, dout.double()))


@pytest.mark.parametrize("head_dim, head_dim_v", [(64, 32), (40, 136)])
@pytest.mark.parametrize("pages", [False, True])
def test_a_cache_with_new_rows(head_dim, head_dim_v, pages):
    """Few queries: the decode kernel, whose splits are put together."""
    q, k_new, v_new = normal_qkv(2, 3, 3, 4, 2, head_dim, head_dim_v=head_dim_v)
    _, k, v = normal_qkv(2, 1, 96, 4, 2, head_dim, head_dim_v=head_dim_v)
    used = torch.tensor([50, 93]).int()
    k_cache, v_cache, table = k.clone(), v.clone(), None
    if pages:
        table = torch.arange(12).int().view(2, 6)
        k_cache, v_cache = (x.reshape(12, 16, 2, x.shape[-1]) for x in (k_cache, v_cache))
    out = flash_attn_with_kvcache(
        q, k_cache, v_cache, k_new, v_new, cache_seqlens=used, block_table=table, causal=True, num_splits=2
    )
    for b, rows in enumerate(used.tolist()):
        whole_k, whole_v = (torch.cat([x[b, :rows], new[b]])[None] for x, new in ((k, k_new), (v, v_new)))
        check_attention(out[b : b + 1], None, q[b : b + 1], whole_k, whole_v, True)
        assert torch.equal(v_cache.reshape(v.shape)[b, rows : rows + 3], v_new[b])


def test_into_a_tensor_of_the_callers():
    q, k, v = normal_qkv(1, 20, 30, 2, 2, 64, head_dim_v=32)
    out = torch.empty(1, 20, 2, 32, dtype=torch.float16)
    assert flash_attn_func(q, k, v, out=out) is out
    check_attention(out, None, q, k, v)
    with pytest.raises(ValueError, match=r"^out has shape .*; accepted: .* like q with v's head dim, of shape .*32\)"):
        flash_attn_func(q, k, v, out=torch.empty_like(q))


@pytest.mark.parametrize("routed", [False, True])
def test_sdpa(routed):
    needs_enable_gqa()
    q, k, v = leaves(*(x.transpose(1, 2) for x in normal_qkv(2, 40, 50, 4, 2, 64, head_dim_v=48)))
    if routed:
        with flash_attn_jit.route_sdpa() as router:
            out = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        assert router.counts == {"flash_attn_jit": 1, "torch": 0}
    else:
        out = sdpa(q, k, v, enable_gqa=True)
    assert out.shape == (2, 4, 40, 48)
    dout = normal(*out.shape, seed=9)
    out.backward(dout)
    exact = exact_gradients(*(x.transpose(1, 2) for x in (q, k, v, dout)))
    check_gradients((q.grad, k.grad, v.grad), [x.transpose(1, 2) for x in exact])


def test_compiled():
    q, k, v = leaves(*normal_qkv(1, 30, 30, 2, 2, 64, head_dim_v=24))

    def call(q, k, v):
        return flash_attn_func(q, k, v, causal=True) * 2

    eager = call(q, k, v)
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)(q, k, v)
    assert torch.equal(eager, compiled)
    dout = normal(*eager.shape, seed=9)
    for got, expected in zip(
        torch.autograd.grad(compiled, (q, k, v), dout), torch.autograd.grad(eager, (q, k, v), dout)
    ):
        assert torch.equal(got, expected)


def test_flops_are_those_of_both_head_dims():
    q, k, v = leaves(*normal_qkv(1, 30, 20, 2, 2, 64, head_dim_v=24))
    with FlopCounterMode(display=False) as counter:
        out = flash_attn_func(q, k, v)
        forward = counter.get_total_flops()
        out.sum().backward()
    pairs = 2 * 30 * 20
    assert forward == 2 * pairs * (64 + 24)
    assert counter.get_total_flops() - forward == 2 * pairs * (3 * 64 + 2 * 24)


@pytest.mark.parametrize(
    "v_shape, error, message",
    [
        ((1, 9, 2, 24), ValueError, r"v has shape \(1, 9, 2, 24\); accepted: \(1, 8, 2, 24\), k's"),
        ((1, 8, 1, 24), ValueError, r"v has shape \(1, 8, 1, 24\); accepted: \(1, 8, 2, 24\), k's"),
        ((1, 8, 2, 257), flash_attn_jit.UnsupportedError, "v's head_dim is 257, q's 16; accepted: q's, or both"),
        ((1, 8, 2, 0), flash_attn_jit.UnsupportedError, "v's head_dim is 0; accepted: 1 to 512"),
    ],
)
def test_bad_values(v_shape, error, message):
    q = normal(1, 8, 2, 16)
    with pytest.raises(error, match=message):
        flash_attn_func(q, q, torch.zeros(v_shape, dtype=torch.float16))
