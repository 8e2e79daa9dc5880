"""integrations.torch_attention: varlen_attn and the operators behind it, by torch's registry of flash attention."""

import importlib

import pytest
import torch
import torch.nn.attention
from attention_reference import (
    attention,
    check_attention,
    check_varlen_attention,
    exact_gradients,
    exact_varlen_gradients,
    normal,
)
from conftest import needs_torch

from flash_attn_jit import flash_attn_varlen_func
from flash_attn_jit.integrations import torch_attention

LENGTHS_Q, LENGTHS_K = (torch.tensor(x, dtype=torch.int32) for x in ([0, 5, 5, 17], [0, 9, 12, 24]))
aten = torch.ops.aten


@pytest.fixture
def counts():
    needs_torch("2.11", "torch.nn.attention has a registry of implementations")
    before = dump()
    counts = torch_attention.register()
    counts.reset()
    yield counts
    torch.nn.attention.restore_flash_attention_impl(_raise_warn=False)
    assert dump() == before


def dump():
    names = "_flash_attention_forward _flash_attention_backward _scaled_dot_product_flash_attention".split()
    return [torch._C._dispatch_dump_table(f"aten::{name}") for name in names]


def varlen():
    """Which torch does not import itself, and older ones do not have."""
    return importlib.import_module("torch.nn.attention.varlen")


def rows(heads_k=2, head_dim=32):
    """query, key, value and out's gradient"""
    shape_k = 24, heads_k, head_dim
    q, dout = normal(17, 2, head_dim, seed=1), normal(17, 2, head_dim, seed=2)
    return q, normal(*shape_k, seed=3), normal(*shape_k, seed=4), dout


def leaves(*tensors):
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


def check_gradients(found, exact):
    for got, wanted in zip(found, exact):
        torch.testing.assert_close(got.double(), wanted, atol=1e-2, rtol=1e-2)


# ---- varlen_attn


@pytest.mark.parametrize("heads_k", [1, 2])
@pytest.mark.parametrize(
    ("window", "exact"),
    [((-1, -1), {}), ((-1, 0), {"causal": True}), ((3, 0), {"window_size": (3, 0)}), ((2, 4), {"window_size": (2, 4)})],
    ids=["full", "causal", "causal window", "window"],
)
def test_varlen_attn(counts, window, exact, heads_k):
    q, k, v, dout = rows(heads_k)
    inputs = leaves(q, k, v)
    options = {"window_size": window, "scale": 0.3, "enable_gqa": heads_k == 1}
    aux = varlen().AuxRequest(lse=True)
    out, lse = varlen().varlen_attn(*inputs, LENGTHS_Q, LENGTHS_K, 12, 12, return_aux=aux, **options)
    exact = {**exact, "softmax_scale": 0.3}
    check_varlen_attention(out.detach(), lse.detach(), q, k, v, LENGTHS_Q, LENGTHS_K, **exact)
    found = torch.autograd.grad(out, inputs, dout)
    check_gradients(found, exact_varlen_gradients(q, k, v, dout, LENGTHS_Q, LENGTHS_K, **exact))
    assert counts.counts == {"flash_attn_jit": 1, "torch": 0}


def test_varlen_attn_of_packed_tensors(counts):
    qkv = normal(17, 3, 2, 32, seed=1).requires_grad_()
    q, k, v = qkv.unbind(1)
    out = varlen().varlen_attn(q, k, v, LENGTHS_Q, LENGTHS_Q, 12, 12)
    dout = normal(17, 2, 32, seed=2)
    (found,) = torch.autograd.grad(out, qkv, dout)
    exact = exact_varlen_gradients(*(x.detach() for x in (q, k, v)), dout, LENGTHS_Q, LENGTHS_Q)
    check_gradients(found.unbind(1), exact)


def test_compiled_varlen_attn(counts):
    q, k, v, dout = rows()
    torch.compiler.reset()
    inputs = leaves(q, k, v)
    attend = varlen().varlen_attn
    compiled = torch.compile(
        lambda *x: attend(*x, LENGTHS_Q, LENGTHS_K, 12, 12) * 2, backend="aot_eager", fullgraph=True
    )
    found = torch.autograd.grad(compiled(*inputs), inputs, dout)
    check_gradients(found, exact_varlen_gradients(q, k, v, 2 * dout, LENGTHS_Q, LENGTHS_K))


USED, TABLE = torch.tensor([20, 0, 9], dtype=torch.int32), torch.tensor([[2, 0], [3, 3], [3, 1]], dtype=torch.int32)


