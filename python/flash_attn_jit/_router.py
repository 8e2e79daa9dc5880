"""route_sdpa(): calls of PyTorch's ``scaled_dot_product_attention`` run on these kernels.

While a router is entered, ``aten::scaled_dot_product_attention`` has kernels at the keys of the CPU and of CUDA. Every
thread meets them, and so do callers in C++ and recomputations inside of a backward pass, where no function mode is on.
torch.compile does not: it takes the operator apart while it traces. For its sake alone a TorchFunctionMode is on in the
thread that entered, which routes what is traced, and whose presence the compiled form is guarded by.
"""

import functools
import importlib
import sys
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch.library import Library
from torch.overrides import TorchFunctionMode

from . import _torch_internals as internals
from ._call_counts import CallCounts
from ._sdpa import attention, find_refusal, is_causal_bias, refusal_of, refusal_where_others_are_better
from .errors import kind_text

__all__ = ["SdpaRouter", "route_sdpa"]

_TORCHS = F.scaled_dot_product_attention
_OPERATOR = torch.ops.aten.scaled_dot_product_attention.default
# Autograd's keys come first in a call where both are there, and are left out under torch.inference_mode(). Nested
# tensors are never taken; they are here to be counted. In this order, in which the kernels also go: with a kernel of
# ours left at a nested key, torch would make none of its own for Autograd's.
_KEYS = (
    *("CPU", "CUDA", "NestedTensorCPU", "NestedTensorCUDA"),
    *("AutogradCPU", "AutogradCUDA", "AutogradNestedTensor"),
)
_BIAS_MODULE = "torch.nn.attention.bias"


class SdpaRouter(CallCounts):
    """Inside it, calls of ``torch.nn.functional.scaled_dot_product_attention`` run here where they can. See
    route_sdpa(), which makes one."""

    def __init__(self, title: str = "route_sdpa") -> None:
        super().__init__(title)

    def __enter__(self) -> "SdpaRouter":
        enter(self)
        return self

    def __exit__(self, *_: Any) -> None:
        leave(self)

    def has_left_a_traced_call(self) -> None:
        """A compiler or an exporter that traces has come by, and PyTorch's operator goes into its graph."""


def route_sdpa() -> SdpaRouter:
    """A context manager that runs ``torch.nn.functional.scaled_dot_product_attention`` on these kernels where it can,
    and PyTorch's own otherwise::

        with flash_attn_jit.route_sdpa() as router:
            loss = model(batch).mean()
            loss.backward()
        print(router)           # how many calls ran where, and why
        router.counts           # {"flash_attn_jit": 24, "torch": 0}
        router.reasons          # {} or {"query has dtype torch.float32, ...": 3}

    It holds for the whole process, from entering it until it is left: names imported before it are caught, calls in
    other threads, from C++ and from scripted functions, and those of ``nn.MultiheadAttention`` and
    ``nn.Transformer...``, as far as these call SDPA: with ``need_weights=True``, its default,
    ``nn.MultiheadAttention`` does not. Their fused inference path, which calls none either, is off meanwhile. Several
    threads may be inside of one router or of several; a call is counted by the router that its own thread entered last,
    and in a thread that entered none by the one that was entered last.

    The backward pass need not run inside it. What ``torch.utils.checkpoint`` recomputes runs where the forward pass
    ran: here and counted where that was inside the router, in PyTorch where it was not. For that, what it replaces in
    torch stays until the graphs of such checkpoints are gone, and passes all other calls on to PyTorch. Other
    implementations of checkpointing recompute as their backward pass finds it: run that inside as well.

    From torch 2.6 on, a call that torch.compile traces is routed as well in the thread that entered the router, with no
    graph break, and the compiled form is used inside a router alone; older versions leave it to PyTorch. Traced calls
    inside ``multi_head_attention_forward`` and inside a checkpoint are always PyTorch's. Calls in a compiled graph are
    not counted. A program that torch.export traces has PyTorch's operator: it may run where this library is not. In
    that thread every function of torch costs the host a detour through Python, about 1 us.

    Falls back, with the reason counted: a dropout_p of 1, a dtype other than float16 and bfloat16 (after autocast),
    bfloat16 on GPUs that multiply it (sm_80 and newer), CPU tensors without the interpreter, GPUs older than sm_75,
    nested, sparse and subclassed tensors, shapes that would be broadcast, head dims over 512, over 256 where an input
    needs a gradient or value's is another than query's, a last dimension that is not contiguous, forward-mode
    differentiation and ``torch.func.grad``. Also left to PyTorch, but not counted: calls under ``torch.vmap``, of
    jagged nested tensors, on the meta device and on devices that are neither the CPU nor CUDA.

    What differs from PyTorch's own: a routed call has no second derivative (create_graph=True is an error there), its
    output may not be changed in place, and ``torch.nn.attention.sdpa_kernel`` chooses among PyTorch's backends alone:
    what can run here does.

    Entering it raises RuntimeError where something else in the process replaces SDPA from Python and this torch (2.8 or
    older) lets nobody replace it again.
    """
    return SdpaRouter()


