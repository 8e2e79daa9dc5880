"""Between padded batches, (batch, seqlen, ...), and their rows without padding, (total, ...), which the varlen
functions take. All of it is differentiable.
"""

from typing import Optional, Tuple

import torch

__all__ = ["index_first_axis", "pad_input", "unpad_input"]


def index_first_axis(input: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """The rows of ``input`` that ``indices`` names, in its order.

    Args:
        input: (rows, ...), any dtype.
        indices: (n), int64 or int32, each from 0 to rows - 1.

    Returns:
        (n, ...), like input.

    Raises:
        ValueError: a tensor of another rank; names it.
    """
    if input.dim() < 1:
        raise ValueError("input has 0 dimensions. Accepted: 1 or more, (rows, ...).")
    _check_rank("indices", indices, "(n)")
    return input.index_select(0, indices)


def pad_input(hidden_states: torch.Tensor, indices: torch.Tensor, batch: int, seqlen: int) -> torch.Tensor:
    """Rows put back where unpad_input() took them from; zeros elsewhere.

    Args:
        hidden_states: (total, ...), any dtype.
        indices: (total), as from unpad_input(): each row's place in the flattened (batch, seqlen), each place once.
        batch: the padded batch's size.
        seqlen: the padded batch's length.

    Returns:
        (batch, seqlen, ...), like hidden_states.

    Raises:
        ValueError: hidden_states and indices are of different lengths, or of another rank.
    """
    _check_rank("indices", indices, "(total)")
    if hidden_states.dim() < 1 or hidden_states.shape[0] != indices.shape[0]:
        raise ValueError(
            f"hidden_states has shape {tuple(hidden_states.shape)} and indices {tuple(indices.shape)}. "
            "Accepted: (total, ...) and (total)."
        )
    rest = hidden_states.shape[1:]
    padded = hidden_states.new_zeros((batch * seqlen, *rest)).index_copy(0, indices.long(), hidden_states)
    return padded.view(batch, seqlen, *rest)


def unpad_input(
    hidden_states: torch.Tensor, attention_mask: torch.Tensor, unused_mask: Optional[torch.Tensor] = None
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor, int, torch.Tensor]:
    """The rows of a padded batch that are no padding, one sequence after the other, and what the varlen functions need
    beside them. Reading the lengths waits for the device.

    Args:
        hidden_states: (batch, seqlen, ...), any dtype.
        attention_mask: (batch, seqlen), bool or integers: nonzero where a row is used.
        unused_mask: like attention_mask: nonzero where a row is kept as well but not used; room that a later step
            fills, for instance. None for no such rows.

    Returns:
        - hidden_states (total, ...): the rows that are used or unused-but-kept;
        - indices (total), int64: their places in the flattened (batch, seqlen);
        - cu_seqlens (batch + 1), int32: where each sequence starts among them, and at last their number;
        - max_seqlen_in_batch: the most rows of one sequence;
        - seqused (batch), int32: how many rows of each sequence are used.

    Raises:
        ValueError: a mask whose shape is not (batch, seqlen); names it.
    """
    if hidden_states.dim() < 2:
        raise ValueError(
            f"hidden_states has {hidden_states.dim()} dimensions, shape {tuple(hidden_states.shape)}. "
            "Accepted: 2 or more, (batch, seqlen, ...)."
        )
    used = _as_bool("attention_mask", attention_mask, hidden_states)
    kept = used if unused_mask is None else used | _as_bool("unused_mask", unused_mask, hidden_states)
    seqlens = kept.sum(dim=1, dtype=torch.int32)
    indices = kept.flatten().nonzero().flatten()
    cu_seqlens = torch.nn.functional.pad(seqlens.cumsum(0, dtype=torch.int32), (1, 0))
    max_seqlen_in_batch = int(seqlens.max()) if seqlens.numel() else 0
    rows = index_first_axis(hidden_states.flatten(0, 1), indices)
    return rows, indices, cu_seqlens, max_seqlen_in_batch, used.sum(dim=1, dtype=torch.int32)


def _check_rank(name: str, tensor: torch.Tensor, layout: str) -> None:
    if tensor.dim() != 1:
        raise ValueError(
            f"{name} has {tensor.dim()} dimensions, shape {tuple(tensor.shape)}. Accepted: 1, {layout}."
        )


def _as_bool(name: str, mask: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
    if mask.shape != hidden_states.shape[:2]:
        raise ValueError(
            f"{name} has shape {tuple(mask.shape)}. Accepted: hidden_states' (batch, seqlen), "
            f"{tuple(hidden_states.shape[:2])}."
        )
    return mask != 0
