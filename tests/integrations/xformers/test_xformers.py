"""xformers' functions run here, right for every bias that it has, and what cannot is left to it and counted."""

import random
import re
from typing import Any

import pytest
import torch
import xformers.ops as xops
from conftest import run_python
from integrations.xformers.attention_biases import ALL, CASES, CPU, WITH_BACKWARD, Case, attention
from xformers.ops import fmha
from xformers.ops.fmha import attn_bias as ab, merge_training

import flash_attn_jit
from flash_attn_jit.integrations import xformers as integration

float16 = torch.float16


@pytest.fixture(autouse=True)
def counts():
    registered = integration.register()
    registered.reset()
    yield registered
    integration.unregister()


def ran(here: int, there: int = 0) -> dict[str, int]:
    return {"flash_attn_jit": here, "xformers": there}


class Problem:
    """Inputs for a case, in float16, and the same in float64. `layout`: "BMHK", "BMGHK" (every head its own key) or
    "grouped" (two groups, keys expanded over their heads)."""

    def __init__(self, make: Any, layout: str, seed: int = 0, heads: int = 4, head_dim: int = 16) -> None:
        rng = random.Random(seed)
        self.case: Case = make(rng, heads)
        self.layout, self.heads = layout, heads
        self.scale = rng.choice((None, 0.3))
        torch.manual_seed(seed)
        batch = self.case.batch
        of_keys = 2 if layout == "grouped" else heads
        self.q = torch.randn(batch, self.case.rows_q, heads, head_dim).half()
        self.k, self.v = (torch.randn(batch, self.case.rows_k, of_keys, head_dim).half() for _ in "kv")
        self.dout = torch.randn(batch, self.case.rows_q, heads, head_dim).half()
        self.bias = self.case.bias

    def laid_out(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> list[torch.Tensor]:
        """As a user gives them."""
        if self.layout == "BMHK":
            return [q, k, v]
        q = q.unflatten(2, (2, -1))
        if self.layout == "BMGHK":
            return [q, k.unflatten(2, (2, -1)), v.unflatten(2, (2, -1))]
        return [q, *(x[:, :, :, None].expand(-1, -1, -1, self.heads // 2, -1) for x in (k, v))]

    def laid_out_bias(self) -> Any:
        if self.layout == "BMHK":
            return self.bias
        if type(self.bias) is torch.Tensor:
            return self.bias.unflatten(1, (2, -1))
        if isinstance(self.bias, ab.LowerTriangularMaskWithTensorBias):
            return type(self.bias)(self.bias._bias.unflatten(1, (2, -1)))
        return self.bias

    def reference(self, dtype: torch.dtype) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """[out, lse] and the gradients of q, k, v, in that dtype from end to end."""
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in (self.q, self.k, self.v)]
        q, k, v = leaves
        if self.layout == "grouped":
            k, v = (x.repeat_interleave(self.heads // 2, 2) for x in (k, v))
        out, lse = attention(q, k, v, self.case.mask(self.heads).to(dtype), self.scale)
        return [out.detach(), lse.detach()], list(torch.autograd.grad(out, leaves, self.dout.to(dtype)))

    def check(self, what: str, got: torch.Tensor, exact: torch.Tensor, eager: torch.Tensor) -> None:
        error, allowed = (float((x.detach().double() - exact).abs().max()) for x in (got, eager))
        assert got.shape == exact.shape and error <= 2 * allowed + 1e-3, f"{what}: {error:.2g}, eager {allowed:.2g}"


# ---- every type ----


def _subclasses(type_: type) -> set[type]:
    return {type_}.union(*map(_subclasses, type_.__subclasses__()))


@pytest.mark.sample
def test_every_type_of_xformers_is_known():
    """Fails with a version that has another one."""
    from flash_attn_jit.integrations.xformers._biases import RULES

    types = {type_ for type_ in _subclasses(ab.AttentionBias) if type_.__module__.startswith("xformers")}
    types = types - {ab.AttentionBias} | {type(None), torch.Tensor}
    assert len(types) == 22 and set(CASES) == types, "a type of bias without a test"
    assert set(RULES) == types | {torch.nn.Parameter}, "a type of bias that is not taken"


@pytest.mark.parametrize("layout", ["BMHK", "BMGHK", "grouped"])
@pytest.mark.parametrize("name", ALL)
def test_forward(name, layout, counts):
    problem = Problem(ALL[name], layout, seed=len(name))
    (exact, exact_lse), _ = problem.reference(torch.float64)
    (eager, _), _ = problem.reference(float16)
    inputs, bias = problem.laid_out(problem.q, problem.k, problem.v), problem.laid_out_bias()
    out = xops.memory_efficient_attention(*inputs, bias, scale=problem.scale)
    assert out.dtype is float16 and out.shape == inputs[0].shape
    problem.check("out", out.view(problem.q.shape), exact, eager)
    part, lse = fmha.memory_efficient_attention_partial(*inputs, bias, scale=problem.scale)
    problem.check("partial out", part.view(problem.q.shape), exact, eager)
    torch.testing.assert_close(lse.view(exact_lse.shape).double(), exact_lse, atol=2e-3, rtol=0)
    assert lse.dim() == out.dim() - 1 and counts.counts == ran(2)


@pytest.mark.sample
@pytest.mark.parametrize("name", ["LowerTriangularMask", "BlockDiagonalCausalMask", "PagedBlockDiagonalGappyKeysMask"])
def test_forward_in_the_sample(name, counts):
    test_forward(name, "grouped", counts)


@pytest.mark.parametrize(
    ("way", "layout"),
    [("autograd", "BMHK"), ("autograd", "BMGHK"), ("autograd", "grouped"), ("op", "BMHK"), ("backward", "BMHK")],
)
@pytest.mark.parametrize("name", WITH_BACKWARD)
def test_backward(name, way, layout, counts):
    problem = Problem(ALL[name], layout, seed=len(name) + 1)
    (exact, _), exact_gradients = problem.reference(torch.float64)
    (eager, _), eager_gradients = problem.reference(float16)
    leaves = [x.clone().requires_grad_() for x in (problem.q, problem.k, problem.v)]
    inputs, bias = problem.laid_out(*leaves), problem.laid_out_bias()
    dout = problem.dout.view(inputs[0].shape)
    if way == "backward":
        with torch.no_grad():
            out, lse = fmha.memory_efficient_attention_forward_requires_grad(*inputs, bias, scale=problem.scale)
            gradients = fmha.memory_efficient_attention_backward(
                dout, out, lse, *inputs, attn_bias=bias, scale=problem.scale
            )
        torch.autograd.backward(inputs, gradients)
    else:
        op = _operators() if way == "op" else None
        out = xops.memory_efficient_attention(*inputs, bias, scale=problem.scale, op=op)
        out.backward(dout)
    problem.check("out", out.view(problem.q.shape), exact, eager)
    for what, leaf, *rest in zip("qkv", leaves, exact_gradients, eager_gradients):
        problem.check(f"d{what}", leaf.grad, *rest)
    assert counts.counts == ran(1)


def _operators() -> Any:
    from flash_attn_jit.integrations.xformers._operators import BwOp, FwOp

    return FwOp, BwOp


@pytest.mark.parametrize("name", [name for name in ALL if name not in WITH_BACKWARD])
def test_keys_that_are_padded_or_in_pages_have_no_gradients(name, counts):
    problem = Problem(ALL[name], "BMHK")
    reason = f"attn_bias is a {name}, which has no backward pass"
    leaf = problem.q.clone().requires_grad_()
    with pytest.raises(NotImplementedError, match=reason):
        xops.memory_efficient_attention(leaf, problem.k, problem.v, problem.bias)
    assert counts.reasons == {reason: 1}
    with torch.no_grad():
        out = xops.memory_efficient_attention(leaf, problem.k, problem.v, problem.bias)
        with_lse, lse = fmha.memory_efficient_attention_forward_requires_grad(
            problem.q, problem.k, problem.v, problem.bias
        )
        with pytest.raises(NotImplementedError, match=reason):
            fmha.memory_efficient_attention_backward(
                out, with_lse, lse, problem.q, problem.k, problem.v, attn_bias=problem.bias
            )
    assert torch.equal(out, with_lse) and counts.counts == ran(2, 1)


@pytest.mark.parametrize("seed", range(60))
def test_fuzz(seed, counts):
    """Types, lengths, heads, head dims, layouts and strides, each drawn."""
    rng = random.Random(1000 + seed)
    name = rng.choice(list(ALL))
    layout = rng.choice(("BMHK", "BMGHK", "grouped"))
    problem = Problem(ALL[name], layout, seed, heads=rng.choice((2, 4, 6)), head_dim=rng.choice((1, 8, 20, 40, 64)))
    (exact, _), exact_gradients = problem.reference(torch.float64)
    (eager, _), eager_gradients = problem.reference(float16)
    has_gradients = name in WITH_BACKWARD and rng.random() < 0.7
    leaves = [_with_other_strides(x, rng).requires_grad_(has_gradients) for x in (problem.q, problem.k, problem.v)]
    inputs = problem.laid_out(*leaves)
    out = xops.memory_efficient_attention(*inputs, problem.laid_out_bias(), scale=problem.scale)
    problem.check("out", out.view(problem.q.shape), exact, eager)
    if has_gradients:
        out.backward(_with_other_strides(problem.dout, rng).view_as(out))
        for what, leaf, *rest in zip("qkv", leaves, exact_gradients, eager_gradients):
            problem.check(f"d{what}", leaf.grad, *rest)
    assert counts.counts == ran(1)


def _with_other_strides(x: torch.Tensor, rng: random.Random) -> torch.Tensor:
    """The same values, as they are, heads first, or a part of a packed tensor."""
    kind = rng.randrange(3)
    if kind == 1:
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    return x if kind == 0 else torch.stack((x, x), 2)[:, :, 1]


# ---- what biases of numbers, dropout and layouts do ----


@pytest.mark.parametrize("kind", ["BMHK", "BMGHK", "of a mask", "alone", "op"])
def test_gradient_of_a_tensor_bias(kind, counts):
    torch.manual_seed(0)
    q, k, v, dout = (torch.randn(2, 9, 4, 16).half() for _ in range(4))
    exact = torch.randn(2, 4, 9, 9, dtype=torch.float64).half().double().requires_grad_()
    bias = torch.nn.Parameter(exact.detach().half())
    causal = torch.full((9, 9), float("-inf"), dtype=torch.float64).triu(1) if kind == "of a mask" else 0
    out, _ = attention(q.double(), k.double(), v.double(), exact + causal, None)
    out.backward(dout.double())
    given = bias.unflatten(1, (2, 2)) if kind == "BMGHK" else bias
    if kind == "BMGHK":
        q, k, v, dout = (x.unflatten(2, (2, 2)) for x in (q, k, v, dout))
    if kind == "of a mask":
        given = ab.LowerTriangularMaskWithTensorBias(bias)
    got = xops.memory_efficient_attention(
        q.requires_grad_(kind != "alone"), k, v, given, op=_operators() if kind == "op" else None
    )
    got.backward(dout)
    torch.testing.assert_close(bias.grad.double(), exact.grad, atol=3e-3, rtol=3e-3)
    assert bias.grad.dtype is float16 and counts.counts == ran(1)


def test_a_gradient_that_named_operators_would_lose_is_refused():
    q = torch.randn(1, 8, 2, 16).half().requires_grad_()
    bias = torch.zeros(1, 2, 8, 8).half().requires_grad_()
    with pytest.raises(NotImplementedError, match="whose tensor requires a gradient; accepted with op="):
        xops.memory_efficient_attention(q, q, q, ab.LowerTriangularMaskWithTensorBias(bias), op=_operators())
    five = q[:, :, None]
    with pytest.raises(NotImplementedError, match="query has 5 dimensions, and an input requires a gradient"):
        xops.memory_efficient_attention(five, five, five, op=_operators())


@pytest.mark.parametrize("way", ["autograd", "op"])
def test_dropout_is_the_kernels(way, counts):
    q, k, v, dout = (torch.randn(2, 16, 2, 16).half() for _ in range(4))

    def run(function: Any) -> tuple[torch.Tensor, ...]:
        torch.manual_seed(7)
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = function(*leaves)
        return (out, *torch.autograd.grad(out, leaves, dout))

    op = _operators() if way == "op" else None
    ours = run(lambda q, k, v: xops.memory_efficient_attention(q, k, v, ab.LowerTriangularMask(), 0.3, op=op))
    plain = run(lambda q, k, v: flash_attn_jit.flash_attn_func(q, k, v, 0.3, causal=True))
    none = run(lambda q, k, v: flash_attn_jit.flash_attn_func(q, k, v, causal=True))
    assert all(map(torch.equal, ours, plain)) and not torch.equal(ours[0], none[0])
    assert counts.counts == ran(1)


@pytest.mark.sample
def test_as_diffusers_processors_call_it(counts):
    """XFormersAttnProcessor: heads are a part of the batch, a mask of keys is expanded over the queries."""
    heads = 3
    torch.manual_seed(0)
    q, k, v = (torch.randn(2 * heads, rows, 40).half() for rows in (9, 7, 7))
    hidden = torch.zeros(2 * heads, 1, 7).half()
    hidden[heads:, :, 5:] = -10000.0
    out = xops.memory_efficient_attention(q, k, v, attn_bias=hidden.expand(-1, 9, -1), op=None, scale=40**-0.5)
    mask = hidden[:, None].double()
    exact, _ = attention(*(x[:, :, None].double() for x in (q, k, v)), mask, None)
    assert out.shape == q.shape and counts.counts == ran(1)
    torch.testing.assert_close(out[:, :, None].double(), exact, atol=2e-3, rtol=0)
    leaf = q.clone().requires_grad_()
    xops.memory_efficient_attention(leaf, k, v).backward(q)
    assert leaf.grad.shape == q.shape and counts.counts == ran(2)


@pytest.mark.parametrize("kind", ["causal", "mask", "grouped"])
def test_as_diffusers_backend_calls_it(kind, counts):
    """attention_dispatch's "xformers": arguments by place, additive masks of 4 dimensions, heads in groups."""
    torch.manual_seed(0)
    q = torch.randn(2, 9, 4, 16).half()
    k, v = (torch.randn(2, 9, 2 if kind == "grouped" else 4, 16).half() for _ in "kv")
    mask = None
    dense = torch.zeros(1, dtype=torch.float64)
    if kind == "causal":
        mask, dense = xops.LowerTriangularMask(), torch.full((9, 9), float("-inf"), dtype=torch.float64).triu(1)
    elif kind == "mask":
        dense = torch.zeros(2, 1, 1, 9, dtype=torch.float64)
        dense[1, ..., 6:] = float("-inf")
        mask = dense.expand(2, 4, 9, 9).type_as(q)
    groups = [q, k, v]
    if kind == "grouped":
        groups = [q.unflatten(2, (2, -1)), *(x[:, :, :, None].expand(-1, -1, -1, 2, -1) for x in (k, v))]
    out = xops.memory_efficient_attention(*groups, mask, 0.0, None)
    whole = [x.repeat_interleave(4 // x.shape[2], 2).double() for x in (q, k, v)]
    exact, _ = attention(*whole, dense, None)
    torch.testing.assert_close(out.reshape(q.shape).double(), exact, atol=2e-3, rtol=0)
    assert counts.counts == ran(1)


@pytest.mark.sample
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("is_packed", [False, True])
def test_as_unsloth_calls_it(is_packed, window, counts):
    """A step of training, keys and values expanded by reshape; then one of generation, in 5 dimensions."""
    torch.manual_seed(0)
    lengths = [7, 5, 4]
    rows = sum(lengths)
    q, *kv = (torch.randn(1, rows, heads, 16).half().requires_grad_() for heads in (4, 2, 2))
    bias = xops.LowerTriangularMask()
    if is_packed:
        bias = fmha.BlockDiagonalMask.from_seqlens(lengths).make_causal()
        if window:
            bias = fmha.BlockDiagonalMask.from_seqlens(lengths).make_local_attention(window)
    elif window:
        bias = ab.LowerTriangularFromBottomRightMask().make_local_attention(window)
    k, v = (x.unsqueeze(3).expand(1, rows, 2, 2, 16).reshape(1, rows, 4, 16) for x in kv)
    out = xops.memory_efficient_attention(q, k, v, attn_bias=bias)
    got = torch.autograd.grad(out, (q, *kv), out.detach())
    exact_leaves = [x.detach().double().requires_grad_() for x in (q, *kv)]
    mask = bias.materialize((1, 4, rows, rows), torch.float64)
    exact, _ = attention(exact_leaves[0], *(x.repeat_interleave(2, 2) for x in exact_leaves[1:]), mask, None)
    torch.testing.assert_close(out.double(), exact, atol=2e-3, rtol=0)
    for mine, theirs in zip(got, torch.autograd.grad(exact, exact_leaves, out.detach().double())):
        torch.testing.assert_close(mine.double(), theirs, atol=1e-2, rtol=1e-2)
    with torch.no_grad():
        five = [q.view(1, rows, 2, 2, 16), *(x.unsqueeze(3).expand(1, rows, 2, 2, 16) for x in kv)]
        grouped = xops.memory_efficient_attention(*five, attn_bias=bias)
    torch.testing.assert_close(grouped.view(out.shape), out, atol=2e-3, rtol=0)
    assert counts.counts == ran(2)


def test_expanded_keys_are_read_once(counts, monkeypatch):
    heads = []
    forward = flash_attn_jit.ops._core.forward
    monkeypatch.setattr(
        flash_attn_jit.ops._core, "forward", lambda q, k, *rest: (heads.append(k.shape[-2]), forward(q, k, *rest))
    )
    q = torch.randn(1, 8, 2, 4, 16).half()
    k = torch.randn(1, 8, 2, 1, 16).half().expand(q.shape)
    xops.memory_efficient_attention(q, k, k)
    xops.memory_efficient_attention(q[:, :, 0], k[:, :, 0], k[:, :, 0])
    fmha.memory_efficient_attention_partial(q, k, k)
    assert heads == [2, 1, 2] and counts.counts == ran(3)


@pytest.mark.parametrize("op", [False, True])
def test_gradients_of_expanded_keys_are_each_heads(op, counts):
    torch.manual_seed(0)
    q, dout = (torch.randn(2, 9, 4, 16).half() for _ in "qd")
    k, v = (torch.randn(2, 9, 1, 16).half().expand(2, 9, 4, 16) for _ in "kv")
    got = []
    for keys in ((k, v), (k.contiguous(), v.contiguous())):
        leaves = [x.detach().requires_grad_() for x in (q, *keys)]
        out = xops.memory_efficient_attention(*leaves, op=_operators() if op else None)
        got.append((out, *torch.autograd.grad(out, leaves, dout)))
    for mine, copied in zip(*got):
        assert torch.equal(mine, copied)
    assert counts.counts == ran(2)


def test_an_lse_with_rows_to_spare(counts):
    """As xformers' CUTLASS operator gives it."""
    torch.manual_seed(0)
    q, k, v, dout = (torch.randn(2, 9, 2, 16).half() for _ in range(4))
    out, lse = fmha.memory_efficient_attention_forward_requires_grad(q, k, v)
    padded = torch.nn.functional.pad(lse, (0, 23), value=float("inf"))
    exact = fmha.memory_efficient_attention_backward(dout, out, lse, q, k, v)
    assert all(map(torch.equal, fmha.memory_efficient_attention_backward(dout, out, padded, q, k, v), exact))
    assert counts.counts == ran(1)


def test_padded_keys_with_a_batch(counts):
    """Rows of all of it count as one behind the other."""
    torch.manual_seed(0)
    q = torch.randn(2, 3, 4, 16).half()
    k, v = (torch.randn(2, 8, 4, 16).half() for _ in "kv")
    bias = ab.BlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens([3, 3], 8, [8, 5], device=CPU)
    out = xops.memory_efficient_attention(q, k, v, bias)
    flat = xops.memory_efficient_attention(*(x.flatten(0, 1)[None] for x in (q, k, v)), bias)
    assert out.shape == q.shape and torch.equal(out.flatten(0, 1), flat[0]) and counts.counts == ran(2)


@pytest.mark.parametrize(("rows_q", "rows_k"), [(0, 8), (8, 0), (0, 0)])
def test_nothing_to_attend(rows_q, rows_k, counts):
    q = torch.randn(2, rows_q, 2, 16).half().requires_grad_()
    k = torch.randn(2, rows_k, 2, 16).half().requires_grad_()
    out = xops.memory_efficient_attention(q, k, k)
    out.sum().backward()
    assert out.shape == q.shape and not out.any() and not q.grad.any() and not k.grad.any()
    assert counts.counts == ran(1)


def test_parts_of_an_attention_merge(counts):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, rows, 2, 16).half() for rows in (6, 12, 12))
    bias = fmha.BlockDiagonalMask.from_seqlens([4, 2], [6, 6], device=CPU)
    none = fmha.BlockDiagonalMask.from_seqlens([4, 2], [0, 6], device=CPU)
    parts = [
        fmha.memory_efficient_attention_partial(q, k, v, bias),
        fmha.memory_efficient_attention_partial(q, k[:, 6:], v[:, 6:], none),
    ]
    assert parts[1][1][0, :, :4].eq(float("-inf")).all()  # and not +inf, which would outweigh all
    outs, lses = (torch.stack(x).double() for x in zip(*parts))
    weights = (lses - lses.logsumexp(0)).exp().permute(0, 1, 3, 2)[..., None]
    mask = torch.full((6, 18), float("-inf"), dtype=torch.float64)
    mask[:4, :6] = mask[4:, 6:] = 0
    exact, _ = attention(q.double(), *(torch.cat((x, x[:, 6:]), 1).double() for x in (k, v)), mask[None, None], None)
    torch.testing.assert_close((outs * weights).sum(0), exact, atol=2e-3, rtol=0)
    assert counts.counts == ran(2)


def test_gradients_of_merged_parts(counts):
    """As xformers' merge_training has them: each part's backward pass goes by the whole's out and lse."""
    torch.manual_seed(0)
    q, dout = torch.randn(1, 1, 4, 16).half(), torch.randn(1, 1, 4, 16).half()
    k, v = (torch.randn(1, 40, 4, 16).half() for _ in "kv")
    exact_leaves = [x.double().requires_grad_() for x in (q, k, v)]
    out, lse = attention(*exact_leaves, torch.zeros(1, dtype=torch.float64), None)
    exact = torch.autograd.grad(out, exact_leaves, dout.double())
    whole = out.detach().half(), lse.detach().float()
    parts = [
        fmha.memory_efficient_attention_backward(dout, *whole, q, k[:, half], v[:, half])
        for half in (slice(0, 24), slice(24, 40))
    ]
    got = [parts[0][0] + parts[1][0], *(torch.cat(x, 1) for x in list(zip(*parts))[1:])]
    for mine, theirs in zip(got, exact):
        torch.testing.assert_close(mine.double(), theirs, atol=5e-3, rtol=0)
    assert counts.counts == ran(0)  # backward passes are not counted


def test_one_part_through_autograd(counts):
    """Its second sequence sees no key."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, rows, 2, 16).half().requires_grad_() for rows in (6, 5, 5))
    bias = fmha.BlockDiagonalMask.from_seqlens([4, 2], [5, 0], device=CPU)
    part = merge_training.memory_efficient_attention_partial_autograd(q, k, v, bias)
    out = merge_training.merge_attentions_autograd(part)
    got = torch.autograd.grad(out, (q, k, v), out.detach())
    whole = xops.memory_efficient_attention(q, k, v, bias)
    exact = torch.autograd.grad(whole, (q, k, v), whole.detach())
    assert torch.equal(out, whole) and all(map(torch.equal, got, exact)) and not got[0][:, 4:].any()
    assert counts.counts == ran(2)


def test_checkpoints_run_here_twice(counts):
    q = torch.randn(1, 8, 2, 16).half().requires_grad_()
    out = torch.utils.checkpoint.checkpoint(
        lambda q: xops.memory_efficient_attention(q, q, q).sin(), q, use_reentrant=False
    )
    out.sum().backward()
    assert counts.counts == ran(2)


# ---- what is not taken ----


def _inputs(*, heads_dims: tuple[int, int] = (16, 16), dtype: torch.dtype = float16) -> list[torch.Tensor]:
    return [torch.randn(1, 8, 2, dim).to(dtype) for dim in (heads_dims[0], *heads_dims)]


_OVERLAPPING = ab.BlockDiagonalGappyKeysMask.from_seqlens([4, 4], [0, 2, 8], [5, 6], device=CPU)
_TOO_MANY = fmha.BlockDiagonalMask.from_seqlens([4, 5], [4, 4], device=CPU)
_TOO_MANY_KEYS = fmha.BlockDiagonalMask.from_seqlens([4, 4], [4, 5], device=CPU)
_NO_WINDOW = ab.BlockDiagonalLocalAttentionPaddedKeysMask.from_seqlens_local([4, 4], 4, [3, 3], -1, 2)
_NO_KEY = ab.BlockDiagonalCausalLocalAttentionPaddedKeysMask.from_seqlens_local([4, 4], 4, [4, 4], 0)
_PAGES = ab.PagedBlockDiagonalPaddedKeysMask.from_seqlens(
    [4, 4], [3, 3], torch.zeros(2, 1, dtype=torch.int32), 3, device=CPU
)


_Own = type("_Own", (ab.LowerTriangularMask,), {})


REFUSED: dict[str, tuple[list[torch.Tensor], dict[str, Any]]] = {
    r"query has dtype torch.float32. Cast it: query.to\(torch.float16\)": (_inputs(dtype=torch.float32), {}),
    "value has head_dim 264 and query 16": (_inputs(heads_dims=(16, 264)), {}),
    "query has head_dim 520": (_inputs(heads_dims=(520, 520)), {}),
    "output_dtype is torch.float32": (_inputs(), {"output_dtype": torch.float32}),
    "p is 1.0": (_inputs(), {"p": 1.0}),
    "attn_bias has dtype torch.float64": (_inputs(), {"attn_bias": torch.ones(1, 2, 8, 8, dtype=torch.float64)}),
    "attn_bias has shape .*, which does not broadcast to ": (
        [x[:, :, None] for x in _inputs()],
        {"attn_bias": torch.ones(1, 2, 1, 8, 8).half()},
    ),
    "attn_bias is a _Own": (_inputs(), {"attn_bias": _Own()}),
    "attn_bias is a BlockDiagonalGappyKeysMask whose sequences overlap": (_inputs(), {"attn_bias": _OVERLAPPING}),
    "attn_bias is a BlockDiagonalMask of 9 queries, and there are 8": (_inputs(), {"attn_bias": _TOO_MANY}),
    "attn_bias is a BlockDiagonalMask of 9 keys, and there are 8": (_inputs(), {"attn_bias": _TOO_MANY_KEYS}),
    "attn_bias is a .* whose window is -1 keys on the left and 2 on the right": (_inputs(), {"attn_bias": _NO_WINDOW}),
    "attn_bias is a .* whose window_size is 0": (_inputs(), {"attn_bias": _NO_KEY}),
    "attn_bias is a .* of pages of 3 rows, and there are 8": (_inputs(), {"attn_bias": _PAGES}),
    "key has strides .*. Use key.contiguous": (
        [_inputs()[0], *(x.transpose(1, 3).contiguous().transpose(1, 3) for x in _inputs()[1:])],
        {},
    ),
}


@pytest.fixture
def their_operator(monkeypatch):
    """An operator of xformers' own that takes everything, where the CPU has none."""

    class Operator(fmha.common.AttentionFwOpBase):
        NAME = "theirs"

        @classmethod
        def not_supported_reasons(cls, d: Any) -> list[str]:
            return []

        @classmethod
        def apply(cls, inp: Any, needs_gradient: bool) -> Any:
            return torch.full_like(inp.value, 5.0), None

    monkeypatch.setattr(fmha.dispatch, "_dispatch_fw_priority_list", lambda inp, needs_gradient: [Operator])
    return Operator


@pytest.mark.parametrize("reason", REFUSED)
def test_what_is_not_taken_is_left_to_xformers(reason, counts, their_operator, monkeypatch):
    inputs, options = REFUSED[reason]
    out = xops.memory_efficient_attention(*inputs, **options)
    assert out.eq(5).all() and counts.counts == ran(0, 1)
    assert all(re.match(reason, counted) for counted in counts.reasons)
    monkeypatch.undo()
    with pytest.raises(NotImplementedError, match="flash_attn_jit` is not supported because:\n    " + reason):
        xops.memory_efficient_attention(*inputs, **options)


def test_inputs_of_3_dimensions_come_to_xformers_as_they_were(counts, their_operator):
    """Of which a mask of one batch is not what it accepts beside 4."""
    q = torch.randn(2, 8, 16)
    out = xops.memory_efficient_attention(q, q, q, torch.zeros(1, 8, 8))
    assert out.shape == q.shape and out.eq(5).all() and counts.counts == ran(0, 1)


def test_a_bool_bias_is_xformers_error(counts):
    """There True is not a pair that is seen, but an addend, if anything."""
    q = torch.randn(1, 8, 2, 16).half()
    with pytest.raises(TypeError):
        xops.memory_efficient_attention(q, q, q, torch.ones(1, 2, 8, 8, dtype=torch.bool))
    assert counts.reasons == {"attn_bias has dtype torch.bool": 1}


def test_named_operators_run_and_are_counted(counts, their_operator):
    q = torch.randn(1, 8, 2, 16).half()
    out = xops.memory_efficient_attention(q, q, q, op=(their_operator, None))
    assert out.eq(5).all() and counts.reasons == {"op= names theirs": 1}
    ours = xops.memory_efficient_attention(q, q, q, op=_operators())
    assert torch.equal(ours, xops.memory_efficient_attention(q, q, q)) and counts.counts == ran(2, 1)


def test_xformers_own_checks_stay():
    q = torch.randn(1, 8, 2, 16).half()
    with pytest.raises(ValueError, match="Incompatible shapes for attention inputs"):
        xops.memory_efficient_attention(q, q[:, :, :1], q[:, :, :1])
    with pytest.raises(ValueError, match="Invalid shape for attention bias"):
        xops.memory_efficient_attention(q, q, q, torch.zeros(1, 1, 8, 8).half())


def test_a_padded_lse_is_not_taken():
    """As xformers' CUTLASS operator gives it of sequences one behind the other."""
    bias = fmha.BlockDiagonalMask.from_seqlens([3, 5], device=CPU)
    q = torch.randn(1, 8, 2, 16).half()
    with pytest.raises(NotImplementedError, match="its lse is padded"):
        fmha.memory_efficient_attention_backward(q, q, torch.zeros(2, 2, 32), q, q, q, attn_bias=bias)


# ---- registering ----


def test_xformers_is_imported_when_it_is_registered():
    done = run_python(
        "import sys\n"
        "from flash_attn_jit.integrations import xformers\n"
        "assert 'xformers' not in sys.modules\n"
        "xformers.register()\n"
        "assert 'xformers.ops' in sys.modules"
    )
    assert done.returncode == 0, done.stderr


def test_registering(counts, monkeypatch):
    def functions() -> dict[str, Any]:
        return {name: getattr(fmha, name) for name in integration._REPLACED}

    ours = functions()
    assert integration.register() is counts and functions() == ours
    integration.unregister()
    integration.unregister()
    theirs = functions()
    assert all(function.__module__.startswith("xformers") for function in theirs.values())
    q = torch.randn(1, 8, 2, 16).half()
    with pytest.raises(NotImplementedError, match="No operator found"):
        xops.memory_efficient_attention(q, q, q)
    assert counts.counts == ran(0)
    for module, name in ((fmha, "_dispatch_bw"), (ab, "BlockDiagonalLocalAttentionPaddedKeysMask")):
        with monkeypatch.context() as patch:
            patch.delattr(module, name)
            with pytest.raises(ImportError, match=rf"xformers 0\S+ has no {name}; accepted: xformers 0\.0\.31 to "):
                integration.register()
    assert functions() == theirs


@pytest.mark.parametrize("needs_gradient", [False, True])
@pytest.mark.parametrize("name", ["NoneType", "Tensor", "BlockDiagonalCausalMask", "LowerTriangularMask"])
def test_compiled_graphs_are_whole(name, needs_gradient, counts):
    problem = Problem(ALL[name], "BMHK")
    compiled = torch.compile(
        lambda q, k, v: xops.memory_efficient_attention(q * 1, k, v, problem.bias), fullgraph=True, backend="aot_eager"
    )
    q = problem.q.clone().requires_grad_(needs_gradient)
    out = compiled(q, problem.k, problem.v)
    assert counts.counts == ran(0)  # what compiled graphs call is not counted
    eager = xops.memory_efficient_attention(q, problem.k, problem.v, problem.bias)
    assert torch.equal(out, eager) and counts.counts == ran(1)
    if needs_gradient:
        got, exact = (torch.autograd.grad(x, q, problem.dout)[0] for x in (out, eager))
        assert torch.equal(got, exact)
