"""Sinks, a learned logit of each head in its softmax, forward and backward, in the interpreter, against float64."""

import math

import pytest
import torch
from attention_reference import (
    NO_OPTIONS,
    attention,
    check_attention,
    check_gradients,
    check_varlen_attention,
    leaves,
    normal,
    normal_qkv,
    varlen_attention,
)

from flash_attn_jit import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)

SINKS = torch.tensor([0.5, -1.5, 3.0, 0.0])
STARTS_Q, STARTS_K = (torch.tensor(starts, dtype=torch.int32) for starts in ([0, 30, 30, 50], [0, 20, 45, 80]))
BACKWARD = torch.ops.flash_attn_jit.backward.default


def check_sinks(got, exact):
    """float32 sums of terms whose P and out were rounded to fp16 before."""
    assert got.dtype == torch.float32
    assert (got.double() - exact).abs().max().item() <= 2**-9 * exact.abs().max().item() + 2e-3


def exact_gradients(function, inputs, dout, dlse=None):
    """In float64; of softmax_lse's where it is finite."""
    inputs = leaves(*(x.double() for x in inputs))
    out, lse = function(*inputs)
    loss = (out * dout.double()).sum()
    if dlse is not None:
        loss = loss + (torch.where(lse == math.inf, 0.0, lse) * dlse.double()).sum()
    return torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("with_lse", [False, True], ids=["out", "out and softmax_lse"])
@pytest.mark.parametrize(
    "shape, options",
    [
        ((2, 70, 60, 4, 2, 64), {}),
        ((1, 65, 200, 4, 4, 64), {"causal": True}),
        ((1, 130, 65, 4, 1, 32), {"causal": True}),  # rows that see no key
        ((1, 150, 140, 4, 2, 128), {"causal": True}),
        ((1, 40, 90, 4, 2, 33), {"window_size": (9, 2)}),
        ((1, 40, 150, 4, 2, 64), {"softcap": 3.0, "softmax_scale": -0.3}),
    ],
    ids=str,
)
def test_out_and_gradients(shape, options, with_lse):
    q, k, v, sinks = leaves(*normal_qkv(*shape), SINKS)
    out, lse, _ = flash_attn_func(q, k, v, return_attn_probs=True, s_aux=sinks, **options)
    check_attention(out.detach(), lse.detach(), q.detach(), k.detach(), v.detach(), s_aux=SINKS, **options)
    dout, dlse = normal(*out.shape, seed=9), normal(*lse.shape, seed=7).float()
    outputs, given = ((out, lse), (dout, dlse)) if with_lse else ((out,), (dout,))
    *got, of_sinks = torch.autograd.grad(outputs, (q, k, v, sinks), given)
    *expected, expected_of_sinks = exact_gradients(
        lambda q, k, v, s: attention(q, k, v, s_aux=s, **options), (q, k, v, sinks), dout, dlse if with_lse else None
    )
    check_gradients(got, expected)
    check_sinks(of_sinks, expected_of_sinks)


def test_a_query_that_sees_no_key_has_its_sink():
    q, k, v, sinks = leaves(*normal_qkv(1, 40, 20, 4, 4, 64), SINKS)
    out, lse, _ = flash_attn_func(q, k, v, causal=True, return_attn_probs=True, s_aux=sinks)
    assert not out[:, :20].any() and torch.allclose(lse[0, :, :20], SINKS[:, None].expand(4, 20))
    dq, of_sinks = torch.autograd.grad(
        (out[:, :20], lse[:, :, :20]), (q, sinks), (out[:, :20] + 1, lse[:, :, :20] * 0 + 1)
    )
    assert not dq.any() and torch.allclose(of_sinks, torch.full((4,), 20.0))


