"""Between padded batches, (batch, seqlen, ...), and their rows without padding, (total, ...), which the varlen
functions take. All of it is differentiable.
"""

import torch

from .errors import Refusal

__all__ = [
    "index_first_axis",
    "index_put_first_axis",
    "pad_input",
    "unpad_input",
    "unpad_input_for_concatenated_sequences",
]


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
        raise Refusal("input", "has 0 dimensions", "1 or more, (rows, ...)").exception()
    _check_rank("indices", indices, "(n)")
    return input.index_select(0, indices)


def index_put_first_axis(values: torch.Tensor, indices: torch.Tensor, first_axis_dim: int) -> torch.Tensor:
    """The rows ``values`` put where ``indices`` says; zeros elsewhere. What index_first_axis() takes apart.

    Args:
        values: (n, ...), any dtype.
        indices: (n), int64 or int32, each from 0 to first_axis_dim - 1 and each once.
        first_axis_dim: how many rows there are.

    Returns:
        (first_axis_dim, ...), like values.

    Raises:
        ValueError: values and indices are of different lengths, or of another rank.
    """
    return _put_rows("values", values, "(n)", indices, first_axis_dim)


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
    padded = _put_rows("hidden_states", hidden_states, "(total)", indices, batch * seqlen)
    return padded.view(batch, seqlen, *hidden_states.shape[1:])


def unpad_input(
    hidden_states: torch.Tensor, attention_mask: torch.Tensor, unused_mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int, torch.Tensor]:
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
    _check_mask("attention_mask", attention_mask, hidden_states)
    used = kept = attention_mask != 0
    if unused_mask is not None:
        _check_mask("unused_mask", unused_mask, hidden_states)
        kept = used | (unused_mask != 0)
    seqlens = kept.sum(dim=1, dtype=torch.int32)
    indices = kept.flatten().nonzero().flatten()
    cu_seqlens = torch.nn.functional.pad(seqlens.cumsum(0, dtype=torch.int32), (1, 0))
    max_seqlen_in_batch = int(seqlens.max()) if seqlens.numel() else 0
    rows = index_first_axis(hidden_states.flatten(0, 1), indices)
    return rows, indices, cu_seqlens, max_seqlen_in_batch, used.sum(dim=1, dtype=torch.int32)


def unpad_input_for_concatenated_sequences(
    hidden_states: torch.Tensor, attention_mask_in_length: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """unpad_input() for a batch whose rows each hold several sequences, one after the other, and then padding. Reading
    the lengths waits for the device.

    Args:
        hidden_states: (batch, seqlen, ...), any dtype.
        attention_mask_in_length: (batch, seqlen), integers: the lengths of a row's sequences, and zeros. Where
            seqlen is 6, [2, 3, 0, 0, 0, 0] is a row with a sequence of 2, one of 3, and 1 of padding.

    Returns:
        - hidden_states (total, ...): the rows that are no padding;
        - indices (total), int64: their places in the flattened (batch, seqlen);
        - cu_seqlens (number of sequences + 1), int32: where each sequence starts among them, and at last their number;
        - max_seqlen_in_batch: the longest sequence's length.

    Raises:
        ValueError: lengths whose shape is not (batch, seqlen), that are no integers, or that do not fit; names them.
    """
    name, lengths = "attention_mask_in_length", attention_mask_in_length
    _check_mask(name, lengths, hidden_states)
    if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype is torch.bool:
        came = f"has dtype {lengths.dtype}"
        raise Refusal(name, came, "integers, the lengths of each row's sequences").exception()
    filled = lengths.sum(dim=1, keepdim=True)
    if lengths.numel() and not torch.compiler.is_compiling():
        shortest, most = torch.stack((lengths.min(), filled.max())).tolist()
        if shortest < 0 or most > lengths.shape[1]:
            came = f"has a length of {shortest} and a row with {most} in all"
            accepted = f"lengths of 0 or more, in each row at most seqlen, {lengths.shape[1]}"
            raise Refusal(name, came, accepted).exception()
    indices = (torch.arange(lengths.shape[1], device=lengths.device) < filled).flatten().nonzero().flatten()
    seqlens = lengths[lengths != 0]
    cu_seqlens = torch.nn.functional.pad(seqlens.cumsum(0, dtype=torch.int32), (1, 0))
    max_seqlen_in_batch = int(lengths.max()) if lengths.numel() else 0
    return index_first_axis(hidden_states.flatten(0, 1), indices), indices, cu_seqlens, max_seqlen_in_batch


def _put_rows(name: str, rows: torch.Tensor, layout: str, indices: torch.Tensor, number_of_rows: int) -> torch.Tensor:
    _check_rank("indices", indices, layout)
    if rows.dim() < 1 or rows.shape[0] != indices.shape[0]:
        came = f"has shape {tuple(rows.shape)} and indices {tuple(indices.shape)}"
        raise Refusal(name, came, f"{layout[:-1]}, ...) and {layout}").exception()
    return rows.new_zeros((number_of_rows, *rows.shape[1:])).index_copy(0, indices.long(), rows)


def _check_rank(name: str, tensor: torch.Tensor, layout: str) -> None:
    if tensor.dim() != 1:
        came = f"has {tensor.dim()} dimensions, shape {tuple(tensor.shape)}"
        raise Refusal(name, came, f"1, {layout}").exception()


def _check_mask(name: str, mask: torch.Tensor, hidden_states: torch.Tensor) -> None:
    if hidden_states.dim() < 2:
        came = f"has {hidden_states.dim()} dimensions, shape {tuple(hidden_states.shape)}"
        raise Refusal("hidden_states", came, "2 or more, (batch, seqlen, ...)").exception()
    if mask.shape != hidden_states.shape[:2]:
        accepted = f"hidden_states' (batch, seqlen), {tuple(hidden_states.shape[:2])}"
        raise Refusal(name, f"has shape {tuple(mask.shape)}", accepted).exception()
