"""The operators of xformers' ``memory_efficient_attention``, and the same with PyTorch's autograd around it."""

from typing import Any, NamedTuple

import torch
from xformers.ops.fmha.common import AttentionBwOpBase, AttentionFwOpBase, Context, Gradients

from ... import ops
from ..._autograd import attention
from ..._dtypes import HALVES
from ..._options import Options, before_backward, tensors_of, with_seed
from ..._sdpa import MOST_HEAD_DIM, MOST_HEAD_DIM_OF_GRADIENTS
from ...ops import SEPARATE, are_plain, is_plain
from . import _biases as biases, calls
from ._refusals import operator_gradient_refusal, refusal


class _Call(NamedTuple):
    """Inputs as these kernels take them."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    options: Options


def _folded(key: torch.Tensor, value: torch.Tensor, grouped: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(batch, rows, heads, head_dim); where `grouped` heads that are expanded are there once, else each has its own
    gradient, and 5 dimensions may be copied."""
    rank = key.dim()
    if grouped and key.stride(-2) == 0 and value.stride(-2) == 0:
        if rank == 4:
            return key.narrow(2, 0, 1), value.narrow(2, 0, 1)
        return key.select(3, 0), value.select(3, 0)
    return (key, value) if rank == 4 else (key.flatten(2, 3), value.flatten(2, 3))


