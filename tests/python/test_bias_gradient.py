"""The gradient of attn_bias, in the interpreter, against float64."""

import itertools
import math

import pytest
import torch
from attention_reference import NO_OPTIONS, attention, check_gradients, leaves, normal, normal_qkv, varlen_attention
from test_bias import BROADCASTS, INF, LAYOUTS, SLOPES, bias_of, heads_first, hide_rows, starts, values_of, whole_of
from torch.utils.checkpoint import checkpoint

from flash_attn_jit import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
    route_sdpa,
    sdpa,
)
from flash_attn_jit._bias_gradient import room_for_sums

DTYPES = [torch.float16, torch.float32]
SINKS = torch.tensor([0.5, -1.5, 3.0, 0.0])
BACKWARD = torch.ops.flash_attn_jit.backward.default


def check_bias_gradient(got, exact, bias):
    """Sums in float32, of terms for which out was rounded to fp16 before."""
    assert got.shape == bias.shape and got.dtype == bias.dtype
    if got.numel():
        bound = 4 * 2**-11 * exact.abs().max().item() + 2e-3
        assert (got.double() - exact).abs().max().item() <= bound


def exact_gradients(function, inputs, dout, dlse=None):
    """In float64, of dout * out + dlse * softmax_lse where that is finite."""
    inputs = leaves(*(x.double() for x in inputs))
    out, lse = function(*inputs)
    loss = (out * dout.double()).sum()
    if dlse is not None:
        loss = loss + (torch.where(lse == INF, 0.0, lse) * dlse.double()).sum()
    return torch.autograd.grad(loss, inputs, materialize_grads=True)


def check(q, k, v, bias, with_lse=False, with_others=False, s_aux=None, **options):
    """The gradient of attn_bias, and those of q, k and v where they are asked for too."""
    inputs = [*(leaves(q, k, v) if with_others else (q, k, v)), *leaves(bias)]
    out, lse, _ = flash_attn_func(*inputs[:3], attn_bias=inputs[3], s_aux=s_aux, return_attn_probs=True, **options)
    dout, dlse = normal(*out.shape, seed=9, device=str(q.device)), None
    if with_lse:
        dlse = torch.where(lse.detach() == INF, math.nan, normal(*lse.shape, seed=7, device=str(q.device)).float())
    outputs, given = ((out, lse), (dout, dlse)) if with_lse else ((out,), (dout,))
    *got, of_bias = torch.autograd.grad(outputs, inputs if with_others else inputs[3:], given)
    *expected, exact_of_bias = exact_gradients(
        lambda q, k, v, bias: attention(q, k, v, attn_bias=bias, s_aux=s_aux, **options),
        inputs,
        dout,
        None if dlse is None else dlse.nan_to_num(),
    )
    if with_others:
        check_gradients(got, expected)
    check_bias_gradient(of_bias, exact_of_bias, bias)
    return of_bias


# Every broadcast, dtypes and layouts in turn: what is read how has its grid in test_bias.py.
GRID = [
    (DTYPES[(number + sum(ones)) % 2], LAYOUTS[number % len(LAYOUTS)], ones) for number, ones in enumerate(BROADCASTS)
]


@pytest.mark.parametrize(("dtype", "layout", "ones"), GRID, ids=str)
def test_every_shape(dtype, layout, ones):
    q, k, v = normal_qkv(2, 37, 55 if layout == "odd width" else 56, 4, 2, 32)
    bias = bias_of(whole_of(q, k), dtype, layout, ones)
    of_bias = check(q, k, v, bias, with_lse=bool(sum(ones) % 2))
    assert of_bias.is_contiguous() and not of_bias[bias == -INF].any()


@pytest.mark.parametrize("shape", [(72,), (1,), (45, 72), (45, 1), (4, 45, 72), (4, 1, 72), (4, 1, 1)], ids=str)
def test_fewer_dimensions(shape):
    q, k, v = normal_qkv(2, 45, 72, 4, 2, 32)
    check(q, k, v, values_of(shape, torch.float16).nan_to_num(neginf=-3), with_lse=True)


