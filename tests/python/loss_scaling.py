"""Gradients as large as a loss scale may make them, and those that are not numbers: for the interpreter and the GPU."""

from collections.abc import Sequence

import torch
from attention_reference import check_gradients, exact_gradients, normal

from flash_attn_jit import flash_attn_func

_LARGEST_GRADIENT = 2.0**15  # half of what fp16 holds
_LARGEST_DOUT = 6e4


def gradients_of(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor, causal: bool
) -> Sequence[torch.Tensor]:
    """(dq, dk, dv)."""
    q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
    return torch.autograd.grad(flash_attn_func(q, k, v, causal=causal), (q, k, v), dout)


def scaled_dout(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool
) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
    """dout ~ N(0, 1) times the scale that makes the largest element of dq, dk and dv 2^15, with those in float64. Where
    dout itself, which is fp16, ends before that, the scale that makes its largest element 60000."""
    dout = normal(*q.shape, seed=4, device=str(q.device))
    largest = max(x.abs().max().item() for x in exact_gradients(q, k, v, dout, causal=causal))
    scale = min(_LARGEST_GRADIENT / largest, _LARGEST_DOUT / dout.abs().max().item())
    scaled = (dout.double() * scale).half()
    return scaled, exact_gradients(q, k, v, scaled, causal=causal)


def check_scaled_gradients(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> None:
    """Every gradient is finite and as near to float64 as without the scale."""
    dout, exact = scaled_dout(q, k, v, causal)
    gradients = gradients_of(q, k, v, dout, causal)
    assert all(x.isfinite().all() for x in gradients)
    check_gradients(gradients, exact)


def check_that_it_reaches_the_gradients(
    value: float, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool
) -> None:
    """One element of dout is no number: nor is the gradient of its query, nor those of the keys that the query sees.
    Other batches and other heads' groups keep their finite gradients."""
    b, head = q.shape[0] - 1, q.shape[2] - 1
    i = max(0, q.shape[1] - (k.shape[1] + 1) // 2)  # with a causal mask, it sees about half of the keys
    key_head = head // (q.shape[2] // k.shape[2])
    seen = slice(0, min(k.shape[1], i + k.shape[1] - q.shape[1] + 1) if causal else k.shape[1])
    dout = normal(*q.shape, seed=4, device=str(q.device))
    finite = gradients_of(q, k, v, dout, causal)
    dout[b, i, head, 3] = value
    dq, dk, dv = gradients_of(q, k, v, dout, causal)
    assert not dq[b, i, head].isfinite().any()
    assert not dk[b, seen, key_head].isfinite().any()
    assert not dv[b, seen, key_head, 3].isfinite().any()
    for got, before, own_head in zip((dq, dk, dv), finite, (head, key_head, key_head)):
        others = torch.ones(got.shape[0], got.shape[2], dtype=torch.bool, device=got.device)
        others[b, own_head] = False
        untouched = got.transpose(1, 2)[others]
        assert untouched.isfinite().all() and torch.equal(untouched, before.transpose(1, 2)[others])


def check_that_nan_of_an_input_reaches_the_gradients(
    which: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool
) -> None:
    """One element of q, k or v is NaN: so are the gradients that depend on it. dV is the weights times dout, so that it
    does not depend on v; other heads' groups keep finite gradients."""
    tensor = (q, k, v)[which]
    i = tensor.shape[1] - 1  # the last query sees every key, the last query alone sees the last key
    tensor[0, i, -1, 3] = float("nan")
    dout = normal(*q.shape, seed=4, device=str(q.device))
    dq, dk, dv = gradients_of(q, k, v, dout, causal)
    query = q.shape[1] - 1
    assert dq[0, query, -1].isnan().all()
    assert dk[0, :, -1].isnan().all()
    assert dv[0, :, -1].isfinite().all() if which == 2 else dv[0, :, -1].isnan().all()
    others = slice(0, k.shape[2] - 1)
    assert all(x[:, :, others].isfinite().all() for x in (dk, dv))


def check_that_a_scaler_skips_the_step(device: str) -> None:
    """GradScaler sees a loss scale that is too high, changes no weight and halves it; with a fitting one it steps."""
    q, k, v = (normal(1, 40, 2, 64, seed=seed, device=device) for seed in range(3))
    weight = torch.ones(64, device=device, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    for scale, steps in ((2.0**30, False), (2.0**10, True)):
        before = weight.detach().clone()
        scaler = torch.amp.GradScaler(device, init_scale=scale)
        out = flash_attn_func((q * weight).half(), k, v, causal=True)
        assert isinstance(out, torch.Tensor)
        scaler.scale(out.float().square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert torch.equal(weight.detach(), before) != steps
        assert scaler.get_scale() == (scale if steps else scale / 2)