def in_pages(queries):
    """query, pages of key and of value, and what flash_attn_varlen_func makes of them"""
    starts = torch.tensor([0, queries, queries, 2 * queries], dtype=torch.int32)
    q, *pages = normal(2 * queries, 2, 32, seed=1), normal(4, 16, 1, 32, seed=2), normal(4, 16, 1, 32, seed=3)
    expected = flash_attn_varlen_func(
        q, *pages, starts, None, queries, 32, causal=True, block_table=TABLE, seqused_k=USED, num_splits=1
    )
    return (q, *pages, starts, None, queries, 32), expected


@pytest.mark.parametrize("queries", [1, 3])
def test_varlen_attn_over_pages(counts, queries):
    arguments, expected = in_pages(queries)
    out = varlen().varlen_attn(
        *arguments, window_size=(-1, 0), enable_gqa=True, seqused_k=USED, block_table=TABLE, num_splits=1
    )
    assert torch.equal(out, expected)
    (q, pages_k, pages_v), first = arguments[:3], slice(0, queries)
    keys, values = (pages[TABLE[0].long()].flatten(0, 1)[: USED[0]] for pages in (pages_k, pages_v))
    check_attention(out[first][None], None, q[first][None], keys[None], values[None], causal=True)


def test_varlen_attn_with_used_keys(counts):
    q, k, v, _ = rows()
    used = torch.tensor([4, 0, 10], dtype=torch.int32)
    out = varlen().varlen_attn(q, k, v, LENGTHS_Q, LENGTHS_K, 12, 12, seqused_k=used)
    ends = [slice(0, 4), slice(9, 9), slice(12, 22)]
    for i, keys in enumerate(ends):
        own = slice(LENGTHS_Q[i], LENGTHS_Q[i + 1])
        check_attention(out[own][None], None, q[own][None], k[keys][None], v[keys][None])


def test_varlen_attn_into_out(counts):
    arguments, expected = in_pages(3)
    out = torch.full_like(arguments[0], torch.nan)
    options = {"enable_gqa": True, "seqused_k": USED, "block_table": TABLE, "num_splits": 1, "window_size": (-1, 0)}
    varlen().varlen_attn_out(out, *arguments, **options)
    assert torch.equal(out, expected)
    assert counts.counts == {"flash_attn_jit": 1, "torch": 0}


# ---- The operators


def batch(heads_k=2, seqlen_q=10, seqlen_k=14):
    shape_k = 2, seqlen_k, heads_k, 32
    q, dout = normal(2, seqlen_q, 2, 32, seed=1), normal(2, seqlen_q, 2, 32, seed=2)
    return q, normal(*shape_k, seed=3), normal(*shape_k, seed=4), dout


def test_without_sequences(counts):
    q, k, v, dout = batch()
    inputs = leaves(q, k, v)
    out, lse, *_ = aten._flash_attention_forward(*inputs, None, None, 10, 14, 0.0, True, False, window_size_left=6)
    exact = {"causal": True, "window_size": (6, -1)}
    check_attention(out.detach(), lse.detach(), q, k, v, **exact)
    check_gradients(torch.autograd.grad(out, inputs, dout), exact_gradients(q, k, v, dout, **exact))


def test_alibi(counts):
    q, k, v, _ = batch()
    slopes = torch.tensor([0.1, 0.2])
    out, lse, *_ = aten._flash_attention_forward(
        q, k, v, None, None, 10, 14, 0.0, False, False, alibi_slopes=slopes, scale=0.3
    )
    check_attention(out, lse, q, k, v, alibi_slopes=slopes, softmax_scale=0.3)


def test_dropout(counts):
    q, k, v, dout = batch(seqlen_q=16, seqlen_k=16)
    inputs = leaves(q, k, v)
    torch.manual_seed(0)
    out, lse, state, _, mask = aten._flash_attention_forward(*inputs, None, None, 16, 16, 0.25, True, True)
    kept = (mask > 0).double() / 0.75
    assert 0.1 < (mask < 0).sum() / mask.count_nonzero() < 0.4
    check_attention(out.detach(), lse.detach(), q, k, v, causal=True, kept=kept)
    check_gradients(torch.autograd.grad(out, inputs, dout), exact_gradients(q, k, v, dout, causal=True, kept=kept))
    again = aten._flash_attention_forward(*inputs, None, None, 16, 16, 0.25, True, True)
    assert state.dtype is torch.uint64 and not torch.equal(state, again[2]) and not torch.equal(mask, again[4])


