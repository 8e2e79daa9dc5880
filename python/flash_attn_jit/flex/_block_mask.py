"""PyTorch's BlockMask, as far as kernels read it: lists of the blocks of pairs that are seen."""

from typing import Any, NamedTuple

import torch

from ..errors import Refusal, kind_text

_ACCEPTED = (
    "None, or a BlockMask of torch.nn.attention.flex_attention: create_block_mask(mask_mod, B, H, Q_LEN, KV_LEN)"
)

# torch's own mask for "everything" has one block that is longer than any sequence.
_LONGER_THAN_ANY = 1 << 30


class BlockLists(NamedTuple):
    """Of a block mask: for every block of queries the blocks of keys that it sees in part, and those that it sees
    whole; and the same for every block of keys. The compiled module reads the fields by name."""

    block_q: int  # queries of a block
    block_k: int
    blocks_k: int  # of keys, that there are
    kv_num_blocks: torch.Tensor  # (batch or 1, num_heads or 1, blocks of queries), int32
    kv_indices: torch.Tensor  # (batch or 1, num_heads or 1, blocks of queries, room)
    full_kv_num_blocks: torch.Tensor | None
    full_kv_indices: torch.Tensor | None
    q_num_blocks: torch.Tensor | None
    q_indices: torch.Tensor | None
    full_q_num_blocks: torch.Tensor | None
    full_q_indices: torch.Tensor | None


_LISTS = BlockLists._fields[3:]


def read_block_mask(block_mask: Any, query: torch.Tensor, key: torch.Tensor) -> BlockLists | None:
    """The lists of a block mask for (batch, num_heads, seqlen, head_dim) tensors; None where it is None or torch's own
    mask of all pairs."""
    if block_mask is None:
        return None
    if not all(hasattr(block_mask, name) for name in (*_LISTS, "BLOCK_SIZE", "mask_mod")):
        raise Refusal("block_mask", f"is {kind_text(block_mask)}", _ACCEPTED).exception()
    block_q, block_k = block_mask.BLOCK_SIZE
    if block_q >= _LONGER_THAN_ANY and block_k >= _LONGER_THAN_ANY:
        return None
    found: Any = [_contiguous(getattr(block_mask, name)) for name in _LISTS]
    lists = BlockLists(block_q, block_k, -(-key.shape[-2] // block_k), *found)
    _check_lengths(block_mask, lists, query.shape[-2], key.shape[-2])
    for name in _LISTS:
        tensor = getattr(lists, name)
        if tensor is not None and tensor.device != query.device:
            came = f"has {name} on {tensor.device} and query on {query.device}"
            raise Refusal("block_mask", came, "all on one device", "Use block_mask.to(query.device)").exception()
    return lists


def _contiguous(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _check_lengths(block_mask: Any, lists: BlockLists, seqlen_q: int, seqlen_k: int) -> None:
    # torch below 2.6 does not keep the lengths, but in blocks.
    lengths = getattr(block_mask, "seq_lengths", None)
    blocks_q = lists.kv_num_blocks.shape[-1]
    if lengths is None:
        fits = blocks_q == -(-seqlen_q // lists.block_q)
        came = f"has {blocks_q} blocks of {lists.block_q} queries"
    else:
        fits = tuple(lengths) == (seqlen_q, seqlen_k)
        came = f"was made for {lengths[0]} queries and {lengths[1]} keys"
    if lists.q_num_blocks is not None:
        fits = fits and lists.q_num_blocks.shape[-1] == lists.blocks_k
    if not fits:
        accepted = (
            f"one for the tensors' {seqlen_q} queries and {seqlen_k} keys: create_block_mask() with these lengths"
        )
        raise Refusal("block_mask", came, accepted).exception()