WITH_OTHERS = [
    (torch.float16, {"causal": True, "softcap": 3.0}),
    (torch.float32, {"window_size": (20, 9), "alibi_slopes": SLOPES}),
    (torch.float16, {"causal": True, "s_aux": SINKS}),
    (torch.float32, {"softcap": 3.0, "alibi_slopes": SLOPES, "softmax_scale": -0.3}),
    (torch.float32, {"window_size": (9, -1), "s_aux": SINKS}),
]


@pytest.mark.parametrize(("number", "dtype", "options"), [(i, *each) for i, each in enumerate(WITH_OTHERS)], ids=str)
def test_with_other_options(number, dtype, options):
    q, k, v = normal_qkv(2, *((34, 56), (56, 32))[number % 2], 4, 2, 32)
    ones = (number % 2 == 0, number % 3 == 0, number == 3, False)
    bias = bias_of(whole_of(q, k), dtype, ones=ones, seed=number)
    check(q, k, v, bias, with_lse=number > 1, with_others=True, **options)


@pytest.mark.parametrize("head_dim", [1, 128, 256])
def test_head_dims(head_dim):
    q, k, v = normal_qkv(1, 70, 150, 2, 1, head_dim)
    check(q, k, v, bias_of(whole_of(q, k), torch.float16, ones=(True, True, False, False)))


@pytest.mark.parametrize("ones", [(True, False, True, True), (False, True, False, True)], ids=str)
def test_one_number_for_all_keys_beside_a_sink(ones):
    q, k, v = normal_qkv(2, 37, 20, 4, 2, 32)
    check(q, k, v, bias_of(whole_of(q, k), torch.float32, ones=ones), causal=True, s_aux=SINKS, with_lse=True)


def test_rows_that_see_no_key():
    q, k, v = normal_qkv(2, 45, 72, 4, 2, 32)
    hidden = [3, 17, 18, 19]
    for dtype, number in ((torch.float16, -INF), (torch.float32, -INF), (torch.float32, torch.finfo().min)):
        (bias,) = leaves(hide_rows(bias_of(whole_of(q, k), dtype), number))
        out, lse, _ = flash_attn_func(q, k, v, attn_bias=bias, return_attn_probs=True)
        (of_bias,) = torch.autograd.grad((out, lse), bias, (normal(*out.shape, seed=9), torch.ones_like(lse)))
        assert of_bias.isfinite().all() and of_bias.any() and not of_bias[:, :, hidden].any()
    (bias,) = leaves(torch.full((45, 1), torch.finfo().min))
    lse = flash_attn_func(q, k, v, attn_bias=bias, return_attn_probs=True)[1]
    assert not torch.autograd.grad(lse.sum(), bias)[0].any()


VARLEN = [
    (torch.float16, "at once", (False, False, False, False), {"causal": True}),
    (torch.float32, "odd width", (True, False, False, False), {}),
    (torch.float32, "at once", (False, True, True, False), {"window_size": (12, 4)}),
    (torch.float16, "transposed", (True, True, False, False), {}),
    (torch.float16, "offset storage", (False, False, False, True), {}),
]


@pytest.mark.parametrize(("dtype", "layout", "ones", "options"), VARLEN, ids=str)
def test_varlen(dtype, layout, ones, options):
    lengths_q, lengths_k = [30, 0, 1, 45], [50, 10, 71 if layout == "odd width" else 72, 33]
    cu, longest = (starts(*lengths_q), starts(*lengths_k)), (max(lengths_q), max(lengths_k))
    q = normal(sum(lengths_q) + 3, 4, 32, seed=1)  # 3 rows belong to no sequence
    k, v = (normal(sum(lengths_k), 2, 32, seed=seed) for seed in (2, 3))
    (bias,) = leaves(bias_of((4, 4, *longest), dtype, layout, ones))
    out, lse, _ = flash_attn_varlen_func(q, k, v, *cu, *longest, attn_bias=bias, return_attn_probs=True, **options)
    dout, dlse = normal(*out.shape, seed=9), normal(*lse.shape, seed=7).float()
    dout[-3:], dlse[:, -3:] = math.nan, math.nan
    (of_bias,) = torch.autograd.grad((out, lse), bias, (dout, dlse))
    exact = exact_gradients(
        lambda q, k, v, bias: varlen_attention(q, k, v, *cu, attn_bias=bias, **options),
        (q[:-3], k, v, bias),
        dout[:-3],
        dlse[:, :-3],
    )[3]
    check_bias_gradient(of_bias, exact, bias)


