"""Head dims above 256, which have a forward pass alone, through the interpreter, against float64."""

import pytest
import torch
import torch.nn.functional as F
from attention_reference import check_attention, check_varlen_attention, error_bound, normal, normal_qkv

import flash_attn_jit
from flash_attn_jit import (
    UnsupportedError,
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    sdpa,
)

NEEDS = (
    "head_dim is 320, and inputs need a gradient; accepted: 1 to 256 where they do, 1 to 512 where none does. Detach"
)


@pytest.mark.parametrize("head_dim", [257, 264, 300, 384, 511, 512])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window_size": (20, 5)}, {"causal": True, "softcap": 5.0}])
def test_against_float64(head_dim, options):
    q, k, v = normal_qkv(1, 70, 90, 4, 2, head_dim)
    out, lse, _ = flash_attn_func(q, k, v, return_attn_probs=True, **options)
    check_attention(out, lse, q, k, v, **options)


@pytest.mark.parametrize("queries", [1, 3])
def test_few_queries_and_splits(queries):
    q, k, v = normal_qkv(2, queries, 150, 4, 1, 512)
    out, lse, _ = flash_attn_func(q, k, v, causal=True, num_splits=4, return_attn_probs=True)
    check_attention(out, lse, q, k, v, causal=True)


def test_sequences_of_different_lengths():
    lengths_q, lengths_k = [40, 0, 70, 1], [50, 9, 64, 33]
    q, k, v = (normal(sum(n), 2, 320, seed=i) for i, n in enumerate((lengths_q, lengths_k, lengths_k)))
    ends = [torch.tensor([0, *torch.tensor(n).cumsum(0).tolist()], dtype=torch.int32) for n in (lengths_q, lengths_k)]
    out, lse, _ = flash_attn_varlen_func(q, k, v, *ends, 70, 64, causal=True, return_attn_probs=True)
    check_varlen_attention(out, lse, q, k, v, *ends, causal=True)


def test_new_rows_go_into_a_cache():
    q, k, v = normal_qkv(2, 1, 1, 2, 1, 512)
    caches = [normal(2, 40, 1, 512, seed=i) for i in (5, 6)]
    used = [20, 7]
    expected = [cache.clone() for cache in caches]
    for b, rows in enumerate(used):
        expected[0][b, rows], expected[1][b, rows] = k[b, 0], v[b, 0]
    out = flash_attn_with_kvcache(q, *caches, k, v, cache_seqlens=torch.tensor(used, dtype=torch.int32), causal=True)
    assert all(torch.equal(cache, whole) for cache, whole in zip(caches, expected))
    for b, rows in enumerate(used):
        check_attention(out[b : b + 1], None, q[b : b + 1], *(t[b : b + 1, : rows + 1] for t in expected), causal=True)


def test_packed_tensors():
    qkv = normal(1, 40, 3, 2, 320)
    q, k, v = qkv.unbind(2)
    expected = flash_attn_func(q, k, v, causal=True)
    assert torch.equal(flash_attn_qkvpacked_func(qkv, causal=True), expected)
    assert torch.equal(flash_attn_kvpacked_func(q, qkv[:, :, 1:], causal=True), expected)


def test_dropout_is_the_same_for_the_same_seed():
    q, k, v = normal_qkv(1, 64, 64, 1, 1, 512)
    outs = []
    for _ in range(2):
        torch.manual_seed(3)
        outs.append(flash_attn_func(q, k, v, dropout_p=0.5))
    assert torch.equal(*outs) and not torch.equal(outs[0], flash_attn_func(q, k, v))


@pytest.mark.parametrize("which", [0, 1, 2])
def test_gradients_are_refused(which):
    tensors = list(normal_qkv(1, 8, 8, 2, 2, 320))
    tensors[which].requires_grad_()
    with pytest.raises(UnsupportedError, match=NEEDS):
        flash_attn_func(*tensors)
    with torch.no_grad():
        out, lse, _ = flash_attn_func(*tensors, return_attn_probs=True)
        check_attention(out, lse, *tensors)


def test_gradients_of_options_and_packed_tensors_are_refused():
    q, k, v = normal_qkv(1, 8, 8, 2, 2, 320)
    with pytest.raises(UnsupportedError, match=NEEDS):
        flash_attn_func(q, k, v, attn_bias=torch.zeros(8, 8).requires_grad_())
    with pytest.raises(UnsupportedError, match=NEEDS):
        flash_attn_qkvpacked_func(torch.stack((q, k, v), 2).requires_grad_())


def test_sdpa():
    q, k, v = (t.transpose(1, 2) for t in normal_qkv(1, 50, 60, 2, 2, 512))
    out = sdpa(q, k, v)
    assert (out - F.scaled_dot_product_attention(q.float(), k.float(), v.float())).abs().max() <= error_bound(
        *(t.transpose(1, 2) for t in (q, k, v))
    )
    with pytest.raises(
        UnsupportedError, match=r"^query has head_dim 512, and an input needs a gradient; accepted: 1 to"
    ):
        sdpa(q.clone().requires_grad_(), k, v)


def test_route_sdpa_leaves_gradients_to_pytorch():
    q, k, v = (t.transpose(1, 2) for t in normal_qkv(1, 50, 60, 2, 2, 512))
    with flash_attn_jit.route_sdpa() as router:
        F.scaled_dot_product_attention(q, k, v)
        F.scaled_dot_product_attention(q.clone().requires_grad_(), k, v).sum().backward()
    assert router.counts == {"flash_attn_jit": 1, "torch": 1}
    assert list(router.reasons) == ["query has head_dim 512, and an input needs a gradient"]


def test_compiled_and_exported():
    q, k, v = normal_qkv(1, 40, 40, 2, 2, 512)
    compiled = torch.compile(flash_attn_func, backend="eager", fullgraph=True)
    assert torch.equal(compiled(q, k, v, causal=True), flash_attn_func(q, k, v, causal=True))

    class Layer(torch.nn.Module):
        def forward(self, q, k, v):
            return flash_attn_func(q, k, v, causal=True)

    exported = torch.export.export(Layer(), (q, k, v)).module()
    assert torch.equal(exported(q, k, v), flash_attn_func(q, k, v, causal=True))
