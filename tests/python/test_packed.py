"""kvpacked and qkvpacked: read and written through strides, bit for bit what separate tensors give."""

import pytest
import torch
from attention_reference import check_attention, check_gradients, exact_gradients, normal

from flash_attn_jit import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)


def apart(packed):
    """The slices of a packed tensor as tensors of their own."""
    return [slice.detach().clone().requires_grad_() for slice in packed.unbind(-3)]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [64, 33])
def test_qkvpacked(head_dim, causal):
    qkv = normal(2, 70, 3, 2, head_dim).requires_grad_()
    q, k, v = apart(qkv)
    dout = normal(2, 70, 2, head_dim, seed=9)
    out, softmax_lse, s_dmask = flash_attn_qkvpacked_func(qkv, causal=causal, return_attn_probs=True)
    expected, expected_lse, _ = flash_attn_func(q, k, v, causal=causal, return_attn_probs=True)
    assert torch.equal(out, expected) and torch.equal(softmax_lse, expected_lse) and s_dmask.numel() == 0
    (dqkv,) = torch.autograd.grad(out, qkv, dout)
    gradients = torch.autograd.grad(expected, (q, k, v), dout)
    assert torch.equal(dqkv, torch.stack(gradients, 2)) and dqkv.is_contiguous()
    check_gradients(gradients, exact_gradients(q, k, v, dout, causal=causal))


@pytest.mark.parametrize("causal", [False, True])
def test_kvpacked(causal):
    q, kv = normal(2, 40, 4, 64, seed=1).requires_grad_(), normal(2, 70, 2, 2, 64).requires_grad_()
    k, v = apart(kv)
    dout = normal(2, 40, 4, 64, seed=9)
    out, expected = flash_attn_kvpacked_func(q, kv, causal=causal), flash_attn_func(q, k, v, causal=causal)
    assert torch.equal(out, expected)
    dq, dkv = torch.autograd.grad(out, (q, kv), dout)
    gradients = torch.autograd.grad(expected, (q, k, v), dout)
    assert torch.equal(dq, gradients[0]) and torch.equal(dkv, torch.stack(gradients[1:], 2))


@pytest.mark.parametrize("which", [0, 1])
def test_one_input_of_kvpacked_needs_a_gradient(which):
    # With fewer keys one kernel would make both gradients, and round otherwise.
    inputs = [normal(1, 20, 2, 64, seed=1), normal(1, 150, 2, 2, 64)]
    both = [t.clone().requires_grad_() for t in inputs]
    inputs[which].requires_grad_()
    dout = normal(1, 20, 2, 64, seed=9)
    (gradient,) = torch.autograd.grad(flash_attn_kvpacked_func(*inputs), inputs[which], dout)
    assert torch.equal(gradient, torch.autograd.grad(flash_attn_kvpacked_func(*both), both, dout)[which])


@pytest.mark.parametrize(
    "options", [{"window_size": (6, 2)}, {"softcap": 3.0}, {"alibi_slopes": torch.ones(2)}], ids=str
)
def test_options_reach_the_packed_forms(options):
    qkv = normal(1, 20, 3, 2, 64)
    q, k, v = qkv.unbind(2)
    expected = flash_attn_func(q, k, v, **options)
    assert torch.equal(flash_attn_qkvpacked_func(qkv, **options), expected)
    assert torch.equal(flash_attn_kvpacked_func(q, qkv[:, :, 1:], **options), expected)
    assert not torch.equal(expected, flash_attn_func(q, k, v))


NAN = float("nan")
USED, LEFTPAD = torch.tensor([50, 0, 70], dtype=torch.int32), torch.tensor([7, 0, 0], dtype=torch.int32)


def check_used_rows(out, q, kv):
    """Of sequences (batch, seqlen, ...): `out` is that over the keys that LEFTPAD and USED leave."""
    for b in range(3):
        k, v = kv[b : b + 1, LEFTPAD[b] : USED[b]].unbind(2)
        check_attention(out[b : b + 1], None, q[b : b + 1], k, v, causal=True)


def padded(kv):
    """NaN where no sequence has a key."""
    for b in range(3):
        kv[b, : LEFTPAD[b]] = kv[b, USED[b] :] = NAN
    return kv


@pytest.mark.parametrize("queries", [1, 40])
def test_kvpacked_with_used_rows_padding_and_out(queries):
    q, kv = normal(3, queries, 4, 64, seed=1), padded(normal(3, 70, 2, 2, 64))
    into = torch.empty_like(q)
    out = flash_attn_kvpacked_func(q, kv, causal=True, out=into, seqused_k=USED, leftpad_k=LEFTPAD, num_splits=2)
    assert out is into
    check_used_rows(out, q, kv)


@pytest.mark.parametrize("queries", [1, 40])
def test_varlen_kvpacked_with_used_rows_padding_and_out(queries):
    q, kv = normal(3, queries, 4, 64, seed=1), padded(normal(3, 70, 2, 2, 64))
    starts_q, starts_k = (torch.arange(4, dtype=torch.int32) * rows for rows in (queries, 70))
    into = torch.empty_like(q).flatten(0, 1)
    out, softmax_lse, _ = flash_attn_varlen_kvpacked_func(
        q.flatten(0, 1),
        kv.flatten(0, 1),
        starts_q,
        starts_k,
        queries,
        70,
        causal=True,
        return_attn_probs=True,
        out=into,
        seqused_k=USED,
        leftpad_k=LEFTPAD,
        num_splits=2,
    )
    assert out is into and softmax_lse.shape == (4, 3 * queries)
    check_used_rows(out.unflatten(0, q.shape[:2]), q, kv)


