"""Head dims above 256 on a GPU."""

import pytest
import torch
from attention_reference import check_attention, check_varlen_attention, normal, normal_qkv

from flash_attn_jit import flash_attn_func, flash_attn_varlen_func

pytestmark = pytest.mark.gpu


def qkv(*shape):
    return [t.cuda() for t in normal_qkv(*shape)]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [257, 264, 320, 384, 448, 500, 511, 512])
def test_head_dims(head_dim, causal):
    q, k, v = qkv(2, 257, 300, 4, 2, head_dim)
    out, lse, _ = flash_attn_func(q, k, v, causal=causal, return_attn_probs=True)
    check_attention(out, lse, q, k, v, causal=causal)


@pytest.mark.parametrize("seqlen_q", [1, 31, 32, 33, 64, 1000])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window_size": (100, 30)}, {"softcap": 10.0}], ids=str)
def test_lengths_and_options(options, seqlen_q):
    for seqlen_k in (1, 7, 8, 9, 65, 1000):
        q, k, v = qkv(1, seqlen_q, seqlen_k, 2, 2, 512)
        out, lse, _ = flash_attn_func(q, k, v, return_attn_probs=True, **options)
        check_attention(out, lse, q, k, v, **options)


@pytest.mark.parametrize("head_dim", [320, 512])
def test_scores_that_rise(head_dim):
    q, k, v = qkv(1, 200, 1000, 2, 2, head_dim)
    k *= torch.linspace(4, 0, 1000, device="cuda")[None, :, None, None]
    out, lse, _ = flash_attn_func(q, k, v, return_attn_probs=True)
    check_attention(out, lse, q, k, v)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bool])
def test_bias(dtype):
    q, k, v = qkv(2, 130, 200, 2, 2, 512)
    bias = normal(2, 2, 130, 200, seed=7, device="cuda")
    bias = bias > -1 if dtype is torch.bool else bias.to(dtype)
    out, lse, _ = flash_attn_func(q, k, v, attn_bias=bias, return_attn_probs=True)
    check_attention(out, lse, q, k, v, attn_bias=bias)


def test_sequences_of_different_lengths():
    lengths_q, lengths_k = [300, 0, 129, 1], [300, 50, 257, 1096]
    q, k, v = (normal(sum(n), 2, 512, seed=i, device="cuda") for i, n in enumerate((lengths_q, lengths_k, lengths_k)))
    ends = [
        torch.tensor([0, *torch.tensor(n).cumsum(0).tolist()], dtype=torch.int32, device="cuda")
        for n in (lengths_q, lengths_k)
    ]
    out, lse, _ = flash_attn_varlen_func(q, k, v, *ends, 300, 1096, causal=True, return_attn_probs=True)
    check_varlen_attention(out, lse, q, k, v, *ends, causal=True)


def test_the_same_bits_every_time():
    q, k, v = qkv(2, 1024, 1024, 8, 8, 512)
    first = flash_attn_func(q, k, v)
    assert all(torch.equal(flash_attn_func(q, k, v), first) for _ in range(5))


def test_nothing_is_allocated_but_results():
    q, k, v = qkv(1, 4096, 4096, 1, 1, 512)
    flash_attn_func(q, k, v)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = flash_attn_func(q, k, v)
    assert torch.cuda.max_memory_allocated() - before <= 2 * out.nbytes