# ---- Which router a call belongs to

_lock = threading.RLock()  # a garbage collection inside of it may end a _Recomputation, which takes it too
_NO_THREAD = 0  # what enters for the whole process alike
_entered: tuple[tuple[int, SdpaRouter], ...] = ()  # with the thread that entered it. Replaced, never changed
_is_on = False  # whether there are any: what torch.compile looks at


# Whose calls they are until the thread enters a router anew: a router or nobody, and how many it had entered then.
_Pin = tuple[SdpaRouter | None, int]


class _Thread(threading.local):
    pin: _Pin | None = None
    has_mode = False


_thread = _Thread()


def _own_routers() -> list[SdpaRouter]:
    this_thread = threading.get_ident()
    return [router for thread, router in _entered if thread == this_thread]


def _router_of_this_call() -> SdpaRouter | None:
    pin, entered = _thread.pin, _entered
    if pin is None and not entered:
        return None
    own = _own_routers()
    if pin is not None and len(own) <= pin[1]:
        return pin[0]
    if own:
        return own[-1]
    return entered[-1][1] if entered else None


def _pin_to(router: SdpaRouter | None) -> _Pin | None:
    """Gives what was there before, to be put back."""
    before, _thread.pin = _thread.pin, (router, len(_own_routers()))
    return before


