"""``scaled_dot_product_attention`` on these kernels: as a function, and as a route for programs that call PyTorch's."""

import threading
import types as python_types
from collections import Counter
from typing import Any, Callable, Dict, Optional, Tuple, Type

import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from . import _core
from ._arguments import number, reject_what_is_no_tensor, truth
from ._autograd import attention_heads_first
from .errors import UnsupportedError

__all__ = ["SdpaRouter", "route_sdpa", "sdpa"]

_TORCHS = F.scaled_dot_product_attention
_OLDEST_GPU = (7, 5)
_MOST_HEAD_DIM = 256
_MOST_SCALE = _core.most_scale

# Why a call cannot be taken: the error's type, what came, what is accepted.
_Refusal = Tuple[Type[Exception], str, str]


def sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: Optional[torch.Tensor] = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: Optional[float] = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """``torch.nn.functional.scaled_dot_product_attention`` on these kernels: its layout, its rules. Differentiable.

    Two rules differ from ``flash_attn_func``'s: heads come before the sequence, and the causal mask is aligned
    top-left: query i sees key j where j <= i, however long the two are. Under ``torch.autocast`` the inputs are cast
    as SDPA casts them, all but float64 to its dtype.

    Args:
        query: (..., num_heads, seqlen_q, head_dim), float16, with at least 2 dimensions. Head dims 1 to 256. Of every
            tensor only the last dimension must be contiguous.
        key: (..., num_heads_k, seqlen_k, head_dim), float16, with query's number of dimensions. Nothing is broadcast.
        value: like key: its head_dim too.
        attn_mask: not built yet: None.
        dropout_p: not built yet: 0.0.
        is_causal: query i sees key j where j <= i.
        scale: a factor for the scores before the softmax; 1/sqrt(head_dim) where None.
        enable_gqa: num_heads may be a multiple of num_heads_k: query head i reads key head
            i // (num_heads / num_heads_k). Where False they must be equal.

    Returns:
        out, query's shape, float16. In memory the sequence comes before the heads, as with SDPA's flash backend.

    Raises:
        ValueError: an argument that does not fit; names it, what came and what is accepted.
        UnsupportedError: a ValueError for bfloat16, a head dim or a GPU that these kernels do not have.
        NotImplementedError: attn_mask or dropout_p; a backward pass with create_graph=True.
    """
    if not (
        isinstance(query, torch.Tensor) and isinstance(key, torch.Tensor) and isinstance(value, torch.Tensor)
    ):
        reject_what_is_no_tensor(query=query, key=key, value=value)
    if is_causal is not True and is_causal is not False:
        is_causal = truth("is_causal", is_causal)
    if enable_gqa is not True and enable_gqa is not False:
        enable_gqa = truth("enable_gqa", enable_gqa)
    if scale is not None:
        scale = number("scale", scale)
    refusal = _refusal(query, key, value, attn_mask, dropout_p, scale, enable_gqa)
    if refusal:
        error, what_came, accepted = refusal
        raise error(f"{what_came}. Accepted: {accepted}.")
    return _attention(query, key, value, is_causal, scale)


def _refusal(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: Optional[torch.Tensor],
    dropout_p: float,
    scale: Optional[float],
    enable_gqa: bool,
) -> Optional[_Refusal]:
    """Why these arguments cannot be taken; None where they can."""
    if attn_mask is not None:
        accepted = "None; is_causal=True for a causal mask"
        return NotImplementedError, "attn_mask is given, and masks are not built yet", accepted
    if dropout_p != 0.0:
        return NotImplementedError, f"dropout_p is {dropout_p}, and dropout is not built yet", "0.0"
    if scale is not None and not abs(scale) <= _MOST_SCALE:
        accepted = f"a number from {-_MOST_SCALE:g} to {_MOST_SCALE:g}, or None for 1/sqrt(head_dim)"
        return ValueError, f"scale is {scale}", accepted
    device, cast = query.device, _autocast_dtype(query)
    return (
        _device_refusal(device)
        or _tensor_refusal("query", query, query.dim(), device, cast)
        or _tensor_refusal("key", key, query.dim(), device, cast)
        or _tensor_refusal("value", value, query.dim(), device, cast)
        or _shape_refusal(query, key, value, enable_gqa)
    )


