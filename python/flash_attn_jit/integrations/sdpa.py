"""All of the process's calls of PyTorch's ``scaled_dot_product_attention``, from here on: ``route_sdpa()`` without a
``with``, for programs that have no place for one."""

import logging
import threading

from .._router import SdpaRouter, enter, enter_without_mode, leave

__all__ = ["register", "unregister"]

_logger = logging.getLogger("flash_attn_jit")
_lock = threading.Lock()
_registered: "_ProcessRouter | None" = None


class _ProcessRouter(SdpaRouter):
    def __init__(self, torch_compile: bool) -> None:
        super().__init__("sdpa")
        self.torch_compile = torch_compile
        self._has_told = False

    def has_left_a_traced_call(self) -> None:
        if self._has_told:
            return
        self._has_told = True
        _logger.warning(
            "A traced call of scaled_dot_product_attention stays PyTorch's. For torch.compile: sdpa.unregister(), then "
            "sdpa.register(torch_compile=True) in the thread that compiles. (Said once.)"
        )


def register(*, torch_compile: bool = False) -> SdpaRouter:
    """Runs calls of ``torch.nn.functional.scaled_dot_product_attention`` here where it can, in all threads, until
    unregister() or the end of the process::

        from flash_attn_jit.integrations import sdpa
        router = sdpa.register()
        ...
        print(router)       # how many calls ran where, and why

    What is routed, what falls back and what differs from PyTorch's own is as ``flash_attn_jit.route_sdpa()`` has it;
    a ``with route_sdpa()`` inside counts its own thread's calls itself. A second call gives the same router.

    Args:
        torch_compile: also route what torch.compile traces in this thread, which costs every function of torch in this
            thread about 1 us of the host's time. Where False such calls stay PyTorch's, which is logged as a warning,
            and importing what knows of ``torch.nn.attention.bias`` takes up to a second, once.

    Returns:
        the router, with ``counts``, ``reasons`` and ``reset()``.

    Raises:
        RuntimeError: it is registered with another torch_compile; or, with torch 2.8 or older, something else in the
            process replaces SDPA from Python.
    """
    global _registered
    with _lock:
        if _registered is not None:
            if _registered.torch_compile != torch_compile:
                raise RuntimeError(
                    f"torch_compile is {torch_compile}, and SDPA is registered with {_registered.torch_compile}; "
                    "accepted: the same. Call unregister() first"
                )
            return _registered
        router = _ProcessRouter(torch_compile)
        (enter if torch_compile else enter_without_mode)(router)
        _registered = router
        return router


def unregister() -> None:
    """Calls are PyTorch's again; nothing where none was registered. The router keeps its counts."""
    global _registered
    with _lock:
        router, _registered = _registered, None
        if router is not None:
            leave(router)
