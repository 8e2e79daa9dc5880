"""Gradients through the Python API, in the interpreter, against float64."""

import pytest
import torch
import torch.utils.checkpoint
from attention_reference import NO_OPTIONS, check_gradients, exact_gradients, leaves, normal, normal_qkv

import flash_attn_jit
from flash_attn_jit import flash_attn_func


@pytest.mark.parametrize(
    "shape, causal",
    [
        ((1, 70, 70, 2, 2, 64), False),
        ((2, 65, 130, 4, 2, 64), True),
        ((1, 130, 65, 2, 1, 32), True),
        ((1, 40, 70, 1, 1, 128), True),
        ((1, 33, 20, 2, 2, 33), False),
    ],
)
def test_gradients(shape, causal):
    q, k, v = leaves(*normal_qkv(*shape))
    out = flash_attn_func(q, k, v, causal=causal)
    dout = normal(*out.shape, seed=9)
    out.backward(dout)
    check_gradients((q.grad, k.grad, v.grad), exact_gradients(q, k, v, dout, causal=causal))


def test_scale_and_attention_probs():
    q, k, v = leaves(*normal_qkv(1, 20, 30, 2, 2, 64))
    out, softmax_lse, _ = flash_attn_func(q, k, v, softmax_scale=-0.2, return_attn_probs=True)
    assert out.requires_grad and softmax_lse.requires_grad
    dout = normal(*out.shape, seed=9)
    out.backward(dout)
    check_gradients((q.grad, k.grad, v.grad), exact_gradients(q, k, v, dout, softmax_scale=-0.2))


def test_twice_gives_the_same_bits():
    q, k, v = leaves(*normal_qkv(1, 30, 40, 2, 1, 64))
    out = flash_attn_func(q, k, v)
    dout = normal(*out.shape, seed=9)
    first = torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)
    second = torch.autograd.grad(out, (q, k, v), dout)
    for a, b in zip(first, second):
        assert torch.equal(a, b)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_one_input_needs_a_gradient(which):
    inputs = list(normal_qkv(1, 20, 30, 2, 2, 64))
    inputs[which] = inputs[which].requires_grad_()
    out = flash_attn_func(*inputs)
    dout = normal(*out.shape, seed=9)
    (gradient,) = torch.autograd.grad(out, inputs[which], dout)
    check_gradients((gradient,), exact_gradients(*inputs, dout)[which : which + 1])


@pytest.mark.parametrize(
    "make",
    [
        lambda shape: normal(shape[0], shape[2], shape[1], shape[3], seed=9).transpose(1, 2),
        lambda shape: torch.ones((), dtype=torch.float16).expand(shape),
        lambda shape: normal(*shape, 2, seed=9)[..., 0],
    ],
    ids=["transposed", "expanded", "strided"],
)
def test_dout_of_any_strides(make):
    q, k, v = leaves(*normal_qkv(1, 20, 30, 2, 2, 64))
    out = flash_attn_func(q, k, v)
    dout = make(out.shape)
    gradients = torch.autograd.grad(out, (q, k, v), dout)
    check_gradients(gradients, exact_gradients(q, k, v, dout))


@pytest.mark.parametrize("needed", [(0, 1), (0, 2), (1, 2)], ids=str)
def test_two_inputs_need_gradients(needed):
    inputs = list(normal_qkv(1, 20, 30, 2, 2, 64))
    expected = exact_gradients(*inputs, normal(1, 20, 2, 64, seed=9))
    wanted = [inputs[i].requires_grad_() for i in needed]
    gradients = torch.autograd.grad(flash_attn_func(*inputs), wanted, normal(1, 20, 2, 64, seed=9))
    check_gradients(gradients, [expected[i] for i in needed])


def test_only_the_kernels_that_are_needed_run():
    q, k, v = normal_qkv(1, 8, 8, 1, 1, 64)
    kernels = []
    for inputs in ((q.clone().requires_grad_(), k, v), (q, k.clone().requires_grad_(), v)):
        flash_attn_func(*inputs).sum().backward()
        kernels.append(flash_attn_jit.interpreter_report().kernel)
    assert "bwd_dq" in kernels[0] and "bwd_dkdv" in kernels[1]


def test_an_input_changed_in_place_is_caught():
    q, k, v = leaves(*normal_qkv(1, 8, 8, 1, 1, 64))
    q_used = q * 1
    out = flash_attn_func(q_used, k, v)
    q_used.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


class NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, _):
        return None


def test_a_gradient_that_does_not_come():
    q, k, v = leaves(*normal_qkv(1, 8, 8, 1, 1, 64))
    NoGradient.apply(flash_attn_func(q, k, v)).sum().backward()
    out, _, _ = flash_attn_func(q, k, v, return_attn_probs=True)
    NoGradient.apply(out).sum().backward()
    assert all(x.grad is None or not x.grad.any() for x in (q, k, v))


def test_activation_checkpointing():
    q, k, v = leaves(*normal_qkv(1, 20, 20, 1, 1, 64))
    out = torch.utils.checkpoint.checkpoint(flash_attn_func, q, k, v, use_reentrant=False)
    dout = normal(*out.shape, seed=9)
    gradients = torch.autograd.grad(out, (q, k, v), dout)
    for got, expected in zip(gradients, torch.autograd.grad(flash_attn_func(q, k, v), (q, k, v), dout)):
        assert torch.equal(got, expected)


def test_gradients_of_gradients_are_refused():
    q, k, v = leaves(*normal_qkv(1, 8, 8, 1, 1, 64))
    out = flash_attn_func(q, k, v)
    with pytest.raises(NotImplementedError, match="create_graph=True"):
        torch.autograd.grad(out.sum(), q, create_graph=True)


def test_inputs_that_need_gradients_run_without_grad_mode():
    q, k, v = leaves(*normal_qkv(1, 8, 8, 1, 1, 64))
    with torch.no_grad():
        assert not flash_attn_func(q, k, v).requires_grad


def test_dout_of_another_dtype_cannot_come_but_is_named():
    q, k, v = normal_qkv(1, 8, 8, 1, 1, 64)
    out, softmax_lse, _ = flash_attn_func(q, k, v, return_attn_probs=True)
    with pytest.raises(ValueError, match=r"^dout has dtype torch.float32"):
        torch.ops.flash_attn_jit.backward(out.float(), q, k, v, out, softmax_lse, None, [True] * 3, *NO_OPTIONS)