def test_packed_tensors():
    """The bits of the separate ones."""
    qkv, bias = normal(2, 45, 3, 4, 32, seed=1), values_of((4, 45, 45), torch.float16)
    dout, cu = normal(2, 45, 4, 32, seed=9), starts(45, 45)

    def of_bias(function, *inputs):
        *inputs, own = leaves(*inputs, bias)
        out = function(*inputs, attn_bias=own)
        return torch.autograd.grad(out, (own, *inputs), dout.reshape(out.shape))[0]

    def varlen(function, cu, longest):
        return lambda *inputs, **options: function(*inputs, *cu, *longest, **options)

    expected = of_bias(flash_attn_func, *qkv.unbind(2))
    assert torch.equal(of_bias(flash_attn_kvpacked_func, qkv[:, :, 0], qkv[:, :, 1:]), expected)
    assert torch.equal(of_bias(flash_attn_qkvpacked_func, qkv), expected)
    rows = qkv.flatten(0, 1)
    expected = of_bias(varlen(flash_attn_varlen_func, (cu, cu), (45, 45)), *rows.unbind(1))
    kvpacked = varlen(flash_attn_varlen_kvpacked_func, (cu, cu), (45, 45))
    assert torch.equal(of_bias(kvpacked, rows[:, 0], rows[:, 1:]), expected)
    assert torch.equal(of_bias(varlen(flash_attn_varlen_qkvpacked_func, (cu,), (45,)), rows), expected)


def test_a_bias_that_is_expanded():
    q, k, v = normal_qkv(2, 45, 72, 4, 2, 32)
    (bias,) = leaves(values_of((2, 1, 1, 72), torch.float32))
    dout = normal(*q.shape, seed=9)
    expanded = bias.expand(2, 4, 45, 72)
    out = flash_attn_func(q, k, v, attn_bias=expanded)
    of_expanded, of_bias = torch.autograd.grad(out, (expanded, bias), dout)
    exact = exact_gradients(lambda q, k, v, bias: attention(q, k, v, attn_bias=bias), (q, k, v, bias), dout)[3]
    check_bias_gradient(of_bias, exact, bias)
    assert torch.equal(of_expanded.sum((1, 2), keepdim=True), of_bias)


def test_one_bias_of_several_layers():
    """As relative positions make them: what the layers ask of it is added by autograd."""
    q, k, v = normal_qkv(2, 40, 40, 4, 4, 32)
    (table,) = leaves(normal(4, 79, seed=5))
    places = torch.arange(40)[:, None] - torch.arange(40) + 39

    def layers(attend, q, k, v, table):
        bias = table[:, places]
        hidden = attend(q, k, v, bias)
        return attend(hidden, hidden, v, bias / 2)

    dout = normal(*q.shape, seed=9)
    out = layers(lambda q, k, v, bias: flash_attn_func(q, k, v, attn_bias=bias), q, k, v, table)
    (got,) = torch.autograd.grad(out, table, dout)
    exact = exact_gradients(
        lambda *inputs: (layers(lambda q, k, v, bias: attention(q, k, v, attn_bias=bias)[0], *inputs), None),
        (q, k, v, table),
        dout,
    )[3]
    assert (got - exact).abs().max() <= 2e-2 * exact.abs().max()  # the layer between is rounded to fp16


@pytest.mark.parametrize("needed", [(3,), (0, 3), (0, 1, 2)], ids=str)
def test_some_inputs_need_gradients(needed):
    q, k, v = normal_qkv(2, 20, 150, 4, 2, 32)
    inputs = [q, k, v, values_of((4, 20, 150), torch.float16)]
    dout = normal(*q.shape, seed=9)

    def run(places):
        own = [t.detach().clone().requires_grad_(i in places) for i, t in enumerate(inputs)]
        out = flash_attn_func(*own[:3], attn_bias=own[3])
        return torch.autograd.grad(out, [own[i] for i in places], dout)

    whole = run((0, 1, 2, 3))
    assert all(torch.equal(got, whole[i]) for i, got in zip(needed, run(needed)))