@pytest.mark.parametrize("value", [-1e30, -200.0, 60.0, 300.0, 1e30])
def test_sinks_far_from_the_scores(value):
    q, k, v, sinks = leaves(*normal_qkv(1, 50, 40, 2, 1, 64), torch.tensor([value, 0.5]))
    out, lse, _ = flash_attn_func(q, k, v, causal=True, return_attn_probs=True, s_aux=sinks)
    check_attention(out.detach(), None, q.detach(), k.detach(), v.detach(), causal=True, s_aux=sinks.detach())
    expected = attention(q, k, v, causal=True, s_aux=sinks)[1]
    torch.testing.assert_close(lse.double(), expected, atol=2e-5, rtol=1e-5)
    dout = normal(*out.shape, seed=9)
    *got, of_sinks = torch.autograd.grad(out, (q, k, v, sinks), dout)
    *exact, exact_of_sinks = exact_gradients(
        lambda q, k, v, s: attention(q, k, v, causal=True, s_aux=s), (q, k, v, sinks), dout
    )
    check_gradients(got, exact)
    check_sinks(of_sinks, exact_of_sinks)


@pytest.mark.parametrize("shape", [(1, 50, 40, 2, 1, 64), (1, 2, 300, 8, 1, 64)], ids=["forward", "decode"])
def test_minus_infinity_is_no_sink(shape):
    q, k, v = normal_qkv(*shape)
    none = torch.full((q.shape[2],), -math.inf)
    arguments = {"causal": True, "return_attn_probs": True}
    for got, plain in zip(flash_attn_func(q, k, v, s_aux=none, **arguments), flash_attn_func(q, k, v, **arguments)):
        assert torch.equal(got, plain)
    q, k, v, none = leaves(q, k, v, none)
    dout = normal(*q.shape, seed=9)
    *got, of_sinks = torch.autograd.grad(flash_attn_func(q, k, v, causal=True, s_aux=none), (q, k, v, none), dout)
    for gradient, plain in zip(got, torch.autograd.grad(flash_attn_func(q, k, v, causal=True), (q, k, v), dout)):
        assert torch.equal(gradient, plain)
    assert not of_sinks.any()


def test_rows_without_keys_and_without_a_sink():
    q, k, v, none = leaves(*normal_qkv(1, 40, 20, 2, 2, 64), torch.full((2,), -math.inf))
    out, lse, _ = flash_attn_func(q, k, v, causal=True, return_attn_probs=True, s_aux=none)
    assert not out[:, :20].any() and (lse[..., :20] == math.inf).all()
    (of_sinks,) = torch.autograd.grad(lse, none, torch.full_like(lse, math.nan).where(lse == math.inf, 1.0))
    assert not of_sinks.any()


def test_float16():
    q, k, v, half, single = leaves(*normal_qkv(1, 30, 40, 4, 2, 64), SINKS.half(), SINKS)
    out = flash_attn_func(q, k, v, s_aux=half)
    assert torch.equal(out, flash_attn_func(q, k, v, s_aux=single))
    dout = normal(*out.shape, seed=9)
    (of_half,) = torch.autograd.grad(out, half, dout)
    (of_single,) = torch.autograd.grad(flash_attn_func(q, k, v, s_aux=single), single, dout)
    assert torch.equal(of_half, of_single.half())


@pytest.mark.parametrize("seqlen_k", [60, 200])
def test_sinks_alone_need_a_gradient(seqlen_k):
    q, k, v = normal_qkv(2, 30, seqlen_k, 4, 2, 64)
    (sinks,) = leaves(SINKS)
    out = flash_attn_func(q, k, v, s_aux=sinks)
    dout = normal(*out.shape, seed=9)
    (got,) = torch.autograd.grad(out, sinks, dout)
    expected = exact_gradients(lambda q, k, v, s: attention(q, k, v, s_aux=s), (q, k, v, sinks), dout)[3]
    check_sinks(got, expected)


@pytest.mark.parametrize("needed", [(0,), (1,), (0, 3), (2, 3)], ids=str)
def test_some_inputs_need_gradients(needed):
    inputs = [*normal_qkv(1, 20, 30, 4, 2, 64), SINKS.clone()]
    wanted = [inputs[i].requires_grad_() for i in needed]
    out = flash_attn_func(*inputs[:3], s_aux=inputs[3])
    dout = normal(*out.shape, seed=9)
    expected = exact_gradients(lambda q, k, v, s: attention(q, k, v, s_aux=s), inputs, dout)
    for i, got in zip(needed, torch.autograd.grad(out, wanted, dout)):
        check_sinks(got, expected[i]) if i == 3 else check_gradients([got], [expected[i]])


