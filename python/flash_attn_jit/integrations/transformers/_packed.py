"""Sequences that are packed one behind the other into a row of the batch."""

import weakref

import torch
import torch.nn.functional as F

from ._kinds import CAUSAL_LENGTHS

_is_compiling = torch.compiler.is_compiling


def pack(sequences: torch.Tensor) -> tuple[bool, torch.Tensor | None]:
    """Whether a mask of them can be made, and it; None where each row of the batch is one sequence. Waits for the
    device.

    Args:
        sequences: (batch, queries), integers that are others from sequence to sequence of a row.
    """
    batch, queries = sequences.shape
    begins = torch.ones_like(sequences, dtype=torch.bool)
    begins[:, 1:] = sequences.diff() != 0
    first = begins.flatten().nonzero()[:, 0]
    if first.numel() == batch:
        return True, None
    if first.numel() >= queries:  # some models cut masks to as many columns as there are keys
        return False, None
    ends = F.pad(first, (0, 1), value=batch * queries).to(CAUSAL_LENGTHS)
    longest = int(ends.diff().max())
    return True, ends.expand(1, 1, longest, -1)


class _Last:
    """The positions that a layer asked about, which the next layers of the same pass ask about again."""

    positions: "weakref.ReferenceType[torch.Tensor] | None" = None
    version = 0
    mask: torch.Tensor | None = None

    def is_of(self, positions: torch.Tensor, version: int) -> bool:
        return self.positions is not None and self.positions() is positions and self.version == version


_last = _Last()


def find_packed(position_ids: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor | None:
    """The mask of a batch of 1 whose positions begin anew where a sequence does. transformers looks for those itself
    where there is no cache, and tells the mask function; models make caches whenever they are not trained, though.
    Waits for the device, once for all layers outside of torch.inference_mode(). Nothing while torch.compile traces.

    Args:
        q: (batch, queries, heads, head_dim).
        k: (batch, keys, heads_k, head_dim).
    """
    global _last
    queries = q.shape[1]
    if q.shape[0] != 1 or queries == 1 or queries != k.shape[1] or position_ids.shape != (1, queries):
        return None
    if _is_compiling():
        return None
    version = None if position_ids.is_inference() else position_ids._version
    if version is not None and _last.is_of(position_ids, version):
        return _last.mask
    new = _Last()
    _, new.mask = pack((position_ids.diff(prepend=position_ids[:, :1] - 1) != 1).cumsum(-1))
    if version is not None:
        new.positions, new.version = weakref.ref(position_ids), version
        _last = new
    return new.mask