@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize("memory", ["heads first", "sequence first"])
def test_sdpas_operator(counts, memory, dropout_p):
    """Whose result lies in memory as its query does, and so do gradients."""
    sequence_first = batch(seqlen_q=16, seqlen_k=16)
    q, k, v, dout = (x.transpose(1, 2) for x in sequence_first)
    inputs = leaves(q, k, v) if memory == "sequence first" else leaves(*(x.contiguous() for x in (q, k, v)))
    assert inputs[0].stride() == (q if memory == "sequence first" else q.contiguous()).stride()
    out, lse, _, _, max_q, max_k, _, _, mask = aten._scaled_dot_product_flash_attention(
        *inputs, dropout_p, True, dropout_p > 0, scale=0.3
    )
    assert out.stride() == inputs[0].stride() and (max_q, max_k) == (16, 16)
    exact = {"causal": True, "softmax_scale": 0.3, "kept": (mask > 0).double() / 0.75 if dropout_p else None}
    check_attention(out.detach().transpose(1, 2), lse.detach(), *sequence_first[:3], **exact)
    found = torch.autograd.grad(out, inputs, dout)
    assert [x.stride() for x in found] == [x.stride() for x in inputs]
    check_gradients((x.transpose(1, 2) for x in found), exact_gradients(*sequence_first, **exact))


def test_a_causal_mask_is_aligned_bottom_right(counts):
    q, k, v, _ = batch()
    out, *_ = aten._scaled_dot_product_flash_attention(*(x.transpose(1, 2) for x in (q, k, v)), 0.0, True)
    expected, _ = attention(q, k, v, causal=True)
    torch.testing.assert_close(out.transpose(1, 2).double(), expected, atol=2e-3, rtol=2e-3)


def test_meta_tensors_are_torchs(counts):
    q, k, v, _ = batch()
    here = aten._flash_attention_forward(q, k, v, None, None, 10, 14, 0.0, False, False)
    meta = aten._flash_attention_forward(*(x.to("meta") for x in (q, k, v)), None, None, 10, 14, 0.0, False, False)
    for ours, theirs in zip(here, meta):
        assert (ours.shape, ours.dtype, ours.stride()) == (theirs.shape, theirs.dtype, theirs.stride())


# ---- What is refused


@pytest.mark.parametrize("name", ["seqused_k", "alibi_slopes"])
def test_what_torchs_backward_pass_would_not_know_of(counts, name):
    q, k, v, _ = batch()
    option = {"seqused_k": torch.tensor([3, 4], dtype=torch.int32), "alibi_slopes": torch.ones(2)}[name]
    arguments = (*leaves(q, k, v), None, None, 10, 14, 0.0, False, False)
    with pytest.raises(
        NotImplementedError, match=f"{name} comes with inputs that require a gradient, of which torch's"
    ):
        aten._flash_attention_forward(*arguments, **{name: option})
    with torch.no_grad():
        aten._flash_attention_forward(*arguments, **{name: option})


def test_errors_have_torchs_names(counts):
    q, k, v, _ = batch()
    with pytest.raises(ValueError, match=r"query has dtype torch\.float32.*query\.to\(torch\.float16\)"):
        aten._flash_attention_forward(q.float(), k, v, None, None, 10, 14, 0.0, False, False)
    with pytest.raises(ValueError, match=r"key has"):
        aten._scaled_dot_product_flash_attention(*(x.transpose(1, 2) for x in (q, k[..., :16], v)))
    with pytest.raises(ValueError, match=r"dropout_p is 0\.5, and return_debug_mask False; accepted: 0\.0 and False"):
        aten._flash_attention_forward_no_dropout_inplace(
            torch.empty_like(q), q, k, v, None, None, 10, 14, 0.5, False, False
        )
    assert counts.counts == {"flash_attn_jit": 0, "torch": 0}


# ---- The registry


def test_registering_twice_and_leaving(counts):
    assert torch_attention.register() is counts
    assert torch.nn.attention.current_flash_attention_impl() == "flash_attn_jit"
    assert "flash_attn_jit" in torch.nn.attention.list_flash_attention_impls()
    torch.nn.attention.restore_flash_attention_impl()
    q, k, v, _ = batch()
    with pytest.raises(NotImplementedError):
        aten._flash_attention_forward(q, k, v, None, None, 10, 14, 0.0, False, False)
    torch.nn.attention.activate_flash_attention_impl("flash_attn_jit")
    aten._flash_attention_forward(q, k, v, None, None, 10, 14, 0.0, False, False)
    assert counts.counts == {"flash_attn_jit": 1, "torch": 0}


def test_without_a_registry(monkeypatch):
    monkeypatch.delattr(torch.nn.attention, "register_flash_attention_impl", raising=False)
    with pytest.raises(
        RuntimeError, match=r"has no torch\.nn\.attention\.register_flash_attention_impl; accepted: torch"
    ):
        torch_attention.register()
