"""``flash_attn.flash_attn_interface``: the public functions, and of the private ones those that other libraries call.

Those come as a forward and a backward pass, without autograd: ``_flash_attn_forward`` and its like, also with
``_wrapped`` before their name, and the compiled module, ``flash_attn_gpu``. Their ``rng_state`` is the seed of this
library's dropout, (2), int64.
"""

from typing import Any

import torch

from flash_attn_jit import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)
from flash_attn_jit._arguments import max_seqlen
from flash_attn_jit._options import Options
from flash_attn_jit.integrations import _passes
from flash_attn_jit.interface import read_options

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]

# out, softmax_lse, S_dmask, rng_state
_Forward = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def _forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    options: Options,
    return_softmax: bool,
    out: torch.Tensor | None = None,
) -> _Forward:
    if out is None:
        out, softmax_lse, seed = _passes.forward(q, k, v, options)
    else:
        out, softmax_lse, seed = _passes.write_into(out, q, k, v, options)
    # Without dropout nobody reads it.
    rng_state = torch.empty(2, dtype=torch.int64, device=q.device) if seed is None else seed.to(torch.int64)
    return out, softmax_lse, _passes.s_dmask(q, k, softmax_lse, options, seed, return_softmax), rng_state


def _backward(
    dout: torch.Tensor,
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    out: torch.Tensor,
    softmax_lse: torch.Tensor,
    gradients: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    options: Options,
    rng_state: torch.Tensor | None,
) -> None:
    seed = None if rng_state is None or options.dropout_p == 0.0 else rng_state.to(torch.int32)
    _passes.backward(dout, *inputs, out, softmax_lse, options, seed, gradients)


def _flash_attn_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: torch.Tensor | None,
    return_softmax: bool,
) -> _Forward:
    window = (window_size_left, window_size_right)
    options = read_options(dropout_p, softmax_scale, causal, window, softcap, alibi_slopes, False)
    return _forward(q, k, v, options, return_softmax)


def _flash_attn_varlen_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    return_softmax: bool = False,
    block_table: torch.Tensor | None = None,
    leftpad_k: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    zero_tensors: bool = False,
) -> _Forward:
    """zero_tensors: accepted; rows of no sequence are undefined either way."""
    options = read_options(
        dropout_p,
        softmax_scale,
        causal,
        (window_size_left, window_size_right),
        softcap,
        alibi_slopes,
        False,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen("max_seqlen_q", max_seqlen_q),
        max_seqlen("max_seqlen_k", max_seqlen_k),
        seqused_k=seqused_k,
        leftpad_k=leftpad_k,
        block_table=block_table,
    )
    return _forward(q, k, v, options, return_softmax)


def _flash_attn_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    softmax_lse: torch.Tensor,
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: torch.Tensor | None,
    deterministic: bool,
    rng_state: torch.Tensor | None = None,
) -> None:
    """Writes dq, dk and dv. The softmax's own gradient, which flash-attn returns, stays inside."""
    window = (window_size_left, window_size_right)
    options = read_options(dropout_p, softmax_scale, causal, window, softcap, alibi_slopes, deterministic)
    _backward(dout, (q, k, v), out, softmax_lse, (dq, dk, dv), options, rng_state)


def _flash_attn_varlen_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    softmax_lse: torch.Tensor,
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: torch.Tensor | None,
    deterministic: bool,
    rng_state: torch.Tensor | None = None,
    zero_tensors: bool = False,
) -> None:
    """As _flash_attn_backward(). zero_tensors: accepted; rows of no sequence are undefined either way."""
    options = read_options(
        dropout_p,
        softmax_scale,
        causal,
        (window_size_left, window_size_right),
        softcap,
        alibi_slopes,
        deterministic,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen("max_seqlen_q", max_seqlen_q),
        max_seqlen("max_seqlen_k", max_seqlen_k),
    )
    _backward(dout, (q, k, v), out, softmax_lse, (dq, dk, dv), options, rng_state)


