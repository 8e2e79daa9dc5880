"""What a mask function of transformers shows, as far as the kernels do that themselves."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers.masking_utils import causal_mask_function

MaskFunction = Callable[..., Any]


class Pattern(NamedTuple):
    causal: bool = False
    window: int | None = None
    sequences: torch.Tensor | None = None  # (batch, queries): the number of each one's packed sequence


def read_pattern(function: MaskFunction) -> Pattern | None:
    """None for a mask that is more than causal or not, a window and packed sequences. What transformers makes of these
    is a function that calls others: they are known by their names, and what they hold is in their closures."""
    pattern: Pattern | None = Pattern()
    for part in _parts(function):
        pattern = pattern and _with_part(pattern, part)
    return pattern


def read_traced_pattern(function: MaskFunction, config: Any, options: dict[str, Any]) -> Pattern | None:
    """The same while torch.compile traces, which does not let one look into closures: packed sequences are not told
    from what the kernels do not do."""
    window = options.get("local_size")
    if window is None:
        if function is causal_mask_function:
            return Pattern(causal=True)
        return Pattern() if function.__qualname__ == "bidirectional_mask_function" else None
    is_window = window == getattr(config, "sliding_window", None)
    if not is_window or getattr(config, "attention_chunk_size", None) is not None:
        return None
    # transformers allows to leave a mask out only where nothing else is joined to it.
    if options.get("allow_is_bidirectional_skip"):
        return Pattern(window=window)
    return Pattern(causal=True, window=window) if options.get("allow_is_causal_skip") else None


def _parts(function: MaskFunction) -> list[MaskFunction]:
    """Those that all have to show a key, of which it is made."""
    owner = function.__qualname__.partition(".<locals>")[0]
    if owner == "and_masks":
        return [part for joined in _held(function)["mask_functions"] for part in _parts(joined)]
    if owner == "remap_positions_for_packed_sequence":  # the same over positions in each sequence
        return _parts(_held(function)["mask_function"])
    return [function]


def _held(function: MaskFunction) -> dict[str, Any]:
    """What a function has in its closure, by the names there."""
    cells = function.__closure__ or ()
    return {name: cell.cell_contents for name, cell in zip(function.__code__.co_freevars, cells)}


def _with_part(pattern: Pattern, part: MaskFunction) -> Pattern | None:
    owner = part.__qualname__.partition(".<locals>")[0]
    if owner == "causal_mask_function":
        return pattern._replace(causal=True)
    if owner == "bidirectional_mask_function":
        return pattern
    if owner in ("sliding_window_overlay", "sliding_window_bidirectional_overlay"):
        return pattern._replace(window=_held(part)["sliding_window"])
    if owner == "packed_sequence_mask_function":
        return pattern._replace(sequences=_held(part)["packed_sequence_mask"])
    return None