def _tensor_refusal(
    name: str, tensor: torch.Tensor, rank: int, device: torch.device, cast: Optional[torch.dtype]
) -> Optional[_Refusal]:
    """Why a tensor cannot be taken beside a query of that rank and device, under autocast to `cast`."""
    if tensor.layout is not torch.strided or tensor.is_nested:
        kind = "a nested tensor" if tensor.is_nested else f"of layout {tensor.layout}"
        return ValueError, f"{name} is {kind}", "a strided tensor"
    if tensor.dim() < 2 or tensor.dim() != rank:
        return (
            ValueError,
            f"{name} has {tensor.dim()} dimensions and query {rank}",
            "2 or more, (..., heads, seqlen, head_dim), query, key and value alike",
        )
    if tensor.device != device:
        return ValueError, f"{name} is on device {tensor.device} and query on {device}", "all on one device"
    dtype = _dtype_of(tensor, cast)
    if dtype is not torch.float16:
        error = UnsupportedError if dtype is torch.bfloat16 else ValueError
        came = "" if dtype is tensor.dtype else f", {dtype} under autocast"
        return (
            error,
            f"{name} has dtype {tensor.dtype}{came}",
            f"torch.float16. Cast it: {name}.to(torch.float16)",
        )
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        return (
            ValueError,
            f"{name} has strides {tensor.stride()}",
            f"a last dimension that is contiguous (stride 1). Use {name}.contiguous()",
        )
    return None


def _shape_refusal(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, enable_gqa: bool
) -> Optional[_Refusal]:
    *batch, _, head_dim = query.shape
    if not 1 <= head_dim <= _MOST_HEAD_DIM:
        return UnsupportedError, f"query has head_dim {head_dim}", f"1 to {_MOST_HEAD_DIM}"
    for name, tensor in (("key", key), ("value", value)):
        *batch_k, _, head_dim_k = tensor.shape
        if head_dim_k != head_dim:
            return ValueError, f"{name} has head_dim {head_dim_k} and query {head_dim}", "query's"
        if batch_k[:-1] != batch[:-1]:
            return (
                ValueError,
                f"{name} has batch dimensions {tuple(batch_k[:-1])} and query {tuple(batch[:-1])}",
                "query's: nothing is broadcast",
            )
    if value.shape != key.shape:
        return ValueError, f"value has shape {tuple(value.shape)} and key {tuple(key.shape)}", "key's"
    if query.dim() == 2:
        return None
    heads, heads_k = query.shape[-3], key.shape[-3]
    if heads == heads_k:
        return None
    if not enable_gqa:
        return ValueError, f"key has {heads_k} heads and query {heads}", "query's, or enable_gqa=True"
    if heads_k == 0 or heads % heads_k:
        return ValueError, f"query has {heads} heads and key {heads_k}", "a multiple of key's"
    return None


# What runs here, by device: the compute capability of a GPU's ordinal, and whether the interpreter is on by "cpu".
# Plain dictionaries, which torch.compile can look into, filled outside of it.
_capabilities: Dict[int, Tuple[int, int]] = {}
_interpreter: Dict[str, bool] = {}


def _learn_devices() -> None:
    if "cpu" not in _interpreter:
        _interpreter["cpu"] = _interpreter_is_on()
    if torch.cuda.is_available():
        for ordinal in range(torch.cuda.device_count()):
            _capabilities[ordinal] = torch.cuda.get_device_capability(ordinal)


def _interpreter_is_on() -> bool:
    """Asked of the compiled module, which alone reads the environment, with a problem that has no work in it."""
    nothing = torch.empty(1, 0, 1, 8, dtype=torch.float16, device="cpu")
    softmax_lse = torch.empty(1, 1, 0, device="cpu")
    try:
        _core.forward(
            nothing, nothing, nothing, nothing, softmax_lse, None, False, -1, -1, 0.0, None, None, None, 0, 0
        )
    except ValueError:
        return False
    return True