_wrapped_flash_attn_forward = _flash_attn_forward
_wrapped_flash_attn_varlen_forward = _flash_attn_varlen_forward
_wrapped_flash_attn_backward = _flash_attn_backward
_wrapped_flash_attn_varlen_backward = _flash_attn_varlen_backward


class flash_attn_gpu:
    """flash-attn's compiled module, in its order of arguments: ``fwd``, ``varlen_fwd``, ``bwd``, ``varlen_bwd``."""

    @staticmethod
    def fwd(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor | None,
        alibi_slopes: torch.Tensor | None,
        dropout_p: float,
        softmax_scale: float,
        causal: bool,
        window_size_left: int,
        window_size_right: int,
        softcap: float,
        return_softmax: bool,
        generator: Any,
    ) -> _Forward:
        _refuse_generator(generator)
        window = (window_size_left, window_size_right)
        options = read_options(dropout_p, softmax_scale, causal, window, softcap, alibi_slopes, False)
        return _forward(q, k, v, options, return_softmax, out)

    @staticmethod
    def varlen_fwd(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor | None,
        cu_seqlens_q: torch.Tensor,
        cu_seqlens_k: torch.Tensor,
        seqused_k: torch.Tensor | None,
        leftpad_k: torch.Tensor | None,
        block_table: torch.Tensor | None,
        alibi_slopes: torch.Tensor | None,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float,
        softmax_scale: float,
        zero_tensors: bool,
        causal: bool,
        window_size_left: int,
        window_size_right: int,
        softcap: float,
        return_softmax: bool,
        generator: Any,
    ) -> _Forward:
        _refuse_generator(generator)
        options = read_options(
            dropout_p,
            softmax_scale,
            causal,
            (window_size_left, window_size_right),
            softcap,
            alibi_slopes,
            False,
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen("max_seqlen_q", max_seqlen_q),
            max_seqlen("max_seqlen_k", max_seqlen_k),
            seqused_k=seqused_k,
            leftpad_k=leftpad_k,
            block_table=block_table,
        )
        return _forward(q, k, v, options, return_softmax, out)

    @staticmethod
    def bwd(
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        softmax_lse: torch.Tensor,
        dq: torch.Tensor,
        dk: torch.Tensor,
        dv: torch.Tensor,
        alibi_slopes: torch.Tensor | None,
        dropout_p: float,
        softmax_scale: float,
        causal: bool,
        window_size_left: int,
        window_size_right: int,
        softcap: float,
        deterministic: bool,
        generator: Any,
        rng_state: torch.Tensor | None,
    ) -> None:
        _refuse_generator(generator)
        window = (window_size_left, window_size_right)
        options = read_options(dropout_p, softmax_scale, causal, window, softcap, alibi_slopes, deterministic)
        _backward(dout, (q, k, v), out, softmax_lse, (dq, dk, dv), options, rng_state)

    @staticmethod
    def varlen_bwd(
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        softmax_lse: torch.Tensor,
        dq: torch.Tensor,
        dk: torch.Tensor,
        dv: torch.Tensor,
        cu_seqlens_q: torch.Tensor,
        cu_seqlens_k: torch.Tensor,
        alibi_slopes: torch.Tensor | None,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float,
        softmax_scale: float,
        zero_tensors: bool,
        causal: bool,
        window_size_left: int,
        window_size_right: int,
        softcap: float,
        deterministic: bool,
        generator: Any,
        rng_state: torch.Tensor | None,
    ) -> None:
        _refuse_generator(generator)
        options = read_options(
            dropout_p,
            softmax_scale,
            causal,
            (window_size_left, window_size_right),
            softcap,
            alibi_slopes,
            deterministic,
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen("max_seqlen_q", max_seqlen_q),
            max_seqlen("max_seqlen_k", max_seqlen_k),
        )
        _backward(dout, (q, k, v), out, softmax_lse, (dq, dk, dv), options, rng_state)


def _refuse_generator(generator: Any) -> None:
    if generator is not None:
        raise ValueError(
            "generator is given; accepted: None. Dropout's seeds are drawn by torch's own: torch.manual_seed"
        )