@pytest.mark.parametrize("ones", [(True, True, False, False), (True, True, True, False)], ids=str)
def test_twice_gives_the_same_bits(ones):
    q, k, v = normal_qkv(3, 70, 72, 4, 2, 32)
    (bias,) = leaves(bias_of(whole_of(q, k), torch.float32, ones=ones))
    dout = normal(*q.shape, seed=9)
    once, again = (torch.autograd.grad(flash_attn_func(q, k, v, attn_bias=bias), bias, dout)[0] for _ in range(2))
    assert torch.equal(once, again)


def test_what_is_allocated():
    """Of what grows with seqlen_q x seqlen_k nothing but the gradient, and that only where attn_bias does."""

    def room(shape, seqlen=16384, batch=8, heads=16, dtype=torch.float16):
        q = torch.empty(batch, seqlen, heads, 64, device="meta")
        return room_for_sums(torch.empty(shape, dtype=dtype, device="meta"), q, q, NO_OPTIONS)

    whole = room((1, 16, 16384, 16384))
    assert whole.shape == (1, 16, 16384, 16384) and whole.dtype is torch.float16
    assert room((16384, 16384)).shape == (1, 1, 16384, 16384)
    keys = room((8, 1, 1, 16384))
    assert keys.shape == (8, 16, 1, 16384) and keys.dtype is torch.float32
    for seqlen, heads in itertools.product((16, 64, 300, 1000, 5000), (1, 3, 40)):
        parts = room((seqlen, seqlen), seqlen=seqlen, heads=heads)
        assert parts.shape[:2] == (1, 1) or parts.numel() <= 160 * 64 * 64
    assert room((64, 64), seqlen=64).shape == (8, 16, 64, 64)


def test_nothing_to_attend_to():
    for shape in ((1, 20, 0, 2, 2, 32), (1, 0, 20, 2, 2, 32), (0, 20, 24, 2, 2, 32)):
        q, k, v = normal_qkv(*shape)
        for ones in ((True, True, False, False), (True, True, True, False), (True,) * 4):
            (bias,) = leaves(torch.ones([1 if one else n for n, one in zip(whole_of(q, k), ones)]))
            out = flash_attn_func(q, k, v, attn_bias=bias)
            (of_bias,) = torch.autograd.grad(out.sum(), bias)
            assert of_bias.shape == bias.shape and not of_bias.any()


# ---- PyTorch's function ----


@pytest.mark.parametrize(
    "function, batch, shape",
    [
        ("sdpa", (2,), (4, 45, 72)),
        ("routed", (2,), (2, 1, 1, 72)),
        ("sdpa", (2, 2), (2, 2, 4, 45, 72)),
        ("routed", (), (45, 1)),
    ],
    ids=str,
)
def test_sdpa(function, batch, shape):
    inputs = leaves(*heads_first(*batch, 4, 45, 32, seqlen_k=72, heads_k=4), values_of(shape, torch.float16))
    with route_sdpa() as router:
        attend = sdpa if function == "sdpa" else torch.nn.functional.scaled_dot_product_attention
        out = attend(*inputs[:3], attn_mask=inputs[3])
    assert router.counts == {"flash_attn_jit": int(function == "routed"), "torch": 0}, router
    dout = normal(*out.shape, seed=9)
    *got, of_mask = torch.autograd.grad(out, inputs, dout)
    exact = leaves(*(t.double() for t in inputs))
    expected = torch.nn.functional.scaled_dot_product_attention(*exact[:3], attn_mask=exact[3])
    *expected, exact_of_mask = torch.autograd.grad(expected, exact, dout.double())
    check_gradients(got, expected)
    check_bias_gradient(of_mask, exact_of_mask.nan_to_num(), inputs[3])


# ---- graphs, checkpoints, transforms ----


def loss(q, k, v, bias):
    out, lse, _ = flash_attn_func(q, k, v, attn_bias=bias, causal=True, return_attn_probs=True)
    return out.float().square().sum() + torch.where(lse == INF, 0.0, lse).sin().sum()


