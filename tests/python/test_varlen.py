"""Sequences of different lengths without padding, in the interpreter, against float64."""

import logging

import numpy
import pytest
import torch
from attention_reference import check_gradients, check_varlen_attention, exact_varlen_gradients, normal

from flash_attn_jit import (
    _arguments,
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from flash_attn_jit._options import Options


def starts(*lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def batch(lengths_q, lengths_k, num_heads=2, num_heads_k=1, head_dim=64):
    """q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k"""
    q = normal(sum(lengths_q), num_heads, head_dim, seed=1)
    k, v = (normal(sum(lengths_k), num_heads_k, head_dim, seed=seed) for seed in (2, 3))
    return q, k, v, starts(*lengths_q), starts(*lengths_k), max(lengths_q), max(lengths_k)


@pytest.mark.parametrize(
    "lengths_q, lengths_k",
    [
        ([30, 1, 75], [30, 1, 75]),
        ([5, 40], [70, 3]),
        ([0, 20, 0, 3], [10, 0, 0, 30]),
        ([65], [130]),
        ([0], [5]),
        ([4], [0]),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True},
        {"window_size": (6, 2)},
        {"softcap": 3.0, "softmax_scale": 0.3},
        {"alibi_slopes": torch.tensor([0.5, 0.0625]), "causal": True},
    ],
    ids=str,
)
def test_out_and_gradients(lengths_q, lengths_k, options):
    *tensors, cu_q, cu_k, max_q, max_k = batch(lengths_q, lengths_k)
    q, k, v = (t.requires_grad_() for t in tensors)
    out, softmax_lse, s_dmask = flash_attn_varlen_func(
        q, k, v, cu_q, cu_k, max_q, max_k, return_attn_probs=True, **options
    )
    check_varlen_attention(out.detach(), softmax_lse, q.detach(), k.detach(), v.detach(), cu_q, cu_k, **options)
    assert s_dmask.numel() == 0
    dout = normal(*out.shape, seed=9)
    gradients = torch.autograd.grad(out, (q, k, v), dout)
    check_gradients(gradients, exact_varlen_gradients(q, k, v, dout, cu_q, cu_k, **options))


def test_slopes_of_each_sequence():
    slopes = torch.tensor([[0.5, 0.25], [0.0, 1.0]])
    q, k, v, *lengths = batch([10, 30], [20, 25])
    out, softmax_lse, _ = flash_attn_varlen_func(q, k, v, *lengths, alibi_slopes=slopes, return_attn_probs=True)
    check_varlen_attention(out, softmax_lse, q, k, v, *lengths[:2], alibi_slopes=slopes)


def test_equal_lengths_are_the_fixed_form():
    q, k, v, *lengths = batch([40, 40], [50, 50])
    fixed = flash_attn_func(*(t.unflatten(0, (2, -1)) for t in (q, k, v)), causal=True)
    out = flash_attn_varlen_func(q, k, v, *lengths, causal=True)
    torch.testing.assert_close(out, fixed.flatten(0, 1), atol=1e-3, rtol=1e-3)


def test_qkvpacked():
    qkv = normal(55, 3, 2, 64).requires_grad_()
    q, k, v = (t.detach().clone().requires_grad_() for t in qkv.unbind(1))
    cu_seqlens, dout = starts(25, 30), normal(55, 2, 64, seed=9)
    out = flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, 30, causal=True)
    expected = flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, 30, 30, causal=True)
    assert torch.equal(out, expected)
    (dqkv,) = torch.autograd.grad(out, qkv, dout)
    assert torch.equal(dqkv, torch.stack(torch.autograd.grad(expected, (q, k, v), dout), 1))


def test_kvpacked():
    q, kv = normal(30, 4, 64, seed=1).requires_grad_(), normal(55, 2, 2, 64).requires_grad_()
    k, v = (t.detach().clone().requires_grad_() for t in kv.unbind(1))
    lengths, dout = (starts(10, 20), starts(25, 30), 20, 30), normal(30, 4, 64, seed=9)
    out = flash_attn_varlen_kvpacked_func(q, kv, *lengths)
    expected = flash_attn_varlen_func(q, k, v, *lengths)
    assert torch.equal(out, expected)
    dq, dkv = torch.autograd.grad(out, (q, kv), dout)
    gradients = torch.autograd.grad(expected, (q, k, v), dout)
    assert torch.equal(dq, gradients[0]) and torch.equal(dkv, torch.stack(gradients[1:], 1))


