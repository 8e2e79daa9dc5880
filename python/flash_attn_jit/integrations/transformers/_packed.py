"""Sequences that are packed one behind the other into a row of the batch."""

import weakref
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ._kinds import CAUSAL_LENGTHS

_is_compiling = torch.compiler.is_compiling


def pack(sequences: torch.Tensor) -> tuple[bool, torch.Tensor | None]:
    """Whether layers can be given a mask of them, and it; None where each row of the batch is one sequence. Waits for
    the device.

    Args:
        sequences: (batch, queries), integers that are others from sequence to sequence of a row.
    """
    begins = torch.ones_like(sequences, dtype=torch.bool)
    begins[:, 1:] = sequences.diff() != 0
    mask = _pack_from(begins)
    if mask is not None and mask.shape[3] > sequences.shape[1]:
        return False, None  # some models cut masks to as many columns as there are keys
    return True, mask


def _pack_from(begins: torch.Tensor) -> torch.Tensor | None:
    """begins: (batch, queries): where a sequence does, as each row of the batch."""
    batch, queries = begins.shape
    first = begins.flatten().nonzero()[:, 0]
    if first.numel() == batch:
        return None
    ends = F.pad(first, (0, 1), value=batch * queries).to(CAUSAL_LENGTHS)
    longest = int(ends.diff().max())
    return ends.expand(1, 1, longest, -1)


class _Last(NamedTuple):
    """What a layer asked, which the next layers of the same pass ask again."""

    positions: "weakref.ReferenceType[torch.Tensor]"
    version: int | None  # None: nothing tells of changes
    layer: int
    mask: torch.Tensor | None

    def answers(self, positions: torch.Tensor, version: int | None, layer: int) -> bool:
        if self.positions() is not positions or self.version != version:
            return False
        return version is not None or layer > self.layer


_last: _Last | None = None


def find_packed(
    position_ids: torch.Tensor, q: torch.Tensor, k: torch.Tensor, module: torch.nn.Module
) -> torch.Tensor | None:
    """The mask of a batch of 1 whose positions begin anew. transformers looks for those itself where there is no cache,
    and tells the mask function; models make caches whenever they are not trained, though. Waits for the device, once
    for all layers. Nothing while torch.compile traces.

    Args:
        q: (batch, queries, heads, head_dim).
        k: (batch, keys, heads_k, head_dim).
        module: the layer.
    """
    global _last
    queries = q.shape[1]
    if q.shape[0] != 1 or queries == 1 or queries != k.shape[1] or position_ids.shape != (1, queries):
        return None
    if _is_compiling():
        return None
    version = None if position_ids.is_inference() else position_ids._version
    layer = getattr(module, "layer_idx", None) or 0
    last = _last
    if last is not None and last.answers(position_ids, version, layer):
        _last = last._replace(layer=layer)
        return last.mask
    mask = _pack_from(position_ids == position_ids[:, :1])
    _last = _Last(weakref.ref(position_ids), version, layer, mask)
    return mask
