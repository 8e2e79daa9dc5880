"""flex_attention in float64: PyTorch's own, eager; and what float32 with fp16 probabilities would make of it, the bound
of every numeric test."""

import importlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch

Mod = Callable[..., Any] | None


class Results(NamedTuple):
    """Of tensors (batch, heads, seqlen, head_dim)."""

    out: torch.Tensor
    lse: torch.Tensor
    dq: torch.Tensor
    dk: torch.Tensor
    dv: torch.Tensor


def gradients_of(leaves: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dq, dk, dv = (leaf.grad for leaf in leaves)
    assert dq is not None and dk is not None and dv is not None
    return dq, dk, dv


def eager(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor, score_mod: Mod, block_mask: Any, scale: float
) -> Results:
    """In float64. The public function refuses gradients on the CPU; what it calls makes them."""
    flex: Any = importlib.import_module("torch.nn.attention.flex_attention")
    inputs = [x.detach().double().requires_grad_() for x in (q, k, v)]
    if block_mask is None:
        block_mask = flex._create_empty_block_mask(*inputs[:2])
    options = flex._apply_kernel_options(*inputs, True, None, None)
    try:
        out, lse, *_ = flex.flex_attention_hop(
            *inputs, score_mod or flex._identity, block_mask.as_tuple(), scale, options
        )
        out.backward(dout.double())
    except torch.OutOfMemoryError:
        pytest.skip("eager flex_attention takes all memory for this function")
    return Results(out.detach(), lse.detach(), *gradients_of(inputs))


def _of_pairs(function: Callable[..., Any], places: Sequence[torch.Tensor], *scores: torch.Tensor) -> torch.Tensor:
    """What a function of one pair makes of all, the way that eager flex_attention asks it."""
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

    for varied in reversed(range(4)):
        dims = (0 if place == varied else None for place in range(4))
        function = torch.vmap(function, in_dims=(*(0 for _ in scores), *dims))
    with TransformGetItemToIndex():
        result: torch.Tensor = function(*scores, *places)
    return result


def emulated(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor, score_mod: Mod, mask_mod: Mod, scale: float
) -> Results:
    """In float32, with P and dS rounded to fp16, and results to q's dtype."""
    group = q.shape[1] // k.shape[1]
    q, k, v, dout, dtype = q.float(), k.float(), v.float(), dout.float(), q.dtype
    keys, values = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    product = (q @ keys.mT).requires_grad_()
    places = [torch.arange(size, device=q.device) for size in product.shape]
    scores = product * scale
    if score_mod is not None:
        scores = _of_pairs(score_mod, places, scores)
    if mask_mod is not None:
        scores = torch.where(_of_pairs(mask_mod, places), scores, -torch.inf)
    with torch.no_grad():
        row_max = scores.amax(-1, keepdim=True)
        row_max = torch.where(row_max == -torch.inf, 0.0, row_max)
        p = (scores - row_max).exp()
        row_sum = p.sum(-1, keepdim=True)
        lse = row_max + row_sum.log()
        p = p / row_sum.where(row_sum > 0, 1.0)
        half_p = p.half().float()
        out = (half_p @ values).to(dtype)
        dscores = p * (dout @ values.mT - (dout * out.float()).sum(-1, keepdim=True))
    (dproduct,) = (
        torch.autograd.grad(scores, product, dscores) if scores.requires_grad else (torch.zeros_like(product),)
    )
    dproduct = dproduct.half().float()
    of_group = (k.shape[0], k.shape[1], group, k.shape[2], -1)
    dk, dv = ((x.mT @ y).view(of_group).sum(2) for x, y in ((dproduct, q), (half_p, dout)))
    return Results(out, lse.squeeze(-1), *(x.to(dtype) for x in (dproduct @ keys, dk, dv)))


def check(found: Results, exact: Results, rounded: Results) -> None:
    """Twice the greatest error of the emulation, plus 1e-5 of the greatest number there is."""
    assert torch.equal(found.lse == -torch.inf, exact.lse == -torch.inf)
    finite = [each._replace(lse=each.lse.masked_fill(exact.lse == -torch.inf, 0.0)) for each in (found, exact, rounded)]
    for name, one, right, bound_by in zip(Results._fields, *finite):
        assert one.shape == right.shape, name
        error = (one.double() - right).abs().max().item()
        bound = 2 * (bound_by.double() - right).abs().max().item() + 1e-5 * max(1.0, right.abs().max().item())
        assert error <= bound, f"{name}: the greatest error is {error:.2e}, the bound {bound:.2e}"
