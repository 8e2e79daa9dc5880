"""A forward pass and a backward pass as two calls, for libraries that bring an autograd of their own."""

from collections.abc import Sequence

import torch

from .. import ops
from .._arguments import check_out
from .._options import Options, before_backward, before_possible_backward, has_cache, tensors_of, with_seed
from .._s_dmask import refuse_caches, signed_probabilities
from ..errors import Refusal
from ..ops import SEPARATE, Form, are_plain, is_plain


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    options: Options,
    out: torch.Tensor | None = None,
    has_backward: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(out, softmax_lse, seed): the seed is what backward() needs of dropout, None without. out: like q, and nobody
    else's; write_into() is for others. has_backward: whether one may follow, which of keys in a cache it never does."""
    options = with_seed(options, q)
    if has_backward and not has_cache(options):
        options = before_possible_backward(options, q.shape[-1])
    if not (is_plain(q, k, v) and are_plain(tensors_of(options))):
        with torch.no_grad():
            result, softmax_lse = SEPARATE.forward(q, k, v, *options)
            return result if out is None else out.copy_(result), softmax_lse, options.dropout_seed
    if out is None:
        return *ops.forward_plainly(q, k, v, options), options.dropout_seed
    return *ops.compute(q, k, v, options, out), options.dropout_seed


def write_into(
    out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    options: Options,
    has_backward: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """forward() into a tensor of the caller's."""
    check_out(out, q, v)
    result = forward(q, k, v, options, out, has_backward)
    ops.has_changed(out)
    return result


def backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    softmax_lse: torch.Tensor,
    options: Options,
    seed: torch.Tensor | None,
    gradients: Sequence[torch.Tensor],
) -> None:
    """Writes (dq, dk, dv) into `gradients`, which are like q, k and v."""
    if options.dropout_p != 0.0:
        if seed is None:
            raise Refusal("rng_state", "is None with dropout_p", "what the forward pass returned").exception()
        options = options._replace(dropout_seed=seed)
    options = before_backward(options)
    wanted = [True, True, True]
    if is_plain(dout, q, v) and are_plain((k, *gradients, *tensors_of(options))):
        room = tuple(gradients)
        form = Form(SEPARATE.names, SEPARATE.split, lambda *_: (room, room))
        ops.compute_gradients(form, dout, (q, k, v), out, softmax_lse, None, wanted, options)
        return
    with torch.no_grad():
        for gradient, found in zip(
            gradients, SEPARATE.backward(dout, q, k, v, out, softmax_lse, None, wanted, *options)
        ):
            gradient.copy_(found)


def s_dmask(
    q: torch.Tensor,
    k: torch.Tensor,
    softmax_lse: torch.Tensor,
    options: Options,
    seed: torch.Tensor | None,
    is_wanted: bool,
) -> torch.Tensor:
    """As flash_attn_func returns it: without elements where it is not wanted, or without dropout."""
    if not is_wanted or seed is None:
        return torch.empty(0, dtype=q.dtype, device=q.device)
    refuse_caches(options)
    return signed_probabilities(q, k, softmax_lse, options._replace(dropout_seed=seed))
