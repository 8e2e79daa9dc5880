"""The mask function of transformers' AttentionMaskInterface. What it makes: see _kinds."""

import inspect
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from transformers.masking_utils import causal_mask_function, sdpa_mask

from ._kinds import CAUSAL_FIRST, CAUSAL_LENGTHS, CAUSAL_SHOWN, SHOWN
from ._models import whole_masks
from ._packed import pack
from ._patterns import MaskFunction, Pattern, read_pattern, read_traced_pattern

_HAS_CACHE_POSITION = "cache_position" in inspect.signature(sdpa_mask).parameters  # transformers 4.57
_is_compiling = torch.compiler.is_compiling


class _Asked(NamedTuple):
    """What transformers asks a mask for. Keys and queries are rows of the layers' tensors; offsets are the places of
    the first ones in their sequences, a tensor where only the device knows."""

    batch: int
    queries: int
    keys: int
    query_offset: int | torch.Tensor
    key_offset: int
    padding: torch.Tensor | None  # (batch, places), bool
    device: Any


def turing_mask(
    batch_size: int,
    q_length: int = 0,
    kv_length: int = 0,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: MaskFunction = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    cache_position: torch.Tensor | None = None,
    device: Any = None,
    config: Any = None,
    **options: Any,
) -> torch.Tensor | None:
    """The mask function of AttentionMaskInterface: of transformers 4.57, with cache_position, and of 5.

    Waits for the device, once for all layers, where padding goes into a static cache (whose fill is a tensor) and where
    there may be packed sequences. Not while torch.compile traces: masks of all pairs are made then.
    """
    places: dict[str, Any] = {"q_length": q_length, "q_offset": q_offset, "device": device}
    if cache_position is not None:
        places = {"cache_position": cache_position}
        q_length, device = cache_position.shape[0], cache_position.device
        # What may be skipped there is the mask of a cache that is as long as what is in it.
        grows = options.get("allow_is_causal_skip", True)
        q_offset = kv_offset + kv_length - q_length if grows else cache_position[0]

    tracing = _is_compiling()
    pattern = read_traced_pattern(mask_function, config, options) if tracing else read_pattern(mask_function)
    if pattern is not None and not _is_to_be_whole(pattern, q_length, attention_mask, config, options):
        asked = _Asked(batch_size, q_length, kv_length, q_offset, kv_offset, attention_mask, device)
        is_made, mask = _make(pattern, asked, tracing)
        if is_made:
            return mask
    options.update(places, allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
    whole: torch.Tensor = sdpa_mask(
        batch_size=batch_size,
        kv_length=kv_length,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        config=config,
        **options,
    )
    return whole


def _is_to_be_whole(
    pattern: Pattern, queries: int, padding: torch.Tensor | None, config: Any, options: dict[str, Any]
) -> bool:
    if type(config) in whole_masks or (padding is not None and padding.dim() != 2):
        return True
    if not pattern.causal:
        return not options.get("allow_is_bidirectional_skip", True)
    # It may also not be skipped where a static cache is read by one query, and where sequences are packed.
    is_asked_for = not options.get("allow_is_causal_skip", True) and not _HAS_CACHE_POSITION
    return is_asked_for and queries > 1 and pattern.sequences is None


def _make(pattern: Pattern, asked: _Asked, tracing: bool) -> tuple[bool, torch.Tensor | None]:
    """Whether one is made here, and it."""
    if pattern.sequences is not None:
        return pack(pattern.sequences)
    offset = asked.query_offset
    if not pattern.causal:
        return True, _first_keys(asked, asked.keys, SHOWN)
    if not isinstance(offset, torch.Tensor):
        return True, _first_keys(asked, min(offset + asked.queries - asked.key_offset, asked.keys), CAUSAL_SHOWN)
    if asked.padding is None and not torch.is_grad_enabled():  # lengths go with no gradients
        seen = (offset + (asked.queries - asked.key_offset)).to(CAUSAL_LENGTHS)
        return True, seen.reshape(1, 1, 1, 1).expand(asked.batch, 1, 1, 1).contiguous()
    if asked.queries == 1:
        return True, _seen_by_one(asked, pattern.window)
    if tracing:
        return False, None
    return True, _first_keys(asked, min(int(offset) + asked.queries - asked.key_offset, asked.keys), CAUSAL_SHOWN)


def _first_keys(asked: _Asked, keys: int, kind: torch.dtype) -> torch.Tensor | None:
    """That so many are seen, but for padding among them."""
    shape = (asked.batch, 1, 1, keys)
    if asked.padding is None:
        return None if keys == asked.keys else torch.empty((), dtype=CAUSAL_FIRST, device=asked.device).expand(shape)
    return _not_padding(asked.padding, asked.key_offset, keys).view(kind)[:, None, None, :]


def _seen_by_one(asked: _Asked, window: int | None) -> torch.Tensor:
    """All that one query sees."""
    places = torch.arange(asked.key_offset, asked.key_offset + asked.keys, device=asked.device)
    seen = places <= asked.query_offset
    if window is not None and asked.keys > window:
        seen = seen & (places > asked.query_offset - window)
    if asked.padding is not None:
        seen = seen & _not_padding(asked.padding, asked.key_offset, asked.keys)
    return seen.expand(asked.batch, asked.keys)[:, None, None, :]


def _not_padding(padding: torch.Tensor, first: int, keys: int) -> torch.Tensor:
    """(batch, keys), bool: of the keys from that place on."""
    shown = padding[:, first : first + keys].to(torch.bool)
    return F.pad(shown, (0, keys - shown.shape[1])) if shown.shape[1] < keys else shown
