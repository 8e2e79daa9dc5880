"""What xformers' attention biases say, as options of a call. All of their masks but the top-left ones are aligned
bottom-right, as these kernels' are."""

from collections.abc import Callable
from enum import Enum
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from xformers.ops.fmha import attn_bias as ab

from ..._options import Options


class Rows(Enum):
    """Where a sequence's queries and keys lie."""

    WHOLE = "a sequence for each of the batch"
    BLOCKS = "sequences one behind the other"
    PADDED = "the same, and of the keys a part is used"
    GAPS = "the same, with parts of different lengths"
    PAGES = "keys in pages"
    PAGES_WITH_GAPS = "the same, with keys in the first pages that are not used"


WHOLE, BLOCKS, PADDED, GAPS, PAGES, PAGES_WITH_GAPS = Rows  # an Enum takes its time to find them


class _Band(NamedTuple):
    """Of the keys of its sequence, those that a query sees."""

    causal: bool = False
    left: int = -1  # negative: without end
    right: int = -1


_FULL, _CAUSAL = _Band(), _Band(causal=True)


def _full(bias: Any) -> _Band:
    return _FULL


def _causal(bias: Any) -> _Band:
    return _CAUSAL


def _causal_local(bias: Any) -> _Band:
    return _Band(causal=True, left=bias._window_size - 1)


def _local(bias: Any) -> _Band:
    return _Band(left=bias.window_left, right=bias.window_right)


class Rule(NamedTuple):
    band: Callable[[Any], _Band] = _full
    rows: Rows = WHOLE
    is_top_left: bool = False

    @property
    def has_gradients(self) -> bool:
        return self.rows is WHOLE or self.rows is BLOCKS


_TENSORS = (torch.Tensor, torch.nn.Parameter)

# By the exact type: what a subclass means is not known.
RULES: dict[type, Rule] = {
    type(None): Rule(),
    **dict.fromkeys(_TENSORS, Rule()),
    ab.LowerTriangularMask: Rule(_causal, is_top_left=True),
    ab.LowerTriangularMaskWithTensorBias: Rule(_causal, is_top_left=True),
    ab.LowerTriangularFromBottomRightMask: Rule(_causal),
    ab.LowerTriangularFromBottomRightLocalAttentionMask: Rule(_causal_local),
    ab.LocalAttentionFromBottomRightMask: Rule(_local),
    ab.BlockDiagonalMask: Rule(_full, BLOCKS),
    ab.BlockDiagonalCausalMask: Rule(_causal, BLOCKS, is_top_left=True),
    ab.BlockDiagonalCausalLocalAttentionMask: Rule(_causal_local, BLOCKS, is_top_left=True),
    ab.BlockDiagonalCausalFromBottomRightMask: Rule(_causal, BLOCKS),
    ab.BlockDiagonalCausalLocalAttentionFromBottomRightMask: Rule(_causal_local, BLOCKS),
    ab.BlockDiagonalPaddedKeysMask: Rule(_full, PADDED),
    ab.BlockDiagonalCausalWithOffsetPaddedKeysMask: Rule(_causal, PADDED),
    ab.BlockDiagonalLocalAttentionPaddedKeysMask: Rule(_local, PADDED),
    ab.BlockDiagonalCausalLocalAttentionPaddedKeysMask: Rule(_causal_local, PADDED),
    ab.BlockDiagonalGappyKeysMask: Rule(_full, GAPS),
    ab.BlockDiagonalCausalWithOffsetGappyKeysMask: Rule(_causal, GAPS),
    ab.PagedBlockDiagonalPaddedKeysMask: Rule(_full, PAGES),
    ab.PagedBlockDiagonalCausalWithOffsetPaddedKeysMask: Rule(_causal, PAGES),
    ab.PagedBlockDiagonalGappyKeysMask: Rule(_full, PAGES_WITH_GAPS),
    ab.PagedBlockDiagonalCausalWithOffsetGappyKeysMask: Rule(_causal, PAGES_WITH_GAPS),
}