def test_kvpacked_takes_splits_with_gradients_but_no_cache():
    q, kv = normal(1, 1, 4, 64, seed=1).requires_grad_(), normal(1, 70, 2, 2, 64).requires_grad_()
    dout = normal(1, 1, 4, 64, seed=9)
    split, plain = (torch.autograd.grad(flash_attn_kvpacked_func(q, kv, num_splits=n), (q, kv), dout) for n in (3, 0))
    assert all(map(torch.equal, split, plain))
    for given in ({"seqused_k": USED[:1]}, {"leftpad_k": LEFTPAD[:1]}, {"out": torch.empty(1, 1, 4, 64).half()}):
        (name,) = given
        with pytest.raises(NotImplementedError, match=f"^{name} comes with inputs that require a gradient"):
            flash_attn_kvpacked_func(q.detach(), kv, **given)


def test_what_is_refused_of_used_rows_says_whose_slice():
    q, kv = normal(3, 1, 4, 64), normal(3, 70, 2, 2, 64)
    with pytest.raises(ValueError, match=r"^seqused_k\[2\] is 71; accepted: 0 to 70"):
        flash_attn_kvpacked_func(q, kv, seqused_k=USED + torch.tensor([0, 0, 1], dtype=torch.int32))
    with pytest.raises(ValueError, match=r"^k has .* k is kv\[:, :, 0\]"):
        flash_attn_kvpacked_func(q[..., :32], kv, seqused_k=USED)


def test_packed_tensors_of_other_strides():
    wide = normal(2, 20, 3, 2, 72)
    (q, k, v), qkv = wide[..., 4:68].unbind(2), wide[..., 4:68]
    assert torch.equal(flash_attn_qkvpacked_func(qkv), flash_attn_func(q, k, v))
    heads_first = qkv.permute(2, 0, 3, 1, 4).contiguous().permute(1, 3, 0, 2, 4)
    assert torch.equal(flash_attn_qkvpacked_func(heads_first), flash_attn_func(q, k, v))


CU_SEQLENS = torch.tensor([0, 8], dtype=torch.int32)


def call_kv(kv):
    return flash_attn_kvpacked_func(normal(1, 8, 2, 64), kv)


def call_varlen_kv(kv):
    return flash_attn_varlen_kvpacked_func(normal(8, 2, 64), kv, CU_SEQLENS, CU_SEQLENS, 8, 8)


def call_varlen_qkv(qkv):
    return flash_attn_varlen_qkvpacked_func(qkv, CU_SEQLENS, 8)


@pytest.mark.parametrize(
    "call, name, shape, words",
    [
        (call_kv, "kv", (1, 8, 2, 64), ["4 dimensions", "5", "num_heads_k"]),
        (call_kv, "kv", (1, 8, 3, 2, 64), ["size 3 in dimension 2", "2"]),
        (flash_attn_qkvpacked_func, "qkv", (8, 3, 2, 64), ["4 dimensions", "5"]),
        (flash_attn_qkvpacked_func, "qkv", (1, 8, 2, 2, 64), ["size 2 in dimension 2", "3"]),
        (call_varlen_kv, "kv", (1, 8, 2, 2, 64), ["5 dimensions", "4"]),
        (call_varlen_kv, "kv", (8, 3, 2, 64), ["size 3 in dimension 1", "2"]),
        (call_varlen_qkv, "qkv", (8, 2, 64), ["3 dimensions", "4"]),
        (call_varlen_qkv, "qkv", (8, 2, 2, 64), ["size 2 in dimension 1", "3"]),
    ],
)
def test_refused_shapes(call, name, shape, words):
    with pytest.raises(ValueError, match=f"^{name} has ") as raised:
        call(normal(*shape))
    assert all(word in str(raised.value) for word in words)


@pytest.mark.parametrize("call", [call_kv, flash_attn_qkvpacked_func, call_varlen_kv, call_varlen_qkv])
def test_no_tensor(call):
    with pytest.raises(ValueError, match=r"^q?kv is a list"):
        call([1.0])


def test_what_is_refused_of_a_slice_says_whose_slice():
    qkv = normal(1, 8, 3, 2, 64)
    with pytest.raises(ValueError, match=r"^q has dtype torch.float32.* q is qkv\[:, :, 0\]"):
        flash_attn_qkvpacked_func(qkv.float())
    with pytest.raises(ValueError, match=r"^q has dtype torch.float64.* v is qkv\[:, :, 2\]"):
        flash_attn_qkvpacked_func(qkv.double().requires_grad_())
    with pytest.raises(ValueError, match=r"^k has .* k is kv\[:, :, 0\]"):
        flash_attn_kvpacked_func(qkv[:, :, 0], normal(1, 8, 2, 2, 32))
    with pytest.raises(ValueError, match=r"^q has dtype .* q is qkv\[:, 0\]"):
        flash_attn_varlen_qkvpacked_func(qkv[0].float(), CU_SEQLENS, 8)
