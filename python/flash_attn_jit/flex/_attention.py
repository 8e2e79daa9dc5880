"""flex_attention: attention with a user's functions of scores and pairs inside of the kernel."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.autograd.function import Function

from .. import _core, ops
from .._arguments import number, reject_what_is_no_tensor, truth
from .._autograd import cast_for_autocast, refuse_second_derivative
from .._options import Options
from .._sdpa import MOST_HEAD_DIM, MOST_HEAD_DIM_OF_GRADIENTS, find_refusal, refusal_of
from .._torch_internals import transforms_are_active
from ..errors import Refusal, UnsupportedError
from ._block_mask import BlockLists, read_block_mask
from ._expressions import MOST_PLACE
from ._trace import trace

_NAMES = ("query", "key", "value")
_Gradient = torch.Tensor | None


class UserFunctions(NamedTuple):
    """What kernels are told of a call's functions. The compiled module reads the fields by name."""

    code: int  # the number of what they compute
    has_score: bool
    only_adds: bool  # to a score something that the score has no part in
    tensors: tuple[torch.Tensor, ...]  # captured
    block_mask: BlockLists | None


# The compiled module keeps a code for the life of the process.
_number_of = functools.lru_cache(maxsize=4096)(_core.keep_user_functions)


class _FlexAttention(Function):
    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, user: UserFunctions, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        options = Options(softmax_scale=scale, has_backward=any(ctx.needs_input_grad[:3]))
        out, softmax_lse = ops.compute(q, k, v, options, user=user)
        ctx.save_for_backward(q, k, v, out, softmax_lse, *user.tensors)
        ctx.user, ctx.options = user._replace(tensors=()), options
        ctx.set_materialize_grads(False)
        return out, softmax_lse

    @staticmethod
    def backward(ctx: Any, dout: _Gradient, dlse: _Gradient) -> tuple[_Gradient, ...]:
        if torch.is_grad_enabled():
            refuse_second_derivative()
        if dout is None and dlse is None:
            return (None,) * 5
        q, k, v, out, softmax_lse, *tensors = ctx.saved_tensors
        dout = torch.zeros_like(out) if dout is None else dout.resolve_neg()
        wanted, user = ctx.needs_input_grad[:3], ctx.user._replace(tensors=tuple(tensors))
        gradients = ops.compute_gradients(
            ops.SEPARATE, dout, (q, k, v), out, softmax_lse, dlse, wanted, ctx.options, user
        )
        return (*gradients[:3], None, None)


_apply: Callable[..., tuple[torch.Tensor, torch.Tensor]] = _FlexAttention.apply


