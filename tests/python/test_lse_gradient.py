"""The gradient of softmax_lse, in the interpreter, against float64."""

import pytest
import torch
from attention_reference import NO_OPTIONS, attention, check_gradients, leaves, normal, normal_qkv, varlen_attention
from conftest import needs_torch

from flash_attn_jit import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)

STARTS_Q, STARTS_K = (torch.tensor(starts, dtype=torch.int32) for starts in ([0, 30, 30, 50], [0, 20, 45, 80]))


def weights(lse, seed=7):
    """A gradient for it; NaN where a row sees no key."""
    numbers = normal(*lse.shape, seed=seed).float()
    return torch.where(lse.detach() == float("inf"), float("nan"), numbers)


def finite(lse):
    return torch.where(lse == float("inf"), torch.zeros_like(lse), lse)


def exact(function, inputs, dout, dlse):
    """Gradients of dout * out + dlse * softmax_lse in float64."""
    inputs = leaves(*(x.double() for x in inputs))
    out, lse = function(*inputs)
    loss = torch.zeros((), dtype=torch.float64)
    if dout is not None:
        loss = loss + (out * dout.double()).sum()
    if dlse is not None:
        loss = loss + (finite(lse) * dlse.double().nan_to_num()).sum()
    return torch.autograd.grad(loss, inputs, materialize_grads=True)


def gradients_of(out, lse, inputs, dout, dlse):
    outputs = [(each, gradient) for each, gradient in ((out, dout), (lse, dlse)) if gradient is not None]
    return torch.autograd.grad([each for each, _ in outputs], inputs, [gradient for _, gradient in outputs])


SHAPES = [
    ((1, 70, 70, 2, 2, 64), {}),
    ((2, 65, 130, 4, 2, 64), {"causal": True}),
    ((1, 130, 65, 2, 1, 32), {"causal": True}),  # rows that see no key
    ((1, 150, 140, 2, 1, 128), {"causal": True}),
    ((1, 33, 20, 2, 2, 33), {"window_size": (6, 2)}),
    ((1, 40, 150, 2, 2, 64), {"softcap": 3.0, "softmax_scale": -0.3}),
]


@pytest.mark.parametrize("which", ["both", "softmax_lse"])
@pytest.mark.parametrize("shape, options", SHAPES, ids=str)
def test_gradients(shape, options, which):
    q, k, v = leaves(*normal_qkv(*shape))
    out, lse, _ = flash_attn_func(q, k, v, return_attn_probs=True, **options)
    dout = normal(*out.shape, seed=9) if which == "both" else None
    dlse = weights(lse)
    got = gradients_of(out, lse, (q, k, v), dout, dlse)
    check_gradients(got, exact(lambda *qkv: attention(*qkv, **options), (q, k, v), dout, dlse))
    if dout is None:
        assert not got[2].any()


@pytest.mark.parametrize("seqlen_k", [60, 200])
def test_merged_halves_of_the_keys_have_the_gradients_of_the_whole(seqlen_k):
    q, k, v = leaves(*normal_qkv(1, 40, seqlen_k, 4, 2, 64))
    half = seqlen_k // 2
    parts = [
        flash_attn_func(q, k[:, keys], v[:, keys], return_attn_probs=True)[:2]
        for keys in (slice(0, half), slice(half, None))
    ]
    lse = torch.logaddexp(parts[0][1], parts[1][1])
    merged = sum(out * (part - lse).exp().transpose(1, 2)[..., None] for out, part in parts)
    dout = normal(*q.shape, seed=9)
    got = torch.autograd.grad(merged, (q, k, v), dout.float())
    check_gradients(got, exact(attention, (q, k, v), dout, None))