@pytest.mark.parametrize(("which", "shape"), [(slice(None), (4, 20, 40)), (slice(3, 4), (2, 1, 1, 40))], ids=str)
def test_compiled(which, shape):
    torch.compiler.reset()
    inputs = [*normal_qkv(2, 20, 40, 4, 2, 32), values_of(shape, torch.float16)]
    wanted = [x.requires_grad_() for x in inputs[which]]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(*inputs), wanted)
    for gradient, expected in zip(got, torch.autograd.grad(loss(*inputs), wanted)):
        assert torch.equal(gradient, expected)


def test_a_checkpoint():
    inputs = leaves(*normal_qkv(2, 20, 40, 4, 2, 32), values_of((4, 20, 40), torch.float16))
    recomputed = torch.autograd.grad(checkpoint(loss, *inputs, use_reentrant=False), inputs)
    assert all(torch.equal(*pair) for pair in zip(recomputed, torch.autograd.grad(loss(*inputs), inputs)))


def test_transforms():
    q, k, v = normal_qkv(3, 20, 40, 4, 2, 32)
    bias = values_of((4, 20, 40), torch.float32)
    inputs = leaves(q, k, v, bias)
    expected = torch.autograd.grad(loss(*inputs), inputs)
    for got, gradient in zip(torch.func.grad(loss, (0, 1, 2, 3))(q, k, v, bias), expected):
        assert torch.equal(got, gradient)
    each = torch.func.vmap(torch.func.grad(loss, 3), (0, 0, 0, None))(*(x[:, None] for x in (q, k, v)), bias)
    torch.testing.assert_close(each.sum(0), expected[3], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shape", [(1, 30), (4, 20, 1)], ids=str)
def test_opcheck(shape):
    q, k, v, bias = leaves(*normal_qkv(2, 20, 30, 4, 2, 32), values_of(shape, torch.float32))
    torch.library.opcheck(torch.ops.flash_attn_jit.forward.default, (q, k, v, *NO_OPTIONS._replace(attn_bias=bias)))
    q, k, v, bias = (x.detach() for x in (q, k, v, bias))
    options = NO_OPTIONS._replace(attn_bias=bias)
    out, lse = torch.ops.flash_attn_jit.forward(q, k, v, *options)
    dout = normal(*out.shape, seed=9)
    torch.library.opcheck(BACKWARD, (dout, q, k, v, out, lse, None, [False] * 3 + [True], *options))


def test_a_mask_of_bools_has_none():
    q, k, v = normal_qkv(1, 20, 30, 2, 2, 32)
    options = NO_OPTIONS._replace(attn_bias=torch.ones(20, 30, dtype=torch.bool))
    out, lse = torch.ops.flash_attn_jit.forward(q, k, v, *options)
    assert BACKWARD(out, q, k, v, out, lse, None, [True] * 4, *options)[3].numel() == 0


# ---- what is refused ----


def test_where_it_has_no_gradient():
    q, k, v = normal_qkv(1, 8, 8, 4, 2, 32)
    (bias,) = leaves(torch.zeros(8, 8))
    with pytest.raises(NotImplementedError, match=r"^attn_bias requires a gradient.*accepted: attn_bias.detach\(\)"):
        flash_attn_with_kvcache(q, k, v, attn_bias=bias)
    with pytest.raises(NotImplementedError, match=r"^seqused_k comes with inputs that require a gradient"):
        flash_attn_func(q, k, v, attn_bias=bias, seqused_k=torch.tensor([5], dtype=torch.int32))
    with pytest.raises(NotImplementedError, match=r"^out comes with inputs that require a gradient"):
        flash_attn_func(q, k, v, attn_bias=bias, out=torch.empty_like(q))
    with torch.no_grad():
        expected = flash_attn_func(q, k, v, attn_bias=bias.detach())
        assert torch.equal(flash_attn_with_kvcache(q, k, v, attn_bias=bias), expected)


def test_further_derivatives_are_refused():
    q, k, v = normal_qkv(1, 8, 8, 4, 2, 32)
    (bias,) = leaves(torch.zeros(8, 8))
    with pytest.raises(NotImplementedError, match="create_graph=True"):
        torch.autograd.grad(flash_attn_func(q, k, v, attn_bias=bias).sum(), bias, create_graph=True)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(bias.detach(), torch.ones(8, 8))
        with pytest.raises(NotImplementedError, match=r"^attn_bias carries a forward-mode tangent"):
            flash_attn_func(q, k, v, attn_bias=dual)
