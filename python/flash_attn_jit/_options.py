"""The options of a call: one value from the public functions to the launch."""

from collections.abc import Callable
from operator import itemgetter
from typing import Any, NamedTuple, get_type_hints

import torch

from . import _core


class Options(NamedTuple):
    """All that a call says beside q, k and v. The one list of them: the operators' signatures are made from it, and the
    compiled module reads its fields by name."""

    softmax_scale: float | None = None  # None: 1/sqrt(head_dim)
    causal: bool = False
    window_left: int = -1  # negative: without end
    window_right: int = -1
    softcap: float = 0.0  # 0.0: none
    alibi_slopes: torch.Tensor | None = None
    attn_bias: torch.Tensor | None = None
    dropout_p: float = 0.0
    dropout_seed: torch.Tensor | None = None  # (2), int32; with dropout_p
    s_aux: torch.Tensor | None = None
    cu_seqlens_q: torch.Tensor | None = None  # both or neither
    cu_seqlens_k: torch.Tensor | None = None
    max_seqlen_q: int = 0  # read with cu_seqlens only
    max_seqlen_k: int = 0
    seqused_k: torch.Tensor | None = None
    seqused_more: int = 0  # rows behind those of seqused_k
    leftpad_k: torch.Tensor | None = None
    block_table: torch.Tensor | None = None
    num_splits: int = 0  # of the keys, at the most; 0: as many as pay
    # A backward pass may follow, which makes the scores anew and has to find the same ones: the decode kernel, whose
    # sums come in another order, is left out. Stands last: see before_backward().
    has_backward: bool = False


Tensors = tuple[torch.Tensor | None, ...]

_TYPES = get_type_hints(Options)
_IN_SCHEMA: dict[Any, str] = {
    bool: "bool",
    int: "SymInt",
    float: "float",
    float | None: "float?",
    torch.Tensor | None: "Tensor?",
}
# As the operators take them, after the tensors.
SCHEMA = ", ".join(f"{_IN_SCHEMA[_TYPES[name]]} {name}" for name in Options._fields)

# The fields that may be tensors, with their places.
TENSOR_FIELDS = [(i, name) for i, name in enumerate(Options._fields) if _TYPES[name] == (torch.Tensor | None)]

# Of them, those that may have a gradient, in their order.
WITH_GRADIENT = ("attn_bias", "s_aux")

_TENSORS = [i for i, _ in TENSOR_FIELDS]
_NUMBERS = [i for i in range(len(Options._fields)) if i not in _TENSORS]
_numbers_of = itemgetter(*_NUMBERS)
_in_order = itemgetter(*((_NUMBERS + _TENSORS).index(i) for i in range(len(Options._fields))))

tensors_of: Callable[[Options], Tensors] = itemgetter(*_TENSORS)
NO_TENSORS: Tensors = (None,) * len(_TENSORS)
are_none: Callable[[Tensors], bool] = frozenset((None,)).issuperset


def has_cache(options: Options) -> bool:
    """Whether k and v are longer than their sequences."""
    return not (options.seqused_k is None and options.leftpad_k is None and options.block_table is None)


def with_seed(options: Options, q: torch.Tensor) -> Options:
    """The same with a seed for its dropout where it has none yet, drawn on q's device by torch's own generator: what
    torch does for those (manual_seed, checkpoints, CUDA graphs) holds for dropout."""
    if options.dropout_p == 0.0 or options.dropout_seed is not None:
        return options
    seed = torch.randint(-(2**31), 2**31, (2,), dtype=torch.int32, device=q.device)
    return options._replace(dropout_seed=seed)


def before_backward(options: Options) -> Options:
    return Options._make((*options[:-1], True))


def before_possible_backward(options: Options, head_dim: int) -> Options:
    """The same where nobody knows yet whether one follows: of head dims that have one."""
    return before_backward(options) if head_dim <= _core.most_head_dim_of_gradients else options


def with_tensors(options: Options, tensors: Tensors) -> Options:
    """The same with others in the place of tensors_of(options)."""
    return Options._make(_in_order((*_numbers_of(options), *tensors)))