def test_causal_parts_merged_where_some_rows_see_none_of_one():
    """As context parallelism has it: the later keys are hidden from the earlier queries."""
    q, k, v = leaves(*normal_qkv(1, 60, 60, 2, 1, 64))
    early = flash_attn_func(q, k[:, :35], v[:, :35], window_size=(-1, 25), return_attn_probs=True)[:2]
    late = flash_attn_func(q, k[:, 35:], v[:, 35:], causal=True, return_attn_probs=True)[:2]
    expected = [attention(q.double(), k[:, :35].double(), v[:, :35].double(), window_size=(-1, 25))]
    expected.append(attention(q.double(), k[:, 35:].double(), v[:, 35:].double(), causal=True))

    def merged(parts):
        lses = [torch.where(lse == float("inf"), -float("inf"), lse) for _, lse in parts]
        lse = torch.logaddexp(*lses)
        return sum(out * (each - lse).exp().transpose(1, 2)[..., None] for (out, _), each in zip(parts, lses))

    dout = normal(*q.shape, seed=9)
    got = torch.autograd.grad(merged([early, late]), (q, k, v), dout.float())
    reference = torch.autograd.grad(merged(expected), (q, k, v), dout.double())
    check_gradients(got, reference)
    check_gradients(got, exact(lambda *qkv: attention(*qkv, causal=True), (q, k, v), dout, None))


@pytest.mark.parametrize("which", ["both", "softmax_lse"])
def test_varlen(which):
    q, k, v = leaves(normal(50, 4, 64, seed=1), normal(80, 2, 64, seed=2), normal(80, 2, 64, seed=3))
    starts = STARTS_Q, STARTS_K
    out, lse, _ = flash_attn_varlen_func(q, k, v, *starts, 30, 35, causal=True, return_attn_probs=True)
    assert (lse == float("inf")).any()
    dout = normal(*out.shape, seed=9) if which == "both" else None
    dlse = weights(lse)
    got = gradients_of(out, lse, (q, k, v), dout, dlse)
    check_gradients(got, exact(lambda *qkv: varlen_attention(*qkv, *starts, causal=True), (q, k, v), dout, dlse))


@pytest.mark.parametrize("road", ["plain", "operator"])
def test_packed_forms_give_the_bits_of_the_separate_one(road):
    starts = torch.tensor([0, 12, 30], dtype=torch.int32)
    dout, dlse = normal(30, 2, 64, seed=9), normal(2, 30, seed=7).float()

    def batched(function):
        return lambda *x: (y.flatten(0, 1) if y.dim() == 4 else y[0] for y in function(*(t[None] for t in x)))

    qkv = normal(30, 3, 2, 64, seed=1)
    lengths, keyword = (starts, starts, 18, 18), {"return_attn_probs": True}
    pairs = [
        (
            lambda q, kv: flash_attn_varlen_kvpacked_func(q, kv, *lengths, **keyword)[:2],
            lambda q, k, v: flash_attn_varlen_func(q, k, v, *lengths, **keyword)[:2],
        ),
        (
            lambda x: flash_attn_varlen_qkvpacked_func(x, starts, 18, **keyword)[:2],
            lambda q, k, v: flash_attn_varlen_func(q, k, v, *lengths, **keyword)[:2],
        ),
        (
            batched(lambda q, kv: flash_attn_kvpacked_func(q, kv, **keyword)[:2]),
            batched(lambda q, k, v: flash_attn_func(q, k, v, **keyword)[:2]),
        ),
        (
            batched(lambda x: flash_attn_qkvpacked_func(x, **keyword)[:2]),
            batched(lambda q, k, v: flash_attn_func(q, k, v, **keyword)[:2]),
        ),
    ]
    for function, separate in pairs:
        q, k, v = leaves(*qkv.unbind(1))
        expected = torch.cat([x.flatten() for x in gradients_of(*separate(q, k, v), (q, k, v), dout, dlse)])
        inputs = leaves(qkv)
        if function in (pairs[0][0], pairs[2][0]):
            inputs = leaves(qkv[:, 0], qkv[:, 1:])
        if road == "operator":
            with torch.autograd.graph.save_on_cpu(), torch.profiler.profile():
                got = gradients_of(*function(*inputs), inputs, dout, dlse)
        else:
            got = gradients_of(*function(*inputs), inputs, dout, dlse)
        parts = [y for x in got for y in (x.unbind(1) if x.dim() == 4 else (x,))]
        assert torch.equal(torch.cat([x.flatten() for x in parts]), expected)


