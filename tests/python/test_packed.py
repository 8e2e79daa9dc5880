"""kvpacked and qkvpacked: read and written through strides, bit for bit what separate tensors give."""

import pytest
import torch
from attention_reference import check_gradients, exact_gradients, normal

from flash_attn_jit import (
    UnsupportedError,
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
    with pytest.raises(UnsupportedError, match=r"^q has dtype torch.bfloat16.* v is qkv\[:, :, 2\]"):
        flash_attn_qkvpacked_func(qkv.bfloat16().requires_grad_())
    with pytest.raises(ValueError, match=r"^k has .* k is kv\[:, :, 0\]"):
        flash_attn_kvpacked_func(qkv[:, :, 0], normal(1, 8, 2, 2, 32))
    with pytest.raises(ValueError, match=r"^q has dtype .* q is qkv\[:, 0\]"):
        flash_attn_varlen_qkvpacked_func(qkv[0].float(), CU_SEQLENS, 8)
