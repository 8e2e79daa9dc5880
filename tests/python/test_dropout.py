"""Dropout, forward and backward, in the interpreter, against float64. What is kept is seen from outside: where every
score is 0 and v tells its rows apart, out says which of them a query kept."""

import math

import pytest
import torch
import torch.nn.functional as F
from attention_reference import (
    _probabilities,
    attention,
    check_attention,
    check_gradients,
    error_bound,
    leaves,
    normal,
    normal_qkv,
)
from torch.utils.checkpoint import checkpoint

from flash_attn_jit import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    route_sdpa,
    sdpa,
)
from flash_attn_jit._options import Options

STARTS = torch.tensor([0, 30, 30, 75], dtype=torch.int32)


def steps_of(dropout_p):
    """The share that is kept."""
    return min(max(round((1 - dropout_p) * 2**16), 1), 2**16 - 1) / 2**16


def kept_pairs(q, k, dropout_p, seed=0):
    """What dropout multiplies the probabilities of a call by that is seeded so, (batch, heads, seqlen_q, seqlen_k)."""
    batch, seqlen_k, heads_k, head_dim = k.shape
    parts = []
    for first in range(0, seqlen_k, head_dim):
        rows = range(first, min(first + head_dim, seqlen_k))
        v = torch.zeros(batch, seqlen_k, heads_k, head_dim, dtype=torch.float16)
        for row in rows:
            v[:, row, :, row - first] = 1
        torch.manual_seed(seed)
        out = flash_attn_func(q.detach(), k.detach(), v, dropout_p, softmax_scale=0.0)
        parts.append((out[..., : len(rows)] != 0).permute(0, 2, 1, 3))
    return torch.cat(parts, -1).double() / steps_of(dropout_p)


def check(q, k, v, dropout_p, kept, **options):
    """Output and gradients of a call that is seeded by 0."""
    q, k, v = leaves(q, k, v)
    torch.manual_seed(0)
    out, lse, _ = flash_attn_func(q, k, v, dropout_p, return_attn_probs=True, **options)
    check_attention(out.detach(), lse.detach(), q.detach(), k.detach(), v.detach(), kept=kept, **options)
    dout = normal(*out.shape, seed=9)
    got = torch.autograd.grad(out, (q, k, v), dout)
    inputs = leaves(*(x.double() for x in (q, k, v)))
    exact, _ = attention(*inputs, kept=kept, **options)
    check_gradients(got, torch.autograd.grad(exact, inputs, dout.double()))


@pytest.mark.parametrize(
    "shape, dropout_p, options",
    [
        ((2, 70, 60, 4, 2, 64), 0.1, {}),
        ((1, 65, 200, 2, 2, 64), 0.5, {"causal": True}),
        ((1, 130, 65, 4, 1, 32), 0.3, {"causal": True}),  # rows that see no key
        ((1, 150, 140, 2, 1, 128), 0.1, {"causal": True}),
        ((1, 40, 90, 4, 2, 33), 0.9, {"window_size": (9, 2)}),
        ((1, 40, 150, 4, 2, 64), 0.2, {"softcap": 3.0, "softmax_scale": -0.3}),
        ((1, 60, 72, 4, 2, 64), 0.2, {"attn_bias": normal(4, 60, 72, seed=5)}),
        ((2, 60, 72, 4, 2, 64), 0.2, {"attn_bias": normal(2, 1, 1, 72, seed=5) > -1}),
        ((1, 60, 70, 4, 2, 64), 0.2, {"s_aux": torch.tensor([0.5, -1.5, 3.0, 0.0])}),
        ((1, 60, 70, 2, 2, 64), 0.2, {"alibi_slopes": torch.tensor([0.1, 0.3]), "causal": True}),
    ],
    ids=str,
)
def test_out_and_gradients(shape, dropout_p, options):
    q, k, v = normal_qkv(*shape)
    kept = kept_pairs(q, k, dropout_p)
    share = (kept > 0).double().mean().item()
    assert abs(share - (1 - dropout_p)) < 5 * math.sqrt(dropout_p * (1 - dropout_p) / kept.numel())
    check(q, k, v, dropout_p, kept, **options)


def test_one_query():
    q, k, v = normal_qkv(2, 1, 300, 4, 1, 64)
    kept = kept_pairs(q, k, 0.25)
    torch.manual_seed(0)
    out = flash_attn_func(q, k, v, 0.25, causal=True)
    assert (out.double() - attention(q, k, v, causal=True, kept=kept)[0]).abs().max() <= error_bound(
        q, k, v, causal=True, kept=kept
    )