def tensor_of(bias: Any) -> torch.Tensor | None:
    """What is added to the scores."""
    tensor: torch.Tensor | None = None
    if type(bias) in _TENSORS:
        tensor = bias
    elif type(bias) is ab.LowerTriangularMaskWithTensorBias:
        tensor = bias._subtensor if hasattr(bias, "_subtensor") else bias._bias  # in xformers 0.0.31, and later
    return tensor


def keys_seen(inp: Any) -> int:
    """How many of key's rows any query sees: the others have a part in nothing."""
    rows_q: int = inp.query.shape[1]
    rows_k: int = inp.key.shape[1]
    rule = RULES[type(inp.attn_bias)]
    # A top-left query sees no key past the last query's. Among the others the two alignments are one.
    return min(rows_q, rows_k) if rule.is_top_left and rule.rows is WHOLE else rows_k


def first_key(bias: Any) -> int:
    """Where the first sequence's keys begin: a first one of cu_seqlens is 0."""
    first: int = bias.k_seqinfo.seqstart_py[0] if RULES[type(bias)].rows is GAPS else 0
    return first


def _rows(bias: Any, rows: Rows) -> dict[str, Any]:
    """Options, by their names."""
    if rows is WHOLE:
        return {}
    queries, keys = bias.q_seqinfo, bias.k_seqinfo
    options = {
        "cu_seqlens_q": queries.seqstart,
        "cu_seqlens_k": keys.seqstart,
        "max_seqlen_q": queries.max_seqlen,
        "max_seqlen_k": keys.max_seqlen,
    }
    if rows is BLOCKS:
        return options
    options["seqused_k"] = keys.seqlen
    if rows is PADDED:
        options["max_seqlen_k"] = keys.padding
    elif rows is GAPS:
        options["max_seqlen_k"] = max(end - start for start, end in pairwise(keys.seqstart_py))
        if first_key(bias):
            options["cu_seqlens_k"] = keys.seqstart - first_key(bias)
    else:
        options["cu_seqlens_k"], options["block_table"] = None, bias.block_tables
    if rows is PAGES_WITH_GAPS:
        # Here seqlen is where a sequence's last key ends, and seqstart where its first one is, counted in its pages.
        options["max_seqlen_k"], options["leftpad_k"] = max(keys.seqlen_py), keys.seqstart[:-1]
    return options


def _top_left(bias: Any, rule: Rule, band: _Band, inp: Any) -> dict[str, Any]:
    """Masks that are aligned at the first query and the first key of a sequence, as options."""
    if rule.rows is WHOLE:
        behind = inp.query.shape[1] - inp.key.shape[1]
        if behind <= 0:  # see keys_seen()
            return {"causal": True}
        return {"window_right": behind}
    queries, keys = bias.q_seqinfo, bias.k_seqinfo
    if queries is keys or queries.seqstart_py == keys.seqstart_py:
        return {"causal": True, "window_left": band.left}
    # One mask for all sequences, because it does not know of their lengths.
    mask = torch.ones(queries.max_seqlen, keys.max_seqlen, dtype=torch.bool, device=inp.query.device).tril_()
    return {"attn_bias": (mask if band.left < 0 else mask.triu_(-band.left))[None, None]}


def _added(tensor: torch.Tensor, query: torch.Tensor, keys: int) -> torch.Tensor:
    """As the kernels take it: (batch, heads, queries, keys)."""
    if query.dim() == 5:
        if tensor.shape[1] != 1 or tensor.shape[2] != 1:
            tensor = tensor.expand(-1, *query.shape[2:4], -1, -1)
        tensor = tensor.flatten(1, 2)
    return tensor[..., :keys] if tensor.shape[-1] > keys else tensor


def options_of(inp: Any) -> Options:
    """Of inputs that are not refused."""
    bias = inp.attn_bias
    rule = RULES[type(bias)]
    band = rule.band(bias)
    fields = _rows(bias, rule.rows)
    if rule.is_top_left:
        fields.update(_top_left(bias, rule, band, inp))
    else:
        fields["causal"], fields["window_left"], fields["window_right"] = band
    tensor = tensor_of(bias)
    if tensor is not None:
        fields["attn_bias"] = _added(tensor, inp.query, keys_seen(inp))
    return Options(softmax_scale=inp.scale, dropout_p=inp.p, **fields)
