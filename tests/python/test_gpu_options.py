"""Windows, softcap, ALiBi, varlen, packed forms and long sequences on a GPU: `pytest -m gpu`."""

import pytest
import torch
from attention_reference import (
    check_attention,
    check_gradients,
    check_varlen_attention,
    exact_gradients,
    exact_varlen_gradients,
    head_dims,
    normal,
    normal_qkv,
)

from flash_attn_jit import flash_attn_func, flash_attn_qkvpacked_func, flash_attn_varlen_func

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no NVIDIA GPU"),
]

OPTIONS = [
    {"window_size": (64, 0)},
    {"window_size": (100, 37)},
    {"window_size": (-1, 50)},
    {"softcap": 5.0, "causal": True},
    {"alibi_slopes": True, "causal": True},
    {"alibi_slopes": True, "softcap": 20.0, "window_size": (150, 6), "softmax_scale": 0.2},
]


def with_slopes(options, heads):
    """`options` with slopes for so many heads where they ask for some."""
    if "alibi_slopes" not in options:
        return options
    return {**options, "alibi_slopes": torch.tensor([0.5 / (1 + h) for h in range(heads)], device="cuda")}


def check(q, k, v, **options):
    """out, softmax_lse and the gradients against float64."""
    q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
    out, softmax_lse, _ = flash_attn_func(q, k, v, return_attn_probs=True, **options)
    check_attention(out.detach(), softmax_lse, q.detach(), k.detach(), v.detach(), **options)
    dout = normal(*out.shape, seed=9, device="cuda")
    check_gradients(torch.autograd.grad(out, (q, k, v), dout), exact_gradients(q, k, v, dout, **options))


@pytest.mark.parametrize("head_dim", head_dims())
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options(options, head_dim):
    for seqlens in ((300, 300), (257, 500), (500, 130)):
        check(*normal_qkv(2, *seqlens, 4, 2, head_dim, device="cuda"), **with_slopes(options, 4))


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window_size": (512, 0)}], ids=str)
def test_long_sequences(options, head_dim):
    for seqlens in ((4096, 4096), (4095, 4097), (129, 4096), (4033, 65)):
        check(*normal_qkv(1, *seqlens, 2, 1, head_dim, device="cuda"), **options)


@pytest.mark.parametrize("head_dim", head_dims())
@pytest.mark.parametrize("options", [{}, {"causal": True}, *OPTIONS], ids=str)
def test_varlen(options, head_dim):
    options = with_slopes(options, 4)
    lengths_q, lengths_k = [300, 0, 129, 1, 700, 64], [300, 50, 257, 5, 65, 0]
    cu_q, cu_k = (
        torch.tensor([0, *lengths], dtype=torch.int32, device="cuda").cumsum(0, dtype=torch.int32)
        for lengths in (lengths_q, lengths_k)
    )
    q = normal(sum(lengths_q), 4, head_dim, seed=1, device="cuda").requires_grad_()
    k, v = (normal(sum(lengths_k), 2, head_dim, seed=seed, device="cuda").requires_grad_() for seed in (2, 3))
    out, softmax_lse, _ = flash_attn_varlen_func(
        q, k, v, cu_q, cu_k, max(lengths_q), max(lengths_k), return_attn_probs=True, **options
    )
    check_varlen_attention(out.detach(), softmax_lse, q.detach(), k.detach(), v.detach(), cu_q, cu_k, **options)
    dout = normal(*out.shape, seed=9, device="cuda")
    gradients = torch.autograd.grad(out, (q, k, v), dout)
    check_gradients(gradients, exact_varlen_gradients(q, k, v, dout, cu_q, cu_k, **options))


def test_varlen_rows_beyond_2_to_the_31_elements():
    batch = 2**31 // (8 * 128 * 200) + 10
    rows = 200 * batch
    if torch.cuda.mem_get_info()[0] < 8 * 2 * rows * 8 * 128:
        pytest.skip("needs 35 GB of free GPU memory")
    last = normal(200, 8, 128, device="cuda")
    q = torch.zeros(rows, 8, 128, dtype=torch.float16, device="cuda")
    q[-200:] = last
    q.requires_grad_()
    cu_seqlens = torch.arange(0, rows + 1, 200, dtype=torch.int32, device="cuda")
    out = flash_attn_varlen_func(q, q, q, cu_seqlens, cu_seqlens, 200, 200)
    check_attention(out.detach()[None, -200:], None, last[None], last[None], last[None])
    dout = torch.zeros_like(out)
    dout[-200:] = normal(200, 8, 128, seed=9, device="cuda")
    (gradient,) = torch.autograd.grad(out, q, dout)
    expected = sum(exact_gradients(last[None], last[None], last[None], dout[None, -200:]))
    check_gradients([gradient[None, -200:]], [expected])
    assert not gradient[:-200].any()


def test_qkvpacked_gradient_is_written_in_place():
    qkv = normal(2, 300, 3, 4, 64, device="cuda").requires_grad_()
    dout = normal(2, 300, 4, 64, seed=9, device="cuda")
    (packed,) = torch.autograd.grad(flash_attn_qkvpacked_func(qkv, causal=True), qkv, dout)
    parts = [t.detach().clone().requires_grad_() for t in qkv.unbind(2)]
    separate = torch.autograd.grad(flash_attn_func(*parts, causal=True), parts, dout)
    assert torch.equal(packed, torch.stack(separate, 2))


@pytest.mark.parametrize("head_dim", [64, 128, 33])
def test_dout_of_strides_zero(head_dim):
    q, k, v = (t.requires_grad_() for t in normal_qkv(2, 200, 300, 4, 2, head_dim, device="cuda"))
    flash_attn_func(q, k, v).sum().backward()
    dout = torch.ones_like(q)
    check_gradients((q.grad, k.grad, v.grad), exact_gradients(q, k, v, dout))