@pytest.mark.parametrize("kind", [torch.tensor, numpy.int64, lambda n: torch.tensor(n, dtype=torch.int32)])
def test_max_seqlen_in_every_form(kind):
    q, k, v, cu_q, cu_k, max_q, max_k = batch([10, 20], [20, 5])
    expected = flash_attn_varlen_func(q, k, v, cu_q, cu_k, max_q, max_k)
    assert torch.equal(flash_attn_varlen_func(q, k, v, cu_q, cu_k, kind(max_q), kind(max_k)), expected)


@pytest.mark.parametrize("value", [2.0, "20", None, torch.tensor(20.0), torch.tensor([20])], ids=str)
@pytest.mark.parametrize("name", ["max_seqlen_q", "max_seqlen_k"])
def test_max_seqlen_of_another_kind(name, value):
    names = ["q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"]
    arguments = dict(zip(names, batch([10, 20], [20, 5])))
    with pytest.raises(ValueError, match=f"^{name} is .*accepted"):
        flash_attn_varlen_func(**{**arguments, name: value})


def test_a_length_that_costs_a_synchronisation_is_told_once(caplog, monkeypatch):
    monkeypatch.setattr(_arguments, "_told_of_synchronisation", False)
    with caplog.at_level(logging.WARNING, "flash_attn_jit"):
        for _ in range(2):
            _arguments._tell_of_synchronisation("max_seqlen_q", torch.empty((), device="meta"))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "max_seqlen_q is a tensor on meta" in caplog.text


def varlen(**changes):
    names = ["q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"]
    return flash_attn_varlen_func(**{**dict(zip(names, batch([10, 20], [20, 5]))), **changes})


@pytest.mark.parametrize("name", ["cu_seqlens_q", "cu_seqlens_k"])
@pytest.mark.parametrize(
    "value",
    [
        [0, 10, 30],
        torch.tensor([0, 10, 30]),
        torch.tensor([[0, 10, 30]], dtype=torch.int32),
        torch.tensor([0, 9, 10, 9, 30, 9], dtype=torch.int32)[::2],
        torch.tensor([0, 10, 20, 30], dtype=torch.int32),
        torch.tensor([0, 10, 30], dtype=torch.int32, device="meta"),
    ],
    ids=["list", "int64", "two dimensions", "strided", "another batch", "another device"],
)
def test_cu_seqlens_that_do_not_fit(name, value):
    with pytest.raises(ValueError, match="cu_seqlens"):
        varlen(**{name: value})


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_rank(name):
    with pytest.raises(ValueError, match=f"^{name} has 4 dimensions.* 3"):
        varlen(**{name: normal(1, 30, 2, 64)})


@pytest.fixture
def nan_where_nothing_is_written(monkeypatch):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("max_q, max_k, name", [(0, 20, "q"), (19, 20, "q"), (20, 0, "k"), (20, 19, "k"), (0, 0, "q")])
def test_a_max_seqlen_less_than_the_longest_sequence_is_named(max_q, max_k, name):
    q, k, v = (t.requires_grad_() for t in batch([20], [20])[:3])
    with pytest.raises(ValueError, match=f"^cu_seqlens_{name}.*max_seqlen_{name}"):
        flash_attn_varlen_func(q, k, v, starts(20), starts(20), max_q, max_k)
    out, softmax_lse = (torch.zeros(shape) for shape in ((20, 2, 64), (2, 20)))
    lengths = Options(cu_seqlens_q=starts(20), cu_seqlens_k=starts(20), max_seqlen_q=max_q, max_seqlen_k=max_k)
    q, k, v, out = q.detach(), k.detach(), v.detach(), out.half()
    with pytest.raises(ValueError, match=f"^cu_seqlens_{name}.*max_seqlen_{name}"):
        torch.ops.flash_attn_jit.backward(out, q, k, v, out, softmax_lse, None, [True] * 3, *lengths)


def test_nothing_is_left_unwritten_where_no_block_runs(nan_where_nothing_is_written):
    """max_seqlen 0, and rows for all that: here they belong to no sequence, which the interpreter lets pass."""
    q, k, v = (t.requires_grad_() for t in batch([20], [30])[:3])
    out, softmax_lse, _ = flash_attn_varlen_func(q, k, v, starts(0), starts(0), 0, 0, return_attn_probs=True)
    assert not out.any() and (softmax_lse == float("inf")).all()
    for gradient in torch.autograd.grad(out, (q, k, v), normal(*out.shape, seed=9)):
        assert not gradient.any()
