"""xformers' functions run here, right for every bias that it has, and what cannot is left to it and counted."""

import inspect
import random
from typing import Any

import pytest
import torch
import xformers.ops as xops
from integrations.xformers.attention_biases import ALL, CASES, WITH_BACKWARD, Case, attention
from xformers.ops import fmha
from xformers.ops.fmha import attn_bias as ab

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
        if isinstance(self.bias, torch.Tensor):
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
    from flash_attn_jit.integrations._xformers_bias import RULES

    types = _subclasses(ab.AttentionBias) - {ab.AttentionBias}
    assert types == {x for x in vars(ab).values() if inspect.isclass(x) and issubclass(x, ab.AttentionBias)} - {
        ab.AttentionBias
    }
    plain = {type(None), torch.Tensor}
    assert set(CASES) == types | plain, "a type of bias without a test"
    assert set(RULES) == types | plain | {torch.nn.Parameter}, "a type of bias that is not taken"


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
    from flash_attn_jit.integrations._xformers_operators import BwOp, FwOp

    return FwOp, BwOp