def test_seeds_are_torchs():
    q, k, v = normal_qkv(1, 40, 50, 2, 2, 64)
    torch.manual_seed(3)
    first, second = flash_attn_func(q, k, v, 0.3), flash_attn_func(q, k, v, 0.3)
    torch.manual_seed(3)
    again = flash_attn_func(q, k, v, 0.3)
    assert torch.equal(first, again) and not torch.equal(first, second)
    state = torch.get_rng_state()
    flash_attn_func(q, k, v)
    assert torch.equal(state, torch.get_rng_state())  # without dropout nothing is drawn


def test_the_same_pairs_are_kept_whatever_else_the_call_asks():
    """Other kernels and other tiles: of other head dims, masks and lengths."""
    q, k, _ = normal_qkv(1, 50, 60, 2, 1, 64)
    kept = kept_pairs(q, k, 0.3)
    for other in (kept_pairs(q[..., :16], k[..., :16], 0.3), kept_pairs(q[..., :33], k[..., :33], 0.3)):
        assert torch.equal(kept, other)
    longer = kept_pairs(*normal_qkv(1, 130, 200, 2, 2, 64)[:2], 0.3)
    assert torch.equal(kept, longer[:, :, :50, :60])
    eye = torch.eye(60, 64, dtype=torch.float16)[None, :, None]
    torch.manual_seed(0)
    causal = flash_attn_func(q, k, eye, 0.3, softmax_scale=0.0, causal=True)[..., :60].permute(0, 2, 1, 3) != 0
    visible = torch.ones(50, 60, dtype=torch.bool).tril(10)
    assert torch.equal(causal, (kept > 0) & visible)


def test_packed_and_separate_tensors_are_alike():
    qkv = normal(1, 40, 3, 2, 64, seed=1).requires_grad_()
    q, k, v = qkv.unbind(2)
    dout = normal(1, 40, 2, 64, seed=2)
    results = []
    for call in (
        lambda: flash_attn_func(q, k, v, 0.3),
        lambda: flash_attn_kvpacked_func(q, qkv[:, :, 1:], 0.3),
        lambda: flash_attn_qkvpacked_func(qkv, 0.3),
        lambda: sdpa(*(x.transpose(1, 2) for x in (q, k, v)), dropout_p=0.3).transpose(1, 2),
    ):
        torch.manual_seed(5)
        out = call()
        results.append((out, torch.autograd.grad(out, qkv, dout)[0]))
    for out, gradient in results[1:]:
        assert torch.equal(out, results[0][0]) and torch.equal(gradient, results[0][1])


def test_sequences_count_their_own_rows():
    """A sequence is a batch entry: rows and columns are counted within it."""
    qkv = normal(75, 3, 2, 64, seed=1).requires_grad_()
    q, k, v = qkv.unbind(1)
    lengths = (STARTS, STARTS, 45, 45)
    torch.manual_seed(5)
    out = flash_attn_varlen_func(q, k, v, *lengths, 0.3, causal=True)
    padded = torch.zeros(3, 45, 3, 2, 64, dtype=torch.float16)
    padded[0, :30], padded[2, :45] = qkv[:30].detach(), qkv[30:].detach()
    torch.manual_seed(5)
    expected = flash_attn_qkvpacked_func(padded, 0.3, causal=True)
    assert torch.equal(out[:30], expected[0, :30]) and torch.equal(out[30:], expected[2])
    dout = normal(75, 2, 64, seed=2)
    (gradient,) = torch.autograd.grad(out, qkv, dout)
    for call in (
        lambda: flash_attn_varlen_kvpacked_func(q, qkv[:, 1:], *lengths, 0.3, causal=True),
        lambda: flash_attn_varlen_qkvpacked_func(qkv, STARTS, 45, 0.3, causal=True),
    ):
        torch.manual_seed(5)
        again = call()
        assert torch.equal(again, out) and torch.equal(torch.autograd.grad(again, qkv, dout)[0], gradient)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpoint_keeps_the_same(use_reentrant):
    inputs = leaves(*normal_qkv(1, 40, 50, 2, 2, 64))
    dout = normal(1, 40, 2, 64, seed=2)

    def layer(q, k, v):
        return flash_attn_func(q, k, v, 0.3)

    torch.manual_seed(5)
    expected = torch.autograd.grad(layer(*inputs), inputs, dout)
    torch.manual_seed(5)
    out = checkpoint(layer, *inputs, use_reentrant=use_reentrant)
    torch.manual_seed(6)  # what was drawn since
    out.backward(dout)
    for leaf, gradient in zip(inputs, expected):
        assert torch.equal(leaf.grad, gradient)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled(backend):
    inputs = leaves(*normal_qkv(1, 40, 50, 2, 2, 64))

    def step(q, k, v):
        return flash_attn_func(q, k, v, 0.3)

    compiled = torch.compile(step, backend=backend, fullgraph=True)
    eye = torch.eye(50, 64, dtype=torch.float16)[None, :, None].expand(1, 50, 2, 64)
    zero = torch.zeros(1, 40, 2, 64, dtype=torch.float16)
    first, second = compiled(zero, inputs[1], eye), compiled(zero, inputs[1], eye)
    share = (first[..., :50] != 0).double().mean().item()
    assert abs(share - 0.7) < 5 * math.sqrt(0.3 * 0.7 / 4000)
    assert not torch.equal(first, second)  # every run draws
    out = compiled(*inputs)
    got = torch.autograd.grad(out, inputs, torch.ones_like(out))
    assert all(gradient.isfinite().all() for gradient in got)
    # Each row of v goes to the queries that keep it: dv says what out says.
    torch.testing.assert_close((got[2] * inputs[2]).float().sum(), out.float().sum(), atol=0.5, rtol=1e-2)


