"""``flash_attn_with_kvcache``: attention over a cache of keys and values, and what is appended to it."""

import re
from typing import Any

import torch

from . import _core
from ._arguments import (
    UNBOUNDED,
    Window,
    check_tensor_of,
    is_integer,
    refuse_gradient,
    reject_what_is_no_tensor,
    truth,
)
from ._autograd import attention_over_cache, cast_for_autocast
from ._options import tensors_of
from .errors import Refusal, kind_text
from .interface import documented, read_options
from .ops import append, are_plain, is_plain

# As attention() has them, and as a call does.
_NAMES = {"k": "k_cache", "v": "v_cache"}
_LENGTHS = {"seqused_k": "cache_seqlens", "leftpad_k": "cache_leftpad"}
_NAME, _LENGTH = (re.compile(rf"\b({'|'.join(names)})\b") for names in (_NAMES, _LENGTHS))
_ROW_OF_TABLE = re.compile(r"block_table(\[\d+\])\[0\] is (-?\d+).*")

_MOST_ROWS = 2**31 - 1

_WITHOUT_GRADIENT = ("q", "k_cache", "v_cache", "k", "v", "rotary_cos", "rotary_sin", "attn_bias", "s_aux")


def _of_cache(error: ValueError) -> ValueError:
    """attention()'s, with the names that k and v have here."""
    return type(error)(_NAME.sub(lambda name: _NAMES[name[0]], str(error)))


def _of_call(error: ValueError, k_cache: torch.Tensor, cache_batch_idx: Any) -> ValueError:
    """With the names that lengths have here, and cache_batch_idx where the table was made of it."""
    text = _LENGTH.sub(lambda name: _LENGTHS[name[0]], str(error))
    if cache_batch_idx is not None:
        accepted = f"0 to {k_cache.shape[0] - 1}, the sequences of the cache"
        text = _ROW_OF_TABLE.sub(rf"cache_batch_idx\1 is \2; accepted: {accepted}", text)
        text = text.replace("(pages, page size, ", "(batch, seqlen, ")
    return type(error)(text)


def _lengths(cache_seqlens: Any, q: torch.Tensor) -> torch.Tensor | None:
    """(batch), int32. An int is a constant of a CUDA graph."""
    if cache_seqlens is None:
        return None
    if isinstance(cache_seqlens, torch.Tensor):
        return cache_seqlens
    if not is_integer(cache_seqlens):
        accepted = "None, an int, or an int32 tensor of (batch)"
        raise Refusal("cache_seqlens", f"is {kind_text(cache_seqlens)}", accepted).exception()
    if not torch.compiler.is_compiling() and not 0 <= cache_seqlens <= _MOST_ROWS:
        raise Refusal("cache_seqlens", f"is {cache_seqlens}", "0 to the rows of the cache").exception()
    return torch.full((q.shape[0],), cache_seqlens, dtype=torch.int32, device=q.device)


def _table(block_table: Any, cache_batch_idx: Any, batch: int) -> torch.Tensor | None:
    """Rows of the cache that are not in a batch's order are pages, one for each sequence."""
    if cache_batch_idx is None:
        table: torch.Tensor | None = block_table
        return table
    check_tensor_of("cache_batch_idx", cache_batch_idx, "(batch), int32")
    if block_table is not None:
        raise Refusal("cache_batch_idx", "comes with a block_table", "one of them").exception()
    if cache_batch_idx.shape != (batch,) or cache_batch_idx.dtype is not torch.int32:
        came = f"has shape {tuple(cache_batch_idx.shape)} and dtype {cache_batch_idx.dtype}"
        raise Refusal("cache_batch_idx", came, f"({batch},), as q has sequences, torch.int32").exception()
    rows: torch.Tensor = cache_batch_idx[:, None]
    return rows


def _check_new(k: Any, v: Any, rotary_cos: Any, rotary_sin: Any, cache_seqlens: Any) -> None:
    """What is given together."""
    if k is None and v is None and rotary_cos is None and rotary_sin is None:
        return
    for name, one, other, with_it in (
        ("v", k, v, "k"),
        ("k", v, k, "v"),
        ("rotary_sin", rotary_cos, rotary_sin, "rotary_cos"),
        ("rotary_cos", rotary_sin, rotary_cos, "rotary_sin"),
        ("k", rotary_cos, k, "rotary_cos"),
        ("cache_seqlens", k, cache_seqlens, "k"),
    ):
        if one is not None and other is None:
            raise Refusal(name, f"is None, and {with_it} is given", "both, or neither").exception()
    reject_what_is_no_tensor(k=k, v=v)
    if rotary_cos is not None:
        reject_what_is_no_tensor(rotary_cos=rotary_cos, rotary_sin=rotary_sin)


def _new_rows(k: torch.Tensor, batch: int) -> int:
    if k.dim() != 4:
        _core.refuse_rank("k", k, False)
    if k.shape[0] != batch:
        raise Refusal("k", f"has shape {tuple(k.shape)}", f"q's batch, {batch}").exception()
    return k.shape[1]


