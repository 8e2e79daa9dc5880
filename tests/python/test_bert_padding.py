"""Padding taken off and put back."""

import pytest
import torch

import flash_attn_jit
from flash_attn_jit.bert_padding import (
    index_first_axis,
    index_put_first_axis,
    pad_input,
    unpad_input,
    unpad_input_for_concatenated_sequences,
)

MASK = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0], [0, 1, 1, 0]])


def hidden(*rest):
    return torch.randn(*MASK.shape, *rest, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("mask", [MASK, MASK.bool(), MASK.int()], ids=["int64", "bool", "int32"])
@pytest.mark.parametrize("rest", [(), (5,), (2, 5)], ids=str)
def test_round_trip(rest, mask):
    states = hidden(*rest)
    rows, indices, cu_seqlens, max_seqlen, seqused = unpad_input(states, mask)
    assert torch.equal(rows, states[MASK.bool()])
    assert indices.tolist() == [0, 1, 2, 4, 13, 14] and indices.dtype == torch.int64
    assert cu_seqlens.tolist() == [0, 3, 4, 4, 6] and cu_seqlens.dtype == torch.int32
    assert type(max_seqlen) is int and max_seqlen == 3
    assert seqused.tolist() == [3, 1, 0, 2] and seqused.dtype == torch.int32
    padded = pad_input(rows, indices, *MASK.shape)
    kept = MASK.bool().reshape(*MASK.shape, *(1 for _ in rest))
    assert torch.equal(padded, torch.where(kept, states, 0.0))


def test_rows_that_are_kept_but_not_used():
    unused = torch.zeros_like(MASK)
    unused[0, 3] = unused[2, 0] = 1
    states = hidden(5)
    rows, _, cu_seqlens, max_seqlen, seqused = unpad_input(states, MASK, unused)
    assert torch.equal(rows, states[(MASK + unused).bool()])
    assert cu_seqlens.tolist() == [0, 4, 5, 6, 8] and max_seqlen == 4
    assert seqused.tolist() == [3, 1, 0, 2]


def test_gradients():
    states = hidden(5).requires_grad_()
    rows, indices, *_ = unpad_input(states, MASK)
    weights = torch.randn(*MASK.shape, 5)
    (gradient,) = torch.autograd.grad((pad_input(rows, indices, *MASK.shape) * weights).sum(), states)
    assert torch.equal(gradient, torch.where(MASK.bool()[..., None], weights, 0.0))


def test_gradcheck():
    states = hidden(2).double().requires_grad_()
    indices = unpad_input(states, MASK)[1]
    assert torch.autograd.gradcheck(lambda x: unpad_input(x, MASK)[0], states)
    assert torch.autograd.gradcheck(lambda x: index_first_axis(x.flatten(0, 1), indices), states)
    rows = states.detach().flatten(0, 1)[indices].requires_grad_()
    assert torch.autograd.gradcheck(lambda x: pad_input(x, indices, *MASK.shape), rows)


def test_rows_in_any_order():
    states = torch.randn(5, 3)
    assert torch.equal(index_first_axis(states, torch.tensor([3, 0, 3])), states[[3, 0, 3]])


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)], ids=str)
def test_empty(shape):
    rows, indices, cu_seqlens, max_seqlen, seqused = unpad_input(torch.ones(*shape, 2), torch.ones(shape))
    assert rows.shape == (0, 2) and indices.numel() == 0 and max_seqlen == 0
    assert cu_seqlens.tolist() == [0] * (shape[0] + 1) and seqused.tolist() == [0] * shape[0]
    assert pad_input(rows, indices, *shape).shape == (*shape, 2)


def test_refusals():
    states, mask = hidden(5), MASK
    with pytest.raises(ValueError, match=r"^attention_mask has shape \(4, 3\).*\(4, 4\)"):
        unpad_input(states, mask[:, :3])
    with pytest.raises(ValueError, match=r"^unused_mask has shape"):
        unpad_input(states, mask, mask[:1])
    with pytest.raises(ValueError, match=r"^hidden_states has 1 dimension"):
        unpad_input(states[0, 0], mask)
    with pytest.raises(ValueError, match=r"^indices has 2 dimensions"):
        index_first_axis(states, mask)
    with pytest.raises(ValueError, match=r"^hidden_states has shape \(4, 4, 5\) and indices \(3,\)"):
        pad_input(states, torch.arange(3), 4, 4)


def test_index_put_is_the_way_back():
    rows = torch.randn(3, 2, 5).double().requires_grad_()
    indices = torch.tensor([4, 0, 2])
    put = index_put_first_axis(rows, indices, 6)
    assert put.shape == (6, 2, 5) and torch.equal(index_first_axis(put, indices), rows)
    assert not put[[1, 3, 5]].any()
    assert torch.equal(index_put_first_axis(rows, indices.int(), 6), put)
    assert torch.autograd.gradcheck(lambda x: index_put_first_axis(x, indices, 6), rows)
    with pytest.raises(ValueError, match=r"^values has shape \(3, 2, 5\) and indices \(2,\).*\(n, \.\.\.\) and \(n\)"):
        index_put_first_axis(rows, indices[:2], 6)


LENGTHS = torch.tensor([[2, 3, 0, 0, 0, 0], [3, 2, 1, 0, 0, 0], [6, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]])


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
def test_concatenated_sequences(dtype):
    states = torch.randn(4, 6, 5)
    rows, indices, cu_seqlens, max_seqlen = unpad_input_for_concatenated_sequences(states, LENGTHS.to(dtype))
    assert indices.tolist() == [0, 1, 2, 3, 4, *range(6, 12), *range(12, 18)] and indices.dtype == torch.int64
    assert torch.equal(rows, states.flatten(0, 1)[indices])
    assert cu_seqlens.tolist() == [0, 2, 5, 8, 10, 11, 17] and cu_seqlens.dtype == torch.int32
    assert type(max_seqlen) is int and max_seqlen == 6


def test_concatenated_sequences_do_not_see_each_other():
    qkv = torch.randn(4, 6, 3, 2, 16).half()
    rows, indices, cu_seqlens, max_seqlen = unpad_input_for_concatenated_sequences(qkv, LENGTHS)
    out = flash_attn_jit.flash_attn_varlen_qkvpacked_func(rows, cu_seqlens, max_seqlen)
    second = flash_attn_jit.flash_attn_qkvpacked_func(qkv[:1, 2:5])
    assert torch.equal(pad_input(out, indices, 4, 6)[:1, 2:5], second)


def test_concatenated_sequences_of_nothing():
    rows, indices, cu_seqlens, max_seqlen = unpad_input_for_concatenated_sequences(
        torch.ones(0, 4, 2), torch.ones(0, 4, dtype=torch.int64)
    )
    assert rows.shape == (0, 2) and indices.numel() == 0 and cu_seqlens.tolist() == [0] and max_seqlen == 0


@pytest.mark.parametrize(
    "lengths, words",
    [
        (LENGTHS[:3], r"has shape \(3, 6\)"),
        (LENGTHS.bool(), "has dtype torch.bool"),
        (LENGTHS.float(), "has dtype torch.float32"),
        (LENGTHS + torch.tensor([0, 0, 0, 0, 0, 1]), "has a length of 0 and a row with 7 in all"),
        (LENGTHS - 1, "has a length of -1"),
    ],
    ids=["shape", "bool", "float", "too long", "negative"],
)
def test_concatenated_sequences_refused(lengths, words):
    with pytest.raises(ValueError, match=f"^attention_mask_in_length {words}.*accepted"):
        unpad_input_for_concatenated_sequences(torch.ones(4, 6, 5), lengths)
