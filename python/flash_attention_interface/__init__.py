"""The six functions of ssiu/flash-attention-turing, in that project's argument order, on flash_attn_jit.

Programs written for it import this module and need no change. All return ``out`` alone and are differentiable. New
programs do better with ``flash_attn_jit``, whose functions take more: windows, functions of a score, softmax_lse.
"""

from typing import cast

import torch

import flash_attn_jit

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
]

_Length = int | torch.Tensor


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with a contiguous last dimension: that project copies where it is not."""
    if isinstance(tensor, torch.Tensor) and tensor.dim() and tensor.stride(-1) != 1:
        return tensor.contiguous()
    return tensor


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
) -> torch.Tensor:
    """Attention of q (batch, seqlen_q, num_heads, head_dim) over k and v (batch, seqlen_k, num_heads_k, head_dim),
    float16 or bfloat16. ``softmax_scale`` is 1/sqrt(head_dim) where None; ``causal`` is aligned bottom-right. Errors
    are ``flash_attn_jit.flash_attn_func``'s.

    Returns:
        out (batch, seqlen_q, num_heads, head_dim), of q's dtype.
    """
    return cast(
        torch.Tensor,
        flash_attn_jit.flash_attn_func(_rows(q), _rows(k), _rows(v), softmax_scale=softmax_scale, causal=causal),
    )


def flash_attn_kvpacked_func(
    q: torch.Tensor, kv: torch.Tensor, softmax_scale: float | None = None, causal: bool = False
) -> torch.Tensor:
    """``flash_attn_func`` for k and v in one kv (batch, seqlen_k, 2, num_heads_k, head_dim).

    Returns:
        out (batch, seqlen_q, num_heads, head_dim), of q's dtype.
    """
    return cast(
        torch.Tensor,
        flash_attn_jit.flash_attn_kvpacked_func(_rows(q), _rows(kv), softmax_scale=softmax_scale, causal=causal),
    )


def flash_attn_qkvpacked_func(
    qkv: torch.Tensor, softmax_scale: float | None = None, causal: bool = False
) -> torch.Tensor:
    """``flash_attn_func`` for q, k and v in one qkv (batch, seqlen, 3, num_heads, head_dim).

    Returns:
        out (batch, seqlen, num_heads, head_dim), of q's dtype.
    """
    return cast(
        torch.Tensor,
        flash_attn_jit.flash_attn_qkvpacked_func(_rows(qkv), softmax_scale=softmax_scale, causal=causal),
    )


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: _Length,
    max_seqlen_k: _Length,
    softmax_scale: float | None = None,
    causal: bool = False,
) -> torch.Tensor:
    """``flash_attn_func`` for sequences one after the other: q (total_q, num_heads, head_dim), k and v (total_k,
    num_heads_k, head_dim), whose starts and last end are in cu_seqlens_q and cu_seqlens_k, (batch + 1), int32.

    Returns:
        out (total_q, num_heads, head_dim), of q's dtype.
    """
    return cast(
        torch.Tensor,
        flash_attn_jit.flash_attn_varlen_func(
            _rows(q),
            _rows(k),
            _rows(v),
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen_q,
            max_seqlen_k,
            softmax_scale=softmax_scale,
            causal=causal,
        ),
    )


def flash_attn_varlen_kvpacked_func(
    q: torch.Tensor,
    kv: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: _Length,
    max_seqlen_k: _Length,
    softmax_scale: float | None = None,
    causal: bool = False,
) -> torch.Tensor:
    """``flash_attn_varlen_func`` for k and v in one kv (total_k, 2, num_heads_k, head_dim).

    Returns:
        out (total_q, num_heads, head_dim), of q's dtype.
    """
    return cast(
        torch.Tensor,
        flash_attn_jit.flash_attn_varlen_kvpacked_func(
            _rows(q),
            _rows(kv),
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen_q,
            max_seqlen_k,
            softmax_scale=softmax_scale,
            causal=causal,
        ),
    )


def flash_attn_varlen_qkvpacked_func(
    qkv: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: _Length,
    softmax_scale: float | None = None,
    causal: bool = False,
) -> torch.Tensor:
    """``flash_attn_varlen_func`` for q, k and v in one qkv (total, 3, num_heads, head_dim).

    Returns:
        out (total, num_heads, head_dim), of q's dtype.
    """
    return cast(
        torch.Tensor,
        flash_attn_jit.flash_attn_varlen_qkvpacked_func(
            _rows(qkv), cu_seqlens, max_seqlen, softmax_scale=softmax_scale, causal=causal
        ),
    )