def _without_batch(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[0] if tensor.shape[0] == 1 else tensor.flatten(0, 1)


def _read(inp: Any, grouped: bool) -> _Call:
    """Of inputs that are not refused, in 4 or 5 dimensions."""
    bias, q = inp.attn_bias, inp.query
    if q.dim() == 5:
        q = q.flatten(2, 3)
    k, v = _folded(inp.key, inp.value, grouped)
    if bias is None:
        return _Call(q, k, v, Options(softmax_scale=inp.scale, dropout_p=inp.p))
    options = biases.options_of(inp)
    if options.cu_seqlens_q is None:
        keys = biases.keys_seen(inp)
        return _Call(q, k, v, options) if keys == k.shape[1] else _Call(q, k[:, :keys], v[:, :keys], options)
    q = _without_batch(q)
    if options.block_table is not None:
        k, v = (x.reshape(-1, bias.page_size, *x.shape[2:]) for x in (k, v))
        return _Call(q, k, v, options)
    k, v = _without_batch(k), _without_batch(v)
    if options.seqused_k is not None and biases.first_key(bias):
        k, v = k[biases.first_key(bias) :], v[biases.first_key(bias) :]
    return _Call(q, k, v, options)


def _laid_out(out: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """What is made of q, of the query's shape but for the head dim."""
    if query.dim() == 4:
        if out.dim() == 4:
            return out
        if query.shape[0] == 1:
            return out[None]
    return out.view(*query.shape[:-1], out.shape[-1])


def requires_gradient(inp: Any) -> bool:
    """Whether query, key or value does, whatever autograd's mode: xformers' autograd runs operators with it off."""
    return bool(inp.query.requires_grad or inp.key.requires_grad or inp.value.requires_grad)


def needs_gradient(inp: Any) -> bool:
    """Whether autograd is to differentiate a call."""
    if not torch.is_grad_enabled():
        return False
    if requires_gradient(inp):
        return True
    bias = biases.tensor_of(inp.attn_bias)
    return bias is not None and bias.requires_grad


def differentiable(inp: Any, needs_gradient: bool) -> torch.Tensor:
    """out of inputs that are not refused, of query's shape with value's head dim; with gradients of all that may have
    one, tensors of biases too."""
    q, k, v, options = _read(inp, grouped=not needs_gradient)
    out, _ = attention(q, k, v, options, False)
    calls.count()
    return _laid_out(out, inp.query)


def _forward(call: _Call, wants_lse: bool) -> tuple[torch.Tensor, Any]:
    q, k, v, options = call
    if is_plain(q, k, v) and are_plain(tensors_of(options)):
        return ops.forward_plainly(q, k, v, options, wants_lse)
    return SEPARATE.forward(q, k, v, *options)


def _shaped_lse(lse: torch.Tensor, inp: Any, options: Options) -> torch.Tensor:
    """(batch, heads, rows), or of 5 dimensions (batch, groups, heads of a group, rows); with a batch of 1 where
    sequences lie one behind the other. xformers' own parts of an attention have -inf where no key is seen."""
    if options.cu_seqlens_q is not None:
        lse = lse[None]
    if inp.query.dim() == 5:
        lse = lse.unflatten(1, inp.query.shape[2:4])
    return lse.masked_fill(lse == float("inf"), float("-inf")) if inp.is_partial else lse


class _Operator:
    """What xformers asks of both."""

    OPERATOR = ops.compute
    SUPPORTED_DEVICES = frozenset(("cuda", "cpu"))
    CUDA_MINIMUM_COMPUTE_CAPABILITY = (7, 5)
    SUPPORTED_DTYPES = frozenset(HALVES)
    SUPPORTED_MAX_K = MOST_HEAD_DIM
    SUPPORTED_MIN_K = 1
    SUPPORTS_DROPOUT = True
    SUPPORTS_CUSTOM_SCALE = True
    SUPPORTS_PARTIAL = True
    SUPPORTED_ATTN_BIAS_TYPES = tuple(biases.RULES)
    VARLEN_LSE_PACKED = True


class FwOp(_Operator, AttentionFwOpBase):  # type: ignore[misc]
    """The forward pass. What it cannot take, not_supported_reasons() tells."""

    NAME = "flash_attn_jitF"
    SUPPORTS_BMGHK = True

    @classmethod
    def not_supported_reasons(cls, d: Any) -> list[str]:
        reason = refusal(d)
        return [] if reason is None else [reason]

    @classmethod
    def apply(cls, inp: Any, needs_gradient: bool) -> tuple[torch.Tensor, Any]:
        """(out, what the backward pass needs); the latter None where softmax_lse is not asked for."""
        if needs_gradient and not inp.is_partial:
            _refuse_lost_gradients(inp)
        may_have_backward = requires_gradient(inp) if inp.is_partial else needs_gradient
        has_backward = may_have_backward and operator_gradient_refusal(inp) is None
        call = _read(inp, grouped=not has_backward)
        options = with_seed(call.options, call.q)
        call = call._replace(options=before_backward(options) if has_backward else options)
        out, lse = _forward(call, needs_gradient)
        calls.count()
        out = _laid_out(out, inp.query)
        if not needs_gradient:
            return out, None
        lse = _shaped_lse(lse, inp, options)
        return out, Context(out=out, lse=lse, op_bw=BwOp, rng_state=options.dropout_seed)


def _refuse_lost_gradients(inp: Any) -> None:
    """xformers' autograd does not look into its masks, and fails late with 5 dimensions."""
    came, tensor = None, biases.tensor_of(inp.attn_bias)
    if tensor is not inp.attn_bias and tensor is not None and tensor.requires_grad:
        came = "attn_bias is a LowerTriangularMaskWithTensorBias whose tensor requires a gradient"
    elif inp.query.dim() == 5 and requires_gradient(inp):
        came = "query has 5 dimensions, and an input requires a gradient"
    if came is not None:
        raise NotImplementedError(
            f"{came}; accepted with op=: what requires none. Leave out op=, after "
            "flash_attn_jit.integrations.xformers.register()"
        )


class BwOp(_Operator, AttentionBwOpBase):  # type: ignore[misc]
    """The backward pass of FwOp."""

    NAME = "flash_attn_jitB"
    SUPPORTED_MAX_K = MOST_HEAD_DIM_OF_GRADIENTS
    SUPPORTS_BMGHK = False
    SUPPORTS_ATTN_BIAS_GRAD = True

    @classmethod
    def not_supported_reasons(cls, d: Any) -> list[str]:
        reason = refusal(d) or operator_gradient_refusal(d)
        return [] if reason is None else [reason]

    @classmethod
    def apply(cls, ctx: Any, inp: Any, grad: torch.Tensor) -> Any:
        """The gradients, of the inputs' shapes."""
        call = _read(inp, grouped=False)
        q, k, v, options = call
        call = call._replace(options=options._replace(dropout_seed=ctx.rng_state))
        dout, out = (x.reshape(*q.shape[:-1], v.shape[-1]) for x in (grad.to(q.dtype), ctx.out))
        lse = ctx.lse if options.cu_seqlens_q is None else ctx.lse[0]
        lse = lse[..., : q.shape[-3]]  # other operators' may be padded
        # See _shaped_lse(): that of parts.
        lse = lse.masked_fill(lse == float("-inf"), float("inf")).contiguous()
        tensor = biases.tensor_of(inp.attn_bias)
        wants_bias = tensor is not None and tensor.requires_grad
        dq, dk, dv, db = _backward(call, dout, out, lse, (True, True, True, wants_bias, False))
        behind = inp.key.shape[1] - k.shape[1] if options.cu_seqlens_q is None else 0
        if behind:  # see keys_seen()
            dk, dv = (torch.nn.functional.pad(x, (0, 0, 0, 0, 0, behind)) for x in (dk, dv))
        return Gradients(dq=dq.view(inp.query.shape), dk=dk.view(inp.key.shape), dv=dv.view(inp.value.shape), db=db)


def _backward(
    call: _Call, dout: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, wanted: tuple[bool, ...]
) -> tuple[Any, ...]:
    """Of q, k, v and the bias; None for the bias where it is not wanted."""
    q, k, v, options = call
    if is_plain(q, k, v) and are_plain((dout, *tensors_of(options))):
        return ops.compute_gradients(SEPARATE, dout, (q, k, v), out, lse, None, wanted, options)[:4]
    *gradients, db, _ = SEPARATE.backward(dout, q, k, v, out, lse, None, wanted, *options)
    return (*gradients, db if wanted[3] else None)