def _device_refusal(device: torch.device) -> Optional[_Refusal]:
    if not _interpreter:
        if torch.compiler.is_compiling():
            return None  # the operator refuses the device when it runs
        _learn_devices()
    kind = device.type
    if kind == "cuda":
        capability = _capabilities[device.index]
        if capability >= _OLDEST_GPU:
            return None
        return (
            UnsupportedError,
            f"query is on {device}, an sm_{capability[0]}{capability[1]}",
            "sm_75 or newer",
        )
    if kind == "meta" or (kind == "cpu" and _interpreter["cpu"]):
        return None
    return (
        ValueError,
        f"query is on device {device}",
        "a CUDA device, or the CPU with FLASH_ATTN_JIT_INTERPRET=1 set before Python starts",
    )


def _autocast_dtype(tensor: torch.Tensor) -> Optional[torch.dtype]:
    """What autocast casts to on the tensor's device; None where it is off."""
    device = tensor.device.type
    if device in ("cuda", "cpu") and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return None


def _dtype_of(tensor: torch.Tensor, cast: Optional[torch.dtype]) -> torch.dtype:
    """The dtype that SDPA would see: autocast casts every floating dtype but float64."""
    if cast is None or not tensor.is_floating_point() or tensor.dtype is torch.float64:
        return tensor.dtype
    return cast


def _attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, is_causal: bool, scale: Optional[float]
) -> torch.Tensor:
    """What _refusal() let through."""
    if query.dtype is not torch.float16 or key.dtype is not torch.float16 or value.dtype is not torch.float16:
        query, key, value = (x.to(torch.float16) for x in (query, key, value))  # autocast's dtype, then
    right = -1
    if is_causal:
        seqlen_q, seqlen_k = query.shape[-2], key.shape[-2]
        if seqlen_q > seqlen_k:
            # The window is aligned bottom-right: the query's own key there is i + seqlen_k - seqlen_q.
            is_causal, right = False, seqlen_q - seqlen_k
        elif seqlen_q < seqlen_k:
            # No query sees a key past the last query's. Among the others the two alignments are one.
            key, value = key[..., :seqlen_q, :], value[..., :seqlen_q, :]
    options = (scale, is_causal, -1, right, 0.0, None, None, None, 0, 0)
    if query.dim() == 4:
        return attention_heads_first(query, key, value, options)
    out = attention_heads_first(_of_rank_4(query), _of_rank_4(key), _of_rank_4(value), options)
    return out.reshape(query.shape)


def _of_rank_4(tensor: torch.Tensor) -> torch.Tensor:
    while tensor.dim() < 4:
        tensor = tensor.unsqueeze(0)
    return tensor.flatten(0, -4)


