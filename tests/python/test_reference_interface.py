"""The reference project's module: its argument order on these kernels."""

import pytest
import torch
from attention_reference import normal, normal_qkv

import flash_attention_interface as theirs
import flash_attn_jit as ours

CU_SEQLENS = torch.tensor([0, 7, 20], dtype=torch.int32)
LENGTHS = (CU_SEQLENS, CU_SEQLENS, 13, 13)
Q, K, V = normal_qkv(1, 20, 20, 2, 1, 64)
KV, QKV = normal(1, 20, 2, 1, 64), normal(1, 20, 3, 2, 64)


@pytest.mark.parametrize(
    "name, arguments",
    [
        ("flash_attn_func", (Q, K, V)),
        ("flash_attn_kvpacked_func", (Q, KV)),
        ("flash_attn_qkvpacked_func", (QKV,)),
        ("flash_attn_varlen_func", (Q[0], K[0], V[0], *LENGTHS)),
        ("flash_attn_varlen_kvpacked_func", (Q[0], KV[0], *LENGTHS)),
        ("flash_attn_varlen_qkvpacked_func", (QKV[0], CU_SEQLENS, 13)),
    ],
)
def test_scale_and_causal_come_fourth_and_fifth(name, arguments):
    out = getattr(theirs, name)(*arguments, 0.3, True)
    assert torch.equal(out, getattr(ours, name)(*arguments, softmax_scale=0.3, causal=True))
    out = getattr(theirs, name)(*arguments)
    assert torch.equal(out, getattr(ours, name)(*arguments))


def test_gradients():
    inputs = [t.clone().requires_grad_() for t in (Q, K, V)]
    gradients = torch.autograd.grad(theirs.flash_attn_func(*inputs, causal=True).sum(), inputs)
    for got, wanted in zip(gradients, torch.autograd.grad(ours.flash_attn_func(*inputs, causal=True).sum(), inputs)):
        assert torch.equal(got, wanted)


def test_a_last_dimension_that_is_not_contiguous_is_copied():
    strided = normal(1, 20, 2, 128)[..., ::2]
    assert torch.equal(theirs.flash_attn_func(strided, K, V), ours.flash_attn_func(strided.contiguous(), K, V))


def test_causal_in_the_scales_place_is_named():
    with pytest.raises(ValueError, match="causal=True"):
        theirs.flash_attn_func(Q, K, V, True)