@pytest.mark.parametrize(
    "make", [lambda lse: lse.sum(), lambda lse: lse[..., ::2].sum(), lambda lse: lse.mT.square().sum()]
)
def test_dlse_of_any_strides(make):
    q, k, v = leaves(*normal_qkv(1, 20, 30, 2, 2, 64))
    _, lse, _ = flash_attn_func(q, k, v, return_attn_probs=True)
    got = torch.autograd.grad(make(lse), (q, k))
    inputs = leaves(*(x.double() for x in (q, k, v)))
    check_gradients(got, torch.autograd.grad(make(attention(*inputs)[1]), inputs[:2]))


def test_compiled():
    def loss(q, k, v):
        out, lse, _ = flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
        return (out.float() * 0.5).square().sum() + lse.sin().sum()

    inputs = leaves(*normal_qkv(1, 20, 40, 2, 1, 64))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(*inputs), inputs)
    for gradient, expected in zip(got, torch.autograd.grad(loss(*inputs), inputs)):
        assert torch.equal(gradient, expected)


def test_compiled_where_only_softmax_lse_is_used():
    def loss(q, k, v):
        return flash_attn_func(q, k, v, return_attn_probs=True)[1].sin().sum()

    inputs = leaves(*normal_qkv(1, 20, 40, 2, 1, 64))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(*inputs), inputs)
    for gradient, expected in zip(got, torch.autograd.grad(loss(*inputs), inputs)):
        assert torch.equal(gradient, expected)


def test_transforms():
    def loss(q, k, v):
        out, lse, _ = flash_attn_func(q, k, v, return_attn_probs=True)
        return out.float().square().sum() + lse.sin().sum()

    q, k, v = normal_qkv(3, 20, 40, 2, 1, 64)
    inputs = leaves(q, k, v)
    expected = torch.autograd.grad(loss(*inputs), inputs)
    for got, gradient in zip(torch.func.grad(loss, (0, 1, 2))(q, k, v), expected):
        assert torch.equal(got, gradient)
    each = torch.func.vmap(torch.func.grad(loss, (0, 1, 2)))(*(x[:, None] for x in (q, k, v)))
    for got, gradient in zip(each, expected):
        torch.testing.assert_close(got[:, 0], gradient, atol=2e-3, rtol=2e-3)


def test_gradients_of_several_losses_at_once():
    needs_torch("2.5", "is_grads_batched meets operators without a batching rule in a loop")
    q, k, v = leaves(*normal_qkv(1, 12, 20, 1, 1, 64))
    _, lse, _ = flash_attn_func(q, k, v, return_attn_probs=True)
    dlse = normal(3, *lse.shape, seed=7).float()
    (batched,) = torch.autograd.grad(lse, q, dlse, retain_graph=True, is_grads_batched=True)
    for got, each in zip(batched, dlse):
        assert torch.equal(got, torch.autograd.grad(lse, q, each, retain_graph=True)[0])


def test_opcheck():
    q, k, v = normal_qkv(2, 20, 30, 2, 1, 64)
    out, lse = torch.ops.flash_attn_jit.forward(q, k, v, *NO_OPTIONS)
    dlse = normal(*lse.shape, seed=7).float()
    arguments = (normal(*out.shape, seed=9), q, k, v, out, lse, dlse, [True] * 3, *NO_OPTIONS)
    torch.library.opcheck(torch.ops.flash_attn_jit.backward.default, arguments)


def test_twice_gives_the_same_bits():
    q, k, v = leaves(*normal_qkv(1, 30, 200, 2, 1, 64))
    out, lse, _ = flash_attn_func(q, k, v, return_attn_probs=True)
    dout, dlse = normal(*out.shape, seed=9), weights(lse)
    first = torch.autograd.grad((out, lse), (q, k, v), (dout, dlse), retain_graph=True)
    for a, b in zip(first, torch.autograd.grad((out, lse), (q, k, v), (dout, dlse))):
        assert torch.equal(a, b)


def test_a_dlse_that_does_not_fit_is_named():
    q, k, v = normal_qkv(1, 8, 8, 1, 1, 64)
    out, lse = torch.ops.flash_attn_jit.forward(q, k, v, *NO_OPTIONS)
    for dlse in (lse.double(), lse[:, :, :4]):
        with pytest.raises(ValueError, match=r"^dlse has shape .*accepted: \(batch, num_heads, seqlen_q\)"):
            torch.ops.flash_attn_jit.backward(out, q, k, v, out, lse, dlse, [True] * 3, *NO_OPTIONS)