def _run_for(router: SdpaRouter | None, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    before = _pin_to(router)
    try:
        return function(*arguments, **options)
    finally:
        _thread.pin = before


def _outside_of_graphs(function: Callable[..., None]) -> Callable[..., None]:
    """The function so that torch.compile breaks its graph before a call and does not look into it. The compiler is slow
    to import, and is not imported for this: where it is not loaded, nothing is compiled."""

    def run(*arguments: Any) -> None:
        if "torch._dynamo" in sys.modules:
            torch.compiler.disable(function)(*arguments)
        else:
            function(*arguments)

    return run


@_outside_of_graphs
def enter(router: SdpaRouter) -> None:
    """In this thread, where from now on traced calls are routed too."""
    _add(threading.get_ident(), router)
    if not _thread.has_mode:
        TorchFunctionMode.__enter__(_mode)
        _thread.has_mode = True


@_outside_of_graphs
def enter_without_mode(router: SdpaRouter) -> None:
    """In no thread more than in the others. Traced calls stay PyTorch's, and no function of torch makes a detour."""
    importlib.import_module(_BIAS_MODULE)  # nothing looks for it later
    _add(_NO_THREAD, router)
    _Override.look_for_causal_biases()


def _add(thread: int, router: SdpaRouter) -> None:
    global _entered, _is_on
    _Override.hold()
    with _lock:
        _entered = (*_entered, (thread, router))
        _is_on = True


@_outside_of_graphs
def leave(router: SdpaRouter) -> None:
    """Also where routers are left in another order than entered, or in another thread: that one's mode then does
    nothing, and goes when the thread next leaves a router."""
    global _entered, _is_on
    this_thread = threading.get_ident()
    with _lock:
        own = [i for i, entry in enumerate(_entered) if entry == (this_thread, router)]
        places = own or [i for i, entry in enumerate(_entered) if entry[1] is router]
        if not places:
            raise RuntimeError("route_sdpa: a router is left that was not entered, or was left before.")
        _entered = _entered[: places[-1]] + _entered[places[-1] + 1 :]
        _is_on = bool(_entered)
    if _thread.has_mode and all(thread != this_thread for thread, _ in _entered):
        _thread.has_mode = False
        internals.take_function_mode_off(_mode)
    _Override.release()


# ---- The calls


class _Call(NamedTuple):
    """The arguments, as F.scaled_dot_product_attention, the operator and CausalBias._dispatch order them."""

    query: Any
    key: Any
    value: Any
    attn_mask: Any = None
    dropout_p: Any = 0.0
    is_causal: Any = False
    scale: Any = None
    enable_gqa: Any = False


def _why_not_routed(call: _Call) -> str | None:
    for name, tensor in (("query", call.query), ("key", call.key), ("value", call.value)):
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            return f"{name} is {kind_text(tensor)}"
    mask = call.attn_mask
    if mask is not None and type(mask) not in (torch.Tensor, torch.nn.Parameter) and not is_causal_bias(mask):
        return f"attn_mask is {kind_text(mask)}"
    if call.scale is not None and type(call.scale) not in (float, int):
        return f"scale is {kind_text(call.scale)}"
    if not torch.compiler.is_compiling():  # a compiler sees to its own transforms
        if internals.transforms_are_active():
            return "a transform of torch.func is active"
        if internals.forward_mode_is_on():
            return "forward-mode differentiation is active"
    query, key, value, attn_mask, dropout_p, is_causal, _, enable_gqa = call
    refusal = find_refusal(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa)
    refusal = refusal or refusal_where_others_are_better(query)
    return refusal.reason() if refusal else None


def _run(call: _Call) -> torch.Tensor:
    query, key, value, attn_mask, dropout_p, is_causal, scale, _ = call
    return attention(query, key, value, attn_mask, float(dropout_p), bool(is_causal), scale)


def _try(router: SdpaRouter, call: _Call) -> torch.Tensor | None:
    """The result, counted; None where the call is PyTorch's."""
    reason = _why_not_routed(call)
    try:
        return _run(call) if reason is None else None
    except ValueError as error:
        refusal = refusal_of(error)
        if refusal is None:
            raise
        reason = refusal.reason()
        return None
    finally:  # a checkpoint may end its recomputation by an error out of the call
        if reason is None or not _is_tracers(call.query):
            router.count(reason)
        else:
            router.has_left_a_traced_call()


def _is_tracers(tensor: Any) -> bool:
    """Whether it stands for another tensor while torch's compiler or exporter traces: such a call is not counted."""
    return type(tensor).__module__.startswith("torch._subclasses.")


def _kernel(run_torchs: Callable[..., Any]) -> Callable[..., Any]:
    """The operator's kernel at a dispatch key where it did run_torchs before."""

    def scaled_dot_product_attention(keys: Any, *arguments: Any, **options: Any) -> Any:
        router = _router_of_this_call()
        if router is not None:
            out = _try(router, _Call(*arguments, **options))
            if out is not None:
                return out
        return run_torchs(keys, *arguments, **options)

    return scaled_dot_product_attention


def _make_library() -> Library:
    """The kernels, which last as long as the result. Raises RuntimeError where torch lets nobody replace a kernel that
    somebody else has replaced."""
    library = Library("aten", "IMPL")
    try:
        _register(library)
        return library
    except RuntimeError as error:
        reason = str(error)
    del library  # outside of the handler: the error's frames hold it too, and with it the kernels that got in
    raise RuntimeError(
        "route_sdpa() cannot route: something else in this process replaces scaled_dot_product_attention from Python, "
        f"and torch {torch.__version__} has no replacing twice; end that first, or use torch 2.9 or newer. torch says: "
        f"{reason}"
    )


def _register(library: Library) -> None:
    name = "scaled_dot_product_attention"
    if hasattr(torch.library, "get_kernel"):
        theirs = {key: torch.library.get_kernel(_OPERATOR, key).call_boxed for key in _KEYS}
        for key in _KEYS:
            library.impl(name, _kernel(theirs[key]), key, with_keyset=True, **internals.replacing_kernels)
        return

    # Before torch 2.9 there is no asking. What torch itself has for every key calls other operators.
    def run_torchs(_: Any, *arguments: Any, **options: Any) -> Any:
        return _OPERATOR.decompose(*arguments, **options)

    for key in _KEYS:
        library.impl(name, functools.partial(_kernel(run_torchs), None), key)


class _TracedCalls(TorchFunctionMode):
    """Routes the calls that torch.compile traces, and nothing else."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is _TORCHS:
            if torch.compiler.is_compiling():
                return _run_traced(*args, **(kwargs or {}))
            _Override.look_for_causal_biases()
        return func(*args, **kwargs) if kwargs else func(*args)


_mode = _TracedCalls()


def _run_traced(*arguments: Any, **options: Any) -> torch.Tensor:
    """Nothing is counted: the graph would be made anew for every value of a counter."""
    call = _Call(*arguments, **options)
    if _is_on and not internals.is_exporting() and _why_not_routed(call) is None:
        return _run(call)
    return _TORCHS(*arguments, **options)


# ---- What of torch is replaced meanwhile


class _Override:
    """The kernels, and attributes of torch's Python code: in place as long as somebody holds them, a router that is
    entered or a checkpoint of which a backward pass may still come."""

    _holders = 0
    _current: "_Override | None" = None

    @classmethod
    def hold(cls) -> None:
        with _lock:
            if cls._current is None:
                cls._current = cls()
            cls._holders += 1

    @classmethod
    def release(cls) -> None:
        with _lock:
            cls._holders -= 1
            if cls._holders == 0 and cls._current is not None:
                current, cls._current = cls._current, None
                current._undo()

    @classmethod
    def look_for_causal_biases(cls) -> None:
        """torch.nn.attention.bias may be imported at any time, and is too slow to import for nothing."""
        current = cls._current
        if current is not None and not current._knows_biases and _BIAS_MODULE in sys.modules:
            with _lock:
                if current is cls._current and not current._knows_biases:
                    current._replace_causal_bias()

    def __init__(self) -> None:
        self._replaced: list[tuple[Any, str, Any, Any]] = []  # owner, name, what was there, what is there now
        self._knows_biases = False
        self._library: Library | None = _make_library()
        self._replace_checkpointing()
        if _BIAS_MODULE in sys.modules:
            self._replace_causal_bias()
        self._had_fast_path = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)

    def _undo(self) -> None:
        if self._had_fast_path:
            torch.backends.mha.set_fastpath_enabled(True)
        for owner, name, old, new in reversed(self._replaced):
            if vars(owner).get(name) is not new:
                continue  # somebody else has replaced it since: theirs calls ours, which then calls torch's
            if old is None:
                delattr(owner, name)
            else:
                setattr(owner, name, old)
        self._library = None  # its end takes the kernels away

    def _replace(self, owner: Any, name: str, make: Callable[[Any], Any], is_static: bool = False) -> None:
        """Puts make(what is there) in its place."""
        new = make(getattr(owner, name))
        new = staticmethod(new) if is_static else new
        self._replaced.append((owner, name, vars(owner).get(name), new))
        setattr(owner, name, new)

    def _replace_checkpointing(self) -> None:
        reentrant = torch.utils.checkpoint.CheckpointFunction
        self._replace(reentrant, "forward", _remember_router, is_static=True)
        self._replace(reentrant, "backward", _backward_for_nobody, is_static=True)
        if internals.has_checkpoint_hooks:
            self._replace(internals.CheckpointFrame, "__init__", _remember_router)
            self._replace(internals.CheckpointForward, "__enter__", _begin_pass(_router_of_this_call))
            self._replace(internals.CheckpointForward, "__exit__", _end_pass)
            self._replace(internals.CheckpointRecomputation, "__enter__", _begin_pass(lambda: None))
            self._replace(internals.CheckpointRecomputation, "__exit__", _end_pass)

    def _replace_causal_bias(self) -> None:
        self._knows_biases = True
        self._replace(sys.modules[_BIAS_MODULE].CausalBias, "_dispatch", _route_causal_bias, is_static=True)


def _remember_router(theirs: Callable[..., Any]) -> Callable[..., Any]:
    """For a function that takes what will be recomputed as its first argument after self or ctx."""

    def replacement(this: Any, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        router = _router_of_this_call()
        if router is not None:
            function = _Recomputation(router, function)
        return theirs(this, function, *arguments, **options)

    return replacement


class _Recomputation:
    """What a checkpoint recomputes, in the router that its forward pass ran in: that router may be left by then."""

    def __init__(self, router: SdpaRouter, function: Callable[..., Any]):
        _Override.hold()
        self._router = router
        self._function = function

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return _run_for(self._router, self._function, *arguments, **options)

    def __del__(self) -> None:
        if not sys.is_finalizing():
            _Override.release()


# With use_reentrant=False a recomputation must save what the forward pass saved. So all of a forward pass belongs to
# the router that it began in, which another thread may leave meanwhile; and a recomputation whose forward pass ran
# outside of every router is PyTorch's, as that was. One that is a _Recomputation says otherwise when it is called.


def _backward_for_nobody(theirs: Callable[..., Any]) -> Callable[..., Any]:
    def backward(*arguments: Any) -> Any:
        return _run_for(None, theirs, *arguments)

    return backward


def _begin_pass(find_router: Callable[[], SdpaRouter | None]) -> Callable[..., Any]:
    def make(theirs: Callable[..., Any]) -> Callable[..., Any]:
        def __enter__(hook: Any) -> Any:
            result = theirs(hook)
            hook._flash_attn_jit_before = _pin_to(find_router())
            return result

        return __enter__

    return make


def _end_pass(theirs: Callable[..., Any]) -> Callable[..., Any]:
    def __exit__(hook: Any, *error: Any) -> Any:
        _thread.pin = getattr(hook, "_flash_attn_jit_before", _thread.pin)
        return theirs(hook, *error)

    return __exit__


def _route_causal_bias(theirs: Callable[..., Any]) -> Callable[..., Any]:
    """For CausalBias._dispatch, which makes PyTorch's calls of an SDPA with such a mask. Aligned top-left they come to
    the kernels as is_causal's, bottom-right as a mask of booleans or as an operator that is not SDPA's."""

    def dispatch(*arguments: Any, **options: Any) -> Any:
        if torch.compiler.is_compiling():
            return theirs(*arguments, **options)
        router, call = _router_of_this_call(), _Call(*arguments, **options)
        bias = call.attn_mask
        if router is None or bias.variant.name != "LOWER_RIGHT" or bias.seq_len_q == bias.seq_len_kv:
            return theirs(*arguments, **options)
        out = _try(router, call)
        return _run_for(None, theirs, *arguments, **options) if out is None else out

    return dispatch