class SdpaRouter(TorchFunctionMode):
    """Inside it, calls of ``torch.nn.functional.scaled_dot_product_attention`` run here where they can. See
    route_sdpa(), which makes one."""

    def __init__(self) -> None:
        super().__init__()
        _learn_devices()
        self._lock = threading.Lock()  # one router may be entered by several threads
        self._routed = 0
        self._reasons: "Counter[str]" = Counter()
        self._multi_head_attention = self._routed_multi_head_attention()

    @property
    def counts(self) -> Dict[str, int]:
        """How many calls ran where: ``{"flash_attn_jit": ..., "torch": ...}``."""
        with self._lock:
            return {"flash_attn_jit": self._routed, "torch": sum(self._reasons.values())}

    @property
    def reasons(self) -> Dict[str, int]:
        """Why calls fell back to PyTorch's, and how many for each reason."""
        with self._lock:
            return dict(self._reasons)

    def __repr__(self) -> str:
        counts = self.counts
        lines = [
            f"route_sdpa: {counts['flash_attn_jit']} calls ran in flash_attn_jit, {counts['torch']} in PyTorch"
        ]
        lines += [
            f"  {count} x {reason}" for reason, count in sorted(self.reasons.items(), key=lambda r: -r[1])
        ]
        return "\n".join(lines)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Tuple[Any, ...] = (),
        kwargs: Optional[Dict[str, Any]] = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is _TORCHS:
            return self._run(*args, **kwargs)
        if func is F.multi_head_attention_forward and not torch.compiler.is_compiling():
            func = self._multi_head_attention
        return func(*args, **kwargs)

    def _run(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: Optional[torch.Tensor] = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: Optional[float] = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        reason = _why_not_routed(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        if not torch.compiler.is_compiling():  # else the graph would be made anew for every value of a counter
            self._count(reason)
        if reason is None:
            return _attention(query, key, value, bool(is_causal), scale)
        # Arguments at their defaults are left out: older versions of torch know fewer.
        given: Dict[str, Any] = {"attn_mask": attn_mask, "dropout_p": dropout_p, "is_causal": is_causal}
        given.update({} if scale is None else {"scale": scale})
        given.update({"enable_gqa": enable_gqa} if enable_gqa else {})
        return _TORCHS(query, key, value, **given)

    def _count(self, reason: Optional[str]) -> None:
        with self._lock:
            if reason is None:
                self._routed += 1
            else:
                self._reasons[reason] += 1

    def _routed_multi_head_attention(self) -> Callable[..., Any]:
        """F.multi_head_attention_forward, calling this router. While a mode handles a function the mode is off, and the
        SDPA that this one calls would be missed."""
        theirs = F.multi_head_attention_forward
        names = {**theirs.__globals__, "scaled_dot_product_attention": self._run}
        ours = python_types.FunctionType(theirs.__code__, names, theirs.__name__, theirs.__defaults__)
        ours.__kwdefaults__ = theirs.__kwdefaults__
        return ours


def _why_not_routed(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any,
    dropout_p: Any,
    is_causal: Any,
    scale: Any,
    enable_gqa: Any,
) -> Optional[str]:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            return f"{name} is a {type(tensor).__name__}"
    if scale is not None and type(scale) not in (float, int):
        return f"scale is a {type(scale).__name__}"
    if not torch.compiler.is_compiling():  # a compiler sees to its own transforms
        if torch._C._are_functorch_transforms_active():
            return "a transform of torch.func is active"
        if forward_ad._current_level >= 0:
            return "forward-mode differentiation is active"
    refusal = _refusal(query, key, value, attn_mask, dropout_p, scale, enable_gqa)
    return refusal[1] if refusal else None


def route_sdpa() -> SdpaRouter:
    """A context manager that runs ``torch.nn.functional.scaled_dot_product_attention`` on these kernels where it can,
    and PyTorch's own otherwise::

        with flash_attn_jit.route_sdpa() as router:
            loss = model(batch).mean()
            loss.backward()
        print(router)           # how many calls ran where, and why
        router.counts           # {"flash_attn_jit": 24, "torch": 0}
        router.reasons          # {} or {"attn_mask is given, ...": 3}

    It is a TorchFunctionMode: names imported before it are caught, as are the calls of
    ``torch.nn.functional.multi_head_attention_forward`` and so of ``nn.MultiheadAttention`` and ``nn.Transformer...``,
    as far as these call SDPA: with ``need_weights=True``, its default, ``nn.MultiheadAttention`` does not.
    It holds for the thread that entered it. The backward pass need not run inside it.

    A call that torch.compile traces inside it is routed as well, with no graph break, and the compiled form is used
    inside a router alone; only the call inside ``multi_head_attention_forward`` is then PyTorch's. Calls in a compiled
    graph are not counted. Inside it every function of torch costs the host a detour through Python, about 1 us.

    Falls back, with the reason counted: attn_mask or dropout_p given, a dtype other than float16 (after autocast),
    CPU tensors without the interpreter, GPUs older than sm_75, nested, sparse and subclassed tensors, shapes that would
    be broadcast, value head dims other than query's, head dims over 256, a last dimension that is not contiguous, and
    the transforms of ``torch.func``, and a scale that is neither a float nor an int.

    What differs from PyTorch's own: a routed call has no second derivative (create_graph=True is an error there), its
    output may not be changed in place, and ``torch.nn.attention.sdpa_kernel`` chooses among PyTorch's backends alone:
    what can run here does.
    """
    return SdpaRouter()