@documented
def flash_attn_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    rotary_cos: torch.Tensor | None = None,
    rotary_sin: torch.Tensor | None = None,
    cache_seqlens: int | torch.Tensor | None = None,
    cache_batch_idx: torch.Tensor | None = None,
    cache_leftpad: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = UNBOUNDED,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: torch.Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    *,
    attn_bias: torch.Tensor | None = None,
    s_aux: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention of some queries over a cache of keys and values. ``k`` and ``v`` are appended to it in place first, and
    stay there where attention's own arguments are refused. Without gradients: call it inside of torch.no_grad().

    {running}

    Lengths, tables and paddings are read on the device: nothing waits for it, and one captured CUDA graph serves every
    later length. On a GPU they are not checked, but nothing outside of the tensors is read or written; the interpreter
    names what does not fit. Rows that are appended may lie neither in k or v nor, of two sequences, in the same place:
    which of them stays is undefined. Autocast casts q, k and v, and not the cache.

    Args:
        q: (batch, seqlen_q, num_heads, head_dim), float16 or bfloat16. Of every tensor only the last dimension must be
            contiguous.
        k_cache: (batch of the cache, rows, num_heads_k, head_dim), of q's dtype, or with ``block_table`` (pages, page
            size, num_heads_k, head_dim).
        v_cache: like k_cache, with a head dim of its own.
        k: (batch, seqlen_new, num_heads_k, head_dim), of q's dtype: goes into rows cache_seqlens and on.
        v: like k, with v_cache's head dim.
        rotary_cos: (places, rotary dim / 2), of q's dtype: k and q are turned by their places, new row i by that of row
            cache_seqlens + i. With ``causal`` or a window query i has place cache_seqlens + i, else all have place
            cache_seqlens. The rotary dim is even, and at most head_dim.
        rotary_sin: like rotary_cos.
        cache_seqlens: (batch), int32, or an int: rows that each sequence has in the cache, before ``k``; all where
            None, which is not accepted with ``k``. An int is a constant of a CUDA graph.
        cache_batch_idx: (batch), int32: which sequence of the cache each sequence of the batch is; the first ones where
            None.
        cache_leftpad: (batch), int32: how many of a sequence's first rows are padding.
        block_table: (batch, pages of a sequence), int32: rows p * page size and on of sequence b lie in page
            block_table[b, p]. Pages of any size; those of a multiple of 16 rows are the fast ones.
        softmax_scale: a factor for the scores before the softmax; 1/sqrt(head_dim) where None.
        causal: query i sees key j where j <= i + keys - seqlen_q (aligned bottom-right).
        window_size: (left, right), as ``flash_attn_func`` has it.
        softcap: a score s becomes softcap * tanh(s / softcap); 0.0 is off.
        rotary_interleaved: pairs that are turned are dims 2i and 2i + 1, or i and i + rotary dim / 2.
        alibi_slopes: (num_heads) or (batch, num_heads), float32.
        num_splits: where the queries are few, the most parts that the keys are split into; 0: as many as pay.
        return_softmax_lse: also return softmax_lse.
        {bias} seqlen_k is the rows that a sequence has room for.
        {sinks}

    Returns:
        out (batch, seqlen_q, num_heads, head_dim), of q's dtype and contiguous; or, with ``return_softmax_lse``, (out,
        softmax_lse), (batch, num_heads, seqlen_q), float32. A query that sees no key has out 0 and softmax_lse +inf.

    Raises:
        {raises}
    """
    if not (isinstance(q, torch.Tensor) and isinstance(k_cache, torch.Tensor) and isinstance(v_cache, torch.Tensor)):
        reject_what_is_no_tensor(q=q, k_cache=k_cache, v_cache=v_cache)
    _check_new(k, v, rotary_cos, rotary_sin, cache_seqlens)
    if torch.is_grad_enabled():
        given = (q, k_cache, v_cache, k, v, rotary_cos, rotary_sin, attn_bias, s_aux)
        for name, tensor in zip(_WITHOUT_GRADIENT, given):
            if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                refuse_gradient(name)
    if q.dim() != 4:
        _core.refuse_rank("q", q, False)
    batch = q.shape[0]
    lengths = _lengths(cache_seqlens, q)
    table = _table(block_table, cache_batch_idx, batch)
    if table is None and k_cache.dim() == 4 and k_cache.shape[0] > batch:
        k_cache, v_cache = k_cache[:batch], v_cache[:batch]
    rotary_interleaved = truth("rotary_interleaved", rotary_interleaved)
    try:
        options = read_options(
            0.0,
            softmax_scale,
            causal,
            window_size,
            softcap,
            alibi_slopes,
            False,
            attn_bias=attn_bias,
            s_aux=s_aux,
            seqused_k=lengths,
            leftpad_k=cache_leftpad,
            block_table=table,
            seqused_more=0 if k is None else _new_rows(k, batch),
            num_splits=num_splits,
        )
        plain = is_plain(q, k_cache, v_cache) and are_plain(tensors_of(options))
        q = cast_for_autocast(q)
        if k is not None and v is not None:
            plain = plain and are_plain((k, v, rotary_cos, rotary_sin))
            k, v = cast_for_autocast(k), cast_for_autocast(v)
            advances = options.causal or options.window_left >= 0 or options.window_right >= 0
            new = (k, v, k_cache, v_cache, lengths, table, q)
            turned = append(plain, *new, rotary_cos, rotary_sin, rotary_interleaved, advances)
            q = q if turned is None else turned
        try:
            out, softmax_lse = attention_over_cache(q, k_cache, v_cache, options, return_softmax_lse, plain)
        except ValueError as error:
            raise _of_cache(error) from None
    except ValueError as error:
        raise _of_call(error, k_cache, cache_batch_idx) from None
    return (out, softmax_lse) if return_softmax_lse else out