def flex_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    score_mod: Callable[..., Any] | None = None,
    block_mask: Any = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention whose scores go through a function of yours, as torch.nn.attention.flex_attention.flex_attention
    defines it: softmax(score_mod(query key^T * scale) + mask) value, in one kernel, forward and backward.

    ``score_mod(score, b, h, q_idx, kv_idx)`` and the block mask's ``mask_mod(b, h, q_idx, kv_idx)`` are called once a
    call, with stand-ins for their arguments, and become part of the kernel: it is compiled at the first call of a
    function that computes something new, whatever its name. Python numbers that they use are constants of the kernel;
    tensors that they capture are read by it, on the device, at most 8 of them; an index beyond a tensor's ends is the
    nearest that there is. ``flash_attn_jit.flex.OPERATORS`` lists what they may use.
    Under torch.compile the call is a graph break.

    Args:
        query: (batch, num_heads, seqlen_q, head_dim), of the dtypes of flash_attn_func. Only the last dimension must be
            contiguous.
        key: (batch, num_heads_k, seqlen_k, head_dim); or with a batch of 1, for all, where block_mask has query's.
        value: (batch, num_heads_k, seqlen_k, head_dim of value); or with a batch of 1, as key.
        score_mod: returns the score that takes the place of `score`, in float32; -inf hides the pair. Its derivative is
            made by rule. A tensor that it captures has no gradient: one that needs it is refused (flash_attn_func's
            ``attn_bias`` has one).
        block_mask: a BlockMask of torch.nn.attention.flex_attention.create_block_mask(): blocks that it does not list
            are left out, and its mask_mod is asked of those alone that it does not list as full. BLOCK_SIZE: multiples
            of 64; 128, the default, is fastest. What a list holds is not checked on a GPU, but no row beyond the
            tensors is read.
        scale: a factor for the scores, from -1e17 to 1e17; 1/sqrt(head_dim) where None.
        enable_gqa: num_heads may be a multiple of num_heads_k.
        return_lse: also return the natural logarithm of the softmax's denominator, -inf where a query sees no key. It
            has a gradient.

    Returns:
        out (batch, num_heads, seqlen_q, head_dim of value), of query's dtype, 0 where a query sees no key; or
        (out, lse), lse (batch, num_heads, seqlen_q), float32.

    Raises:
        ValueError: an argument that does not fit.
        UnsupportedError: a ValueError for what the device or a kernel cannot do.
        NotImplementedError: a function that cannot become part of a kernel: names the operator and its line; a tensor
            that it captures and that needs a gradient.
        CompileError, MissingKernelError, DriverError, InterpreterError, ConfigError: RuntimeErrors, see
            ``flash_attn_jit.errors``.
    """
    arguments = (query, key, value, score_mod, block_mask, scale, enable_gqa, return_lse)
    if torch.compiler.is_compiling():
        from ._outside_of_graphs import call_outside_of_graphs  # imports the compiler, which is there

        return call_outside_of_graphs(*arguments)
    return call(*arguments)


def call(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    score_mod: Callable[..., Any] | None,
    block_mask: Any,
    scale: float | None,
    enable_gqa: bool,
    return_lse: bool,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """flex_attention() where no compiler looks on."""
    _check_kinds(query, key, value)
    lists = read_block_mask(block_mask, query, key)
    if lists is not None:
        _check_block_mask_head_dim(query, value)
    key, value = _with_batch(query, lists, key, value)
    _check_tensors(query, key, value, truth("enable_gqa", enable_gqa))
    user = UserFunctions(0, False, False, (), None)
    if score_mod is not None or lists is not None:
        traced = trace(score_mod, None if lists is None else block_mask.mask_mod, query.device)
        user = UserFunctions(_number_of(traced.code), score_mod is not None, traced.only_adds, traced.tensors, lists)
    if lists is not None and lists.q_num_blocks is None:
        _refuse_gradient_without_queries(query, key, value)
    scale = 1.0 / math.sqrt(max(query.shape[-1], 1)) if scale is None else number("scale", scale)
    out, lse = _attend(query, key, value, user, scale)
    out = out.transpose(1, 2)
    if not truth("return_lse", return_lse):
        return out
    return out, lse.masked_fill(lse == math.inf, -math.inf)


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, user: UserFunctions, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    # Kernels read a tensor as it lies in memory.
    q, k, v = (cast_for_autocast(tensor).resolve_neg().transpose(1, 2) for tensor in (query, key, value))
    try:
        return _apply(q, k, v, user, scale)
    except ValueError as error:
        refusal = refusal_of(error)
        if refusal is None:
            raise
        raise refusal.exception() from None


def _check_kinds(query: Any, key: Any, value: Any) -> None:
    tensors = dict(zip(_NAMES, (query, key, value)))
    if not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        reject_what_is_no_tensor(**tensors)
    if transforms_are_active():
        raise NotImplementedError("flex_attention is not built yet inside of the transforms of torch.func")
    for name, tensor in tensors.items():
        if not tensor.is_nested and tensor.dim() != 4:
            came = f"has {tensor.dim()} dimensions, shape {tuple(tensor.shape)}"
            raise Refusal(name, came, "4, (batch, num_heads, seqlen, head_dim)").exception()


def _check_tensors(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, enable_gqa: bool) -> None:
    refusal = find_refusal(query, key, value, None, 0.0, False, enable_gqa)
    if refusal:
        raise refusal.exception()
    for name, tensor in (("query", query), ("key", key)):  # what is traced counts on it
        if max(tensor.shape[:3]) > MOST_PLACE:
            came = f"has shape {tuple(tensor.shape)}"
            accepted = f"at most {MOST_PLACE} sequences, heads and rows, whose places a function can tell apart"
            raise Refusal(name, came, accepted, error=UnsupportedError).exception()


def _check_block_mask_head_dim(query: torch.Tensor, value: torch.Tensor) -> None:
    for name, tensor in (("query", query), ("value", value)):
        if MOST_HEAD_DIM_OF_GRADIENTS < tensor.shape[-1] <= MOST_HEAD_DIM:
            came = f"has head_dim {tensor.shape[-1]}, and there is a block_mask"
            accepted = f"1 to {MOST_HEAD_DIM_OF_GRADIENTS} with one; 1 to {MOST_HEAD_DIM} with a score_mod alone"
            raise Refusal(name, came, accepted, error=UnsupportedError).exception()


def _with_batch(
    query: torch.Tensor, lists: BlockLists | None, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values that all sequences share, as torch has it: with a block mask alone, which tells them apart."""
    batch = query.shape[0]
    if key.shape[0] == batch or key.shape[0] != 1 or lists is None or lists.kv_num_blocks.shape[0] != batch:
        return key, value
    return key.expand(batch, -1, -1, -1), value.expand(batch, -1, -1, -1)


def _refuse_gradient_without_queries(*tensors: torch.Tensor) -> None:
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        came = "has no q_num_blocks, which a backward pass reads"
        accepted = "a BlockMask with them: BlockMask.from_kv_blocks(..., compute_q_blocks=True)"
        raise Refusal("block_mask", came, accepted).exception()
