"""Under torch.autocast, float32 inputs are cast to its dtype, differentiably."""

import pytest
import torch
from attention_reference import normal, normal_qkv

from flash_attn_jit import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
)


def float32(*tensors):
    return [t.float().requires_grad_() for t in tensors]


def half(tensors):
    return [t.detach().half().requires_grad_() for t in tensors]


@pytest.mark.parametrize(
    "function, inputs",
    [
        (flash_attn_func, normal_qkv(1, 20, 30, 2, 1, 64)),
        (flash_attn_kvpacked_func, (normal(1, 20, 2, 64), normal(1, 30, 2, 1, 64))),
        (flash_attn_qkvpacked_func, (normal(1, 20, 3, 2, 64),)),
    ],
)
def test_float32_is_cast(function, inputs):
    inputs = float32(*inputs)
    same = half(inputs)
    with torch.autocast("cpu", dtype=torch.float16):
        out = function(*inputs)
    expected = function(*same)
    assert torch.equal(out, expected)
    dout = normal(*out.shape, seed=9)
    gradients = torch.autograd.grad(out, inputs, dout)
    for got, wanted in zip(gradients, torch.autograd.grad(expected, same, dout)):
        assert got.dtype == torch.float32 and torch.equal(got, wanted.float())


def test_one_input_of_three_is_cast():
    q, k, v = normal_qkv(1, 20, 30, 2, 1, 64)
    with torch.autocast("cpu", dtype=torch.float16):
        assert torch.equal(flash_attn_func(q, k.float(), v), flash_attn_func(q, k, v))


def test_without_autocast_float32_is_an_error():
    q, k, v = float32(*normal_qkv(1, 8, 8, 1, 1, 64))
    with pytest.raises(ValueError, match=r"^q has dtype torch.float32.*q.to\(torch.float16\)"):
        flash_attn_func(q, k, v)
    with (
        torch.autocast("cpu", dtype=torch.float16),
        torch.autocast("cpu", enabled=False),
        pytest.raises(ValueError, match=r"^q has dtype torch.float32"),
    ):
        flash_attn_func(q, k, v)


def test_autocast_to_bfloat16():
    q, k, v = float32(*normal_qkv(1, 8, 8, 1, 1, 64))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = flash_attn_func(q, k, v)
    assert out.dtype is torch.bfloat16 and torch.equal(out, flash_attn_func(q.bfloat16(), k.bfloat16(), v.bfloat16()))


def test_autocast_of_another_device_is_not_ours():
    q, k, v = float32(*normal_qkv(1, 8, 8, 1, 1, 64))
    with torch.autocast("cuda", dtype=torch.float16), pytest.raises(ValueError, match=r"^q has dtype torch.float32"):
        flash_attn_func(q, k, v)


def test_float64_stays_an_error():
    q, k, v = (t.double() for t in normal_qkv(1, 8, 8, 1, 1, 64))
    with torch.autocast("cpu", dtype=torch.float16), pytest.raises(ValueError, match=r"torch.float64"):
        flash_attn_func(q, k, v)