def test_varlen():
    q, k, v, sinks = leaves(normal(55, 4, 64, seed=1), normal(80, 2, 64, seed=2), normal(80, 2, 64, seed=3), SINKS)
    starts = STARTS_Q, STARTS_K
    out, lse, _ = flash_attn_varlen_func(
        q, k, v, *starts, 30, 35, causal=True, return_attn_probs=True, s_aux=sinks
    )  # 5 rows belong to no sequence
    own, options = q.detach()[:50], {"causal": True, "s_aux": SINKS}
    check_varlen_attention(out.detach()[:50], lse.detach()[:, :50], own, k.detach(), v.detach(), *starts, **options)
    dout, dlse = normal(*out.shape, seed=9), normal(*lse.shape, seed=7).float()
    dout[50:], dlse[:, 50:] = math.nan, math.nan
    *got, of_sinks = torch.autograd.grad((out, lse), (q, k, v, sinks), (dout, dlse))
    *expected, expected_of_sinks = exact_gradients(
        lambda q, k, v, s: varlen_attention(q, k, v, *starts, causal=True, s_aux=s),
        (own, k, v, sinks),
        dout[:50],
        dlse[:, :50],
    )
    check_gradients((got[0][:50], *got[1:]), expected)
    check_sinks(of_sinks, expected_of_sinks)


@pytest.mark.parametrize("lengths_k", [[0, 40, 0], [30, 0, 7]], ids=str)
def test_sequences_without_keys(lengths_k):
    """One kernel makes all gradients, and has no block that comes by such a sequence's rows."""
    starts_q = torch.tensor([0, 10, 30, 40], dtype=torch.int32)
    starts_k = torch.tensor([0, *lengths_k]).cumsum(0).int()
    keys = int(starts_k[-1])
    q, k, v, sinks = leaves(normal(40, 4, 64, seed=1), normal(keys, 4, 64, seed=2), normal(keys, 4, 64, seed=3), SINKS)
    out, lse, _ = flash_attn_varlen_func(q, k, v, starts_q, starts_k, 20, 40, return_attn_probs=True, s_aux=sinks)
    dout, dlse = normal(*out.shape, seed=9), normal(*lse.shape, seed=7).float()
    *got, of_sinks = torch.autograd.grad((out, lse), (q, k, v, sinks), (dout, dlse))
    *expected, expected_of_sinks = exact_gradients(
        lambda q, k, v, s: varlen_attention(q, k, v, starts_q, starts_k, s_aux=s), (q, k, v, sinks), dout, dlse
    )
    check_gradients(got, expected)
    check_sinks(of_sinks, expected_of_sinks)


