"""What torch.utils.flop_counter.FlopCounterMode counts for the operators: as for torch's own flash attention, all of a
sequence's queries times all of its keys, masked or not.
"""

from math import prod
from typing import Any

import torch

from ._after_import import after_import
from ._options import Options
from ._torch_internals import register_flop_formula
from .ops import KVPACKED, QKVPACKED, SEPARATE, Form

# Products of a pair of query and key, over q's head dim and over v's: S = QK' and PV forward; S, dQ and dK, dP and dV
# backward.
_FORWARD, _BACKWARD = (1, 1), (3, 2)


def _lengths(cu_seqlens: torch.Tensor, max_seqlen: int) -> list[int]:
    """Of the sequences; the longest of all where cu_seqlens has no values, as while a compiler traces."""
    if type(cu_seqlens) is torch.Tensor and cu_seqlens.device.type != "meta":
        return cu_seqlens.diff().tolist()
    return [max_seqlen] * (cu_seqlens.shape[0] - 1)


def _pairs(q: torch.Tensor, k: torch.Tensor, options: Options) -> int:
    """Of a query and a key, in all sequences."""
    if options.cu_seqlens_q is None or options.cu_seqlens_k is None:
        return prod((q.shape[0], q.shape[1], k.shape[1]))
    lengths = zip(
        _lengths(options.cu_seqlens_q, options.max_seqlen_q), _lengths(options.cu_seqlens_k, options.max_seqlen_k)
    )
    return sum(seqlen_q * seqlen_k for seqlen_q, seqlen_k in lengths)


def _register(form: Form, operator: Any, products: tuple[int, int], before: int, between: int) -> None:
    """`before` and `between` arguments come ahead of the form's tensors, and between them and the options."""

    def formula(*arguments: Any, **_: Any) -> int:
        end = before + len(form.names)
        q, k, v = form.split(*arguments[before:end])
        dims = products[0] * q.shape[-1] + products[1] * v.shape[-1]
        return 2 * dims * _pairs(q, k, Options._make(arguments[end + between :])) * q.shape[-2]

    register_flop_formula(operator.overloadpacket, formula)


_FORMS = [(form, form.forward, form.backward) for form in (SEPARATE, KVPACKED, QKVPACKED)]


def _register_all() -> None:
    for form, forward, backward in _FORMS:
        _register(form, forward, _FORWARD, before=0, between=0)
        _register(form, backward, _BACKWARD, before=1, between=4)


# That module imports Triton, which takes most of a second.
after_import("torch.utils.flop_counter", _register_all)
