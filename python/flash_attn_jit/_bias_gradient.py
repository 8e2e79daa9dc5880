"""The gradient of attn_bias: what the kernel sums into, and what is left to sum behind it. Nothing here grows with
seqlen_q x seqlen_k but the gradient of a bias that does."""

import torch

from ._options import Options

# Parts of the gradient, in tiles of 64 x 64 pairs, that keep a device busy: a T4 has 40 multiprocessors. One number for
# all devices, so that each adds in the same order.
_TILES, _TILE_SIDE = 160, 64

# See templates/attention_params.cuh: of a row below it a mask of numbers beyond float16's has left nothing.
_LEAST_LSE = -1e6

Shape = tuple[int, int, int, int]


def _of_four(bias: torch.Tensor) -> Shape:
    first, second, third, fourth = (*(1,) * (4 - bias.dim()), *bias.shape)
    return first, second, third, fourth


def _problem(q: torch.Tensor, k: torch.Tensor, options: Options) -> Shape:
    """(batch, num_heads, seqlen_q, seqlen_k), as attn_bias is broadcast to."""
    if options.cu_seqlens_q is None:
        return q.shape[0], q.shape[2], q.shape[1], k.shape[1]
    return options.cu_seqlens_q.shape[0] - 1, q.shape[1], options.max_seqlen_q, options.max_seqlen_k


def _parts(of_bias: Shape, problem: Shape) -> tuple[int, int]:
    """Into how many parts the sequences and the heads are divided that are summed, each by blocks of its own: more than
    one where the gradient has few tiles, and where it has one row, whose parts are small."""
    (batches, heads, rows, keys), (batch, num_heads, _, _) = of_bias, problem
    tiles = batches * heads * -(-rows // _TILE_SIDE) * -(-keys // _TILE_SIDE)
    missing = max(batch * num_heads if rows == 1 else _TILES // max(tiles, 1), 1)
    if heads == 1:
        heads = max(min(num_heads, missing), 1)
        missing //= heads
    if batches == 1:
        batches = max(min(batch, missing), 1)
    return batches, heads


def has_one_key(bias: torch.Tensor) -> bool:
    return bias.shape[-1] == 1


def room_for_sums(bias: torch.Tensor, q: torch.Tensor, k: torch.Tensor, options: Options) -> torch.Tensor:
    """What the kernel writes: (batches, heads, rows, keys), attn_bias's own or more of the first two."""
    of_bias, problem = _of_four(bias), _problem(q, k, options)
    shape = (*_parts(of_bias, problem), of_bias[2], problem[3])
    return torch.empty(shape, dtype=bias.dtype if shape == of_bias else torch.float32, device=bias.device)


def summed(parts: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Like attn_bias, contiguous, over what that is broadcast over."""
    ones = [d for d, (size, of_part) in enumerate(zip(_of_four(bias), parts.shape)) if size == 1 != of_part]
    sums = parts.sum(ones, keepdim=True) if ones else parts
    return sums.to(bias.dtype).view(bias.shape)


def gradient_of_one_key(
    bias: torch.Tensor,
    softmax_lse: torch.Tensor,
    delta: torch.Tensor,
    dlse: torch.Tensor | None,
    share_of_sinks: torch.Tensor | None,
    options: Options,
) -> torch.Tensor:
    """Of an attn_bias that is the same for all keys of a query: it moves softmax_lse and no probability, but where
    there is a sink, which is no key."""
    of_rows = torch.zeros_like(softmax_lse) if dlse is None else dlse
    if share_of_sinks is not None:
        of_rows = of_rows + share_of_sinks * delta
    sees_nothing = softmax_lse == float("inf")
    if bias.dtype is not torch.float16:
        sees_nothing |= softmax_lse < _LEAST_LSE
    of_rows = torch.where(sees_nothing, 0.0, of_rows)
    if options.cu_seqlens_q is not None:
        of_rows = of_sequences(of_rows, options.cu_seqlens_q, options.max_seqlen_q)
    return summed(of_rows[..., None], bias)


def of_sequences(of_rows: torch.Tensor, cu_seqlens: torch.Tensor, longest: int) -> torch.Tensor:
    """(batch, num_heads, longest) of (num_heads, total_q): 0 where a sequence has no such row."""
    total = of_rows.shape[1]
    rows = cu_seqlens[:-1, None] + torch.arange(longest, device=cu_seqlens.device)
    if total == 0:
        return of_rows.new_zeros(rows.shape[0], of_rows.shape[0], longest)
    values = of_rows[:, rows.clamp(max=total - 1)].transpose(0, 1)
    return torch.where((rows < cu_seqlens[1:, None])[:, None], values, 0.0)