def test_no_keys_and_no_queries():
    for shape in ((1, 20, 0, 4, 2, 64), (1, 0, 20, 4, 2, 64), (0, 20, 20, 4, 2, 64)):
        q, k, v, sinks = leaves(*normal_qkv(*shape), SINKS)
        out, lse, _ = flash_attn_func(q, k, v, return_attn_probs=True, s_aux=sinks)
        assert not out.any() and torch.allclose(lse, SINKS[None, :, None].expand(lse.shape))
        *got, of_sinks = torch.autograd.grad((out, lse), (q, k, v, sinks), (torch.ones_like(out), torch.ones_like(lse)))
        assert not any(gradient.any() for gradient in got)
        assert torch.equal(of_sinks, torch.full((4,), float(lse.numel() // 4)))


def test_packed_forms():
    qkv = normal(1, 30, 3, 4, 64, seed=1)
    starts = torch.tensor([0, 12, 30], dtype=torch.int32)
    dout = normal(1, 30, 4, 64, seed=9)

    def both(function, inputs, gradient):
        *inputs, sinks = leaves(*inputs, SINKS)
        out = function(*inputs, sinks)
        return [out, *torch.autograd.grad(out, (*inputs, sinks), gradient)]

    def check(packed, separate):
        assert torch.equal(packed[0], separate[0]) and torch.equal(packed[-1], separate[-1])
        parts = [part for x in packed[1:-1] for part in (x.unbind(-3) if x.dim() > packed[0].dim() else (x,))]
        assert all(torch.equal(*pair) for pair in zip(parts, separate[1:-1]))

    q, k, v = qkv.unbind(2)
    separate = both(lambda q, k, v, s: flash_attn_func(q, k, v, s_aux=s), (q, k, v), dout)
    check(both(lambda q, kv, s: flash_attn_kvpacked_func(q, kv, s_aux=s), (q, qkv[:, :, 1:]), dout), separate)
    check(both(lambda x, s: flash_attn_qkvpacked_func(x, s_aux=s), (qkv,), dout), separate)
    lengths = starts, starts, 18, 18
    q, k, v, dout = q[0], k[0], v[0], dout[0]
    separate = both(lambda q, k, v, s: flash_attn_varlen_func(q, k, v, *lengths, s_aux=s), (q, k, v), dout)
    packed = both(lambda q, kv, s: flash_attn_varlen_kvpacked_func(q, kv, *lengths, s_aux=s), (q, qkv[0, :, 1:]), dout)
    check(packed, separate)
    check(both(lambda x, s: flash_attn_varlen_qkvpacked_func(x, starts, 18, s_aux=s), (qkv[0],), dout), separate)


@pytest.mark.parametrize("num_splits", [0, 1, 2, 7])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window_size": (40, 0)}], ids=str)
def test_decode(options, num_splits):
    q, k, v = normal_qkv(2, 3, 500, 4, 2, 64)
    out, lse, _ = flash_attn_func(q, k, v, return_attn_probs=True, num_splits=num_splits, s_aux=SINKS, **options)
    check_attention(out, lse, q, k, v, s_aux=SINKS, **options)


@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("queries", [1, 300], ids=["decode", "forward"])
def test_a_cache(queries, num_splits):
    k_cache, v_cache = normal(2, 400, 2, 64, seed=2), normal(2, 400, 2, 64, seed=3)
    q, lengths = normal(2, queries, 4, 64, seed=1), torch.tensor([350, 90], dtype=torch.int32)
    out, lse = flash_attn_with_kvcache(
        q,
        k_cache,
        v_cache,
        cache_seqlens=lengths,
        causal=True,
        num_splits=num_splits,
        return_softmax_lse=True,
        s_aux=SINKS,
    )
    for b, length in enumerate(lengths.tolist()):  # the first queries of the second sequence may see no key
        rows, keys = slice(b, b + 1), (slice(b, b + 1), slice(0, length))
        check_attention(out[rows], lse[rows], q[rows], k_cache[keys], v_cache[keys], causal=True, s_aux=SINKS)


def test_pages_and_new_rows():
    k_pages, v_pages = normal(8, 16, 2, 64, seed=2), normal(8, 16, 2, 64, seed=3)
    table = torch.tensor([[3, 1, 6], [0, 7, 2]], dtype=torch.int32)
    lengths = torch.tensor([30, 17], dtype=torch.int32)
    q, k, v = normal_qkv(2, 2, 2, 4, 2, 64)
    out = flash_attn_with_kvcache(
        q, k_pages, v_pages, k, v, cache_seqlens=lengths, block_table=table, causal=True, s_aux=SINKS.half()
    )
    for b, length in enumerate(lengths.tolist()):
        keys, values = (pages[table[b].long()].flatten(0, 1)[None, : length + 2] for pages in (k_pages, v_pages))
        check_attention(out[b : b + 1], None, q[b : b + 1], keys, values, causal=True, s_aux=SINKS)


def loss(q, k, v, sinks):
    out, lse, _ = flash_attn_func(q, k, v, causal=True, return_attn_probs=True, s_aux=sinks)
    return out.float().square().sum() + lse.sin().sum()


@pytest.mark.parametrize("which", [slice(None), slice(3, 4)], ids=["all", "sinks"])
def test_compiled(which):
    inputs = [*normal_qkv(1, 20, 40, 4, 2, 64), SINKS.clone()]
    wanted = [x.requires_grad_() for x in inputs[which]]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(*inputs), wanted)
    for gradient, expected in zip(got, torch.autograd.grad(loss(*inputs), wanted)):
        assert torch.equal(gradient, expected)


def test_transforms():
    q, k, v = normal_qkv(3, 20, 40, 4, 2, 64)
    inputs = leaves(q, k, v, SINKS)
    expected = torch.autograd.grad(loss(*inputs), inputs)
    for got, gradient in zip(torch.func.grad(loss, (0, 1, 2, 3))(q, k, v, SINKS), expected):
        assert torch.equal(got, gradient)
    own = [torch.autograd.grad(loss(*(x[b : b + 1] for x in inputs[:3]), inputs[3]), inputs[3])[0] for b in range(3)]
    each = torch.func.vmap(torch.func.grad(loss, 3), (0, 0, 0, None))(*(x[:, None] for x in (q, k, v)), SINKS)
    torch.testing.assert_close(each, torch.stack(own), atol=1e-4, rtol=1e-4)


def test_opcheck():
    q, k, v, sinks = leaves(*normal_qkv(2, 20, 30, 4, 2, 64), SINKS)
    options = NO_OPTIONS._replace(s_aux=sinks)
    torch.library.opcheck(torch.ops.flash_attn_jit.forward.default, (q, k, v, *options))
    with torch.no_grad():
        out, lse = torch.ops.flash_attn_jit.forward(q, k, v, *options)
    q, k, v, sinks = (x.detach() for x in (q, k, v, sinks))
    options = options._replace(s_aux=sinks)
    dout = normal(*out.shape, seed=9)
    for wanted in ([True] * 5, [True] * 3, [False] * 4 + [True]):
        torch.library.opcheck(BACKWARD, (dout, q, k, v, out, lse, None, wanted, *options))


def test_twice_gives_the_same_bits():
    inputs = leaves(*normal_qkv(2, 30, 200, 4, 2, 64), SINKS)
    first = torch.autograd.grad(loss(*inputs), inputs)
    for a, b in zip(first, torch.autograd.grad(loss(*inputs), inputs)):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "sinks",
    [SINKS.double(), SINKS[:3], SINKS[None], torch.ones(8)[::2], torch.ones(4, dtype=torch.int32)],
    ids=lambda x: f"{x.dtype} {tuple(x.shape)}",
)
def test_sinks_that_do_not_fit_are_named(sinks):
    q, k, v = normal_qkv(1, 8, 8, 4, 2, 64)
    for inputs in ((q, k, v), leaves(q, k, v)):
        with pytest.raises(
            ValueError, match=r"^s_aux has .*accepted: None, or \(num_heads\), torch.float32, torch.float16 or"
        ):
            flash_attn_func(*inputs, s_aux=sinks)
    with pytest.raises(ValueError, match=r"^s_aux has"):
        flash_attn_with_kvcache(q, k, v, s_aux=sinks)


def test_sinks_of_another_kind_are_named():
    q, k, v = normal_qkv(1, 8, 8, 4, 2, 64)
    with pytest.raises(ValueError, match=r"^s_aux is "):
        flash_attn_func(q, k, v, s_aux=0.5)


def test_where_sinks_have_no_gradient():
    q, k, v = normal_qkv(1, 8, 8, 4, 2, 64)
    (sinks,) = leaves(SINKS)
    with pytest.raises(NotImplementedError, match=r"^s_aux requires a gradient"):
        flash_attn_with_kvcache(q, k, v, s_aux=sinks)
    with pytest.raises(NotImplementedError, match=r"^seqused_k comes with inputs that require a gradient"):
        flash_attn_func(q, k, v, s_aux=sinks, seqused_k=torch.tensor([5], dtype=torch.int32))
    with pytest.raises(NotImplementedError, match=r"^out comes with inputs that require a gradient"):
        flash_attn_func(q, k, v, s_aux=sinks, out=torch.empty_like(q))
    with torch.no_grad():
        expected = flash_attn_func(q, k, v, s_aux=SINKS)
        assert torch.equal(flash_attn_with_kvcache(q, k, v, s_aux=sinks), expected)


def test_forward_mode_is_refused():
    q, k, v = normal_qkv(1, 8, 8, 4, 2, 64)
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda s: flash_attn_func(q, k, v, s_aux=s), (SINKS,), (SINKS,))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(SINKS, SINKS)
        with pytest.raises(NotImplementedError, match=r"^s_aux carries a forward-mode tangent"):
            flash_attn_func(q, k, v, s_aux=dual)