def test_routed_calls():
    layer = torch.nn.TransformerEncoderLayer(32, 2, 32, dropout=0.2, batch_first=True).half().train()
    x = normal(1, 20, 32, seed=3)
    with route_sdpa() as router:
        torch.manual_seed(1)
        first = layer(x)
        torch.manual_seed(1)
        again = layer(x)
    assert router.counts == {"flash_attn_jit": 2, "torch": 0} and torch.equal(first, again)
    q, k, v = (x.transpose(1, 2) for x in normal_qkv(1, 40, 50, 2, 2, 64))
    with route_sdpa() as router:
        torch.manual_seed(1)
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=0.4)
    torch.manual_seed(1)
    assert router.counts == {"flash_attn_jit": 1, "torch": 0} and torch.equal(out, sdpa(q, k, v, dropout_p=0.4))


@pytest.mark.parametrize(
    "seed, words",
    [
        (None, "^dropout_seed is None"),
        (torch.zeros(3, dtype=torch.int32), r"^dropout_seed has shape \(3,\)"),
        (torch.zeros(2, dtype=torch.int64), "^dropout_seed .*int64"),
    ],
)
def test_seeds_that_do_not_fit(seed, words):
    q, k, v = normal_qkv(1, 8, 8, 1, 1, 16)
    with pytest.raises(ValueError, match=words):
        torch.ops.flash_attn_jit.forward(q, k, v, *Options(dropout_p=0.5, dropout_seed=seed))


def test_vmap_asks_which_randomness():
    q, k, v = (x[:, None] for x in normal_qkv(3, 8, 8, 1, 1, 16))
    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(lambda *x: flash_attn_func(*x, 0.5))(q, k, v)
    kept = [
        torch.vmap(lambda *x: flash_attn_func(*x, 0.5, softmax_scale=0.0), randomness=how)(q, k, torch.ones_like(v))
        for how in ("same", "different")
    ]
    assert torch.equal(kept[0][0], kept[0][1]) and not torch.equal(kept[1][0], kept[1][1])


