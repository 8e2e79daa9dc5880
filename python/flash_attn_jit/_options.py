"""The options of a call: one value from the public functions to the launch."""

from operator import itemgetter
from typing import Any, Dict, NamedTuple, Optional, Sequence, Tuple, get_type_hints

import torch


class Options(NamedTuple):
    """All that a call says beside q, k and v. The one list of them: the operators' signatures are made from it, and the
    compiled module reads its fields by name."""

    softmax_scale: Optional[float] = None  # None: 1/sqrt(head_dim)
    causal: bool = False
    window_left: int = -1  # negative: without end
    window_right: int = -1
    softcap: float = 0.0  # 0.0: none
    alibi_slopes: Optional[torch.Tensor] = None
    cu_seqlens_q: Optional[torch.Tensor] = None  # both or neither
    cu_seqlens_k: Optional[torch.Tensor] = None
    max_seqlen_q: int = 0  # read with cu_seqlens only
    max_seqlen_k: int = 0

    def tensors(self) -> Tuple[Optional[torch.Tensor], ...]:
        """The fields that may be tensors."""
        return _tensors_of(self)

    def with_tensors(self, tensors: Sequence[Optional[torch.Tensor]]) -> "Options":
        """The same with others in their place."""
        return Options._make(_in_order((*_numbers_of(self), *tensors)))


_TYPES = get_type_hints(Options)
_IN_SCHEMA: Dict[Any, str] = {
    bool: "bool",
    int: "SymInt",
    float: "float",
    Optional[float]: "float?",
    Optional[torch.Tensor]: "Tensor?",
}
# As the operators take them, after the tensors.
SCHEMA = ", ".join(f"{_IN_SCHEMA[_TYPES[name]]} {name}" for name in Options._fields)

_TENSORS = [i for i, name in enumerate(Options._fields) if _TYPES[name] == Optional[torch.Tensor]]
_NUMBERS = [i for i in range(len(Options._fields)) if i not in _TENSORS]
_tensors_of, _numbers_of = itemgetter(*_TENSORS), itemgetter(*_NUMBERS)
_PLACES = _NUMBERS + _TENSORS
_in_order = itemgetter(*(_PLACES.index(i) for i in range(len(_PLACES))))

_ONLY_NONE = frozenset((None,))
NO_TENSORS = (None,) * len(_TENSORS)


def has_tensors(options: Options) -> bool:
    return not _ONLY_NONE.issuperset(_tensors_of(options))