@pytest.mark.parametrize(
    "shape, options",
    [
        ((2, 30, 40, 4, 2, 64), {}),
        ((1, 70, 50, 4, 4, 32), {"causal": True}),
        ((1, 30, 40, 4, 2, 32), {"window_size": (5, 3), "softcap": 4.0}),
        ((1, 30, 40, 4, 2, 32), {"alibi_slopes": torch.tensor([0.1, 0.2, 0.3, 0.4]), "s_aux": torch.arange(4.0)}),
        ((2, 30, 40, 4, 2, 32), {"attn_bias": normal(1, 4, 1, 40, seed=3)}),
        ((2, 30, 40, 4, 2, 32), {"attn_bias": normal(30, 40, seed=3) > 0}),
        ((2, 30, 1, 4, 2, 32), {"alibi_slopes": torch.tensor([0.1, 0.2, 0.3, 0.4]), "s_aux": torch.arange(4.0)}),
        ((2, 1, 1, 4, 2, 32), {}),
        ((1, 3, 0, 2, 2, 32), {}),
    ],
    ids=str,
)
def test_s_dmask(shape, options):
    q, k, v = normal_qkv(*shape)
    kept = kept_pairs(q, k, 0.4) > 0 if k.shape[1] else torch.zeros(1, 2, 3, 0, dtype=torch.bool)
    torch.manual_seed(0)
    s_dmask = flash_attn_func(q, k, v, 0.4, return_attn_probs=True, **options)[2]
    p, row_sum, _ = _probabilities(q, k, torch.float64, **options)
    p = (p / torch.where(row_sum == 0, 1.0, row_sum))[..., : k.shape[1]]
    assert s_dmask.shape == p.shape and s_dmask.dtype == torch.float16
    torch.testing.assert_close(s_dmask.abs().double(), p, atol=1e-4, rtol=2e-3)
    assert torch.equal((s_dmask < 0), ~kept & (p > 0))


def test_s_dmask_of_sequences():
    qkv = normal(75, 3, 2, 64, seed=1)
    torch.manual_seed(0)
    _, _, s_dmask = flash_attn_varlen_qkvpacked_func(qkv, STARTS, 45, 0.3, causal=True, return_attn_probs=True)
    padded = torch.zeros(3, 45, 3, 2, 64, dtype=torch.float16)
    padded[0, :30], padded[2, :45] = qkv[:30], qkv[30:]
    torch.manual_seed(0)
    _, _, expected = flash_attn_qkvpacked_func(padded, 0.3, causal=True, return_attn_probs=True)
    torch.manual_seed(0)
    _, _, of_kv = flash_attn_kvpacked_func(padded[:, :, 0], padded[:, :, 1:], 0.3, causal=True, return_attn_probs=True)
    assert torch.equal(expected, of_kv)
    assert torch.equal(s_dmask[0, :, :30, :30], expected[0, :, :30, :30]) and torch.equal(s_dmask[2], expected[2])
    assert not s_dmask[1].any() and not s_dmask[0, :, 30:].any() and not s_dmask[0, ..., 30:].any()


def test_a_bias_has_its_gradient():
    q, k, v = normal_qkv(1, 60, 72, 4, 2, 64)
    kept = kept_pairs(q, k, 0.2)
    for shape in ((1, 4, 60, 72), (4, 1, 72), (1, 1, 60, 1)):
        bias = normal(*shape, seed=5).float().requires_grad_()
        torch.manual_seed(0)
        out = flash_attn_func(q, k, v, 0.2, attn_bias=bias)
        dout = normal(*out.shape, seed=9)
        (got,) = torch.autograd.grad(out, bias, dout)
        exact = bias.detach().double().requires_grad_()
        (expected,) = torch.autograd.grad(attention(q, k, v, attn_bias=exact, kept=kept)[0], exact, dout.double())
        assert (got.double() - expected).abs().max() <= 4e-3 * expected.abs().max() + 1e-3


def test_s_dmask_shows_nan():
    q, k, v = normal_qkv(1, 30, 40, 2, 2, 16)
    q[0, 3] = math.nan
    s_dmask = flash_attn_func(q, k, v, 0.5, return_attn_probs=True)[2]
    assert s_dmask[:, :, 3].isnan().all() and s_dmask.isnan().sum() == 2 * 40
    starts = torch.tensor([0, 10, 30], dtype=torch.int32), torch.tensor([0, 15, 40], dtype=torch.int32)
    rows = (x.squeeze(0) for x in (q, k, v))
    s_dmask = flash_attn_varlen_func(*rows, *starts, 20, 25, 0.5, return_attn_probs=True)[2]
    assert s_dmask[0, :, 3].isnan().all() and s_dmask.isnan().sum() == 2 * 25


def test_s_dmask_of_a_cache_is_refused_before_anything_runs():
    q, k, v = normal_qkv(2, 8, 8, 2, 2, 16)
    out = torch.full_like(q, 7)
    used = torch.tensor([3, 8], dtype=torch.int32)
    with pytest.raises(NotImplementedError, match=r"^return_attn_probs is True with dropout_p"):
        flash_attn_func(q, k, v, 0.1, return_attn_probs=True, seqused_k=used, out=out)
    assert (out == 7).all()
